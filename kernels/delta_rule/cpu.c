/* Delta rule S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t on the CPU, forward and backward.
 *
 * A task is a head and a block of value columns, whose part of the state stays in the first-level cache. With u_t = b_t^T
 * S_{t-1} a step is S = e S + a u^T + k v^T (e = exp g), and the same pass over S reads o_t and the next step's u: five
 * multiply-adds an element of the state, which is what bounds the speed, and about what a chunk of matrix products costs.
 *
 * Backward goes through chunks of CHUNK steps from the last to the first. It makes the chunk's states again, from the one
 * that forward kept at its edge, into memory that stays in the second-level cache, and then carries the adjoint D back:
 *     D_t = P_t + q_t do_t^T     da = D u     dk = D v     dv = k D     du = a D     dq = S_t do
 *     P_{t-1} = e D + b du^T     db = S_{t-1} du           dg = e rowsum(D * S_{t-1})
 * The second line of step t and the first of step t-1 need the same S_{t-1}, so they are one pass.
 *
 * Only the valid steps of a chunk are loaded, as float32 rows, and numbered from 0; row -1 and row `count` stand for
 * nothing, so that the passes need no special case at the chunk's edges. Tensors are contiguous, float32 or bfloat16. */
#include "forward.h"
#include "backward.h"
#include "step.h"

/* kept: (B, Hk, chunks of 32 steps, K, V), or NULL. decay: 0 none, 1 g is (B, T, Hk, 1), 2 it is (B, T, Hk, K). */
void delta_rule_forward(const void *q, const void *k, const void *v, const void *a, const void *b, const float *g,
                        const float *initial, const uint8_t *codes, void *o, float *final, float *kept, i64 batch,
                        i64 time, i64 heads, i64 groups, i64 keys, i64 values, i64 decay, i64 bf16, i64 threads,
                        float scale) {
    Call c = {q, k, v, a, b, g, codes, batch, time, heads, groups, keys, values, decay, bf16, threads, scale};
    i64 chunks = (time + CHUNK - 1) / CHUNK;
    huge_pages(o, batch * time * heads * groups * values * (bf16 ? 2 : 4));
    if (kept) huge_pages(kept, batch * heads * chunks * keys * values * 4);
    forward(&c, initial, o, final, kept);
}

void delta_rule_backward(const void *q, const void *k, const void *v, const void *a, const void *b, const float *g,
                         const uint8_t *codes, const float *kept, const void *d_out, const float *d_final, void *dq,
                         void *dk, void *dv, void *da, void *db, float *dg, float *d_initial, i64 batch, i64 time,
                         i64 heads, i64 groups, i64 keys, i64 values, i64 decay, i64 bf16, i64 threads, float scale) {
    Call c = {q, k, v, a, b, g, codes, batch, time, heads, groups, keys, values, decay, bf16, threads, scale};
    Gradients to = {dq, dk, dv, da, db, dg, d_initial};
    i64 key_bytes = batch * time * heads * keys * (bf16 ? 2 : 4);
    void *tensors[] = {dk, da, db};
    for (int i = 0; i < 3; i++) huge_pages(tensors[i], key_bytes);
    huge_pages(dq, groups * key_bytes);
    huge_pages(dv, batch * time * heads * values * (bf16 ? 2 : 4));
    if (decay == CHANNEL_DECAY) huge_pages(dg, batch * time * heads * keys * 4);
    int split = batch * heads < threads;
    i64 size = split ? 1 : group_size(batch * heads, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (!split)
    for (i64 begin = 0; begin < batch * heads; begin += size)
        backward_group(&c, &to, kept, d_out, d_final, begin, MIN(batch * heads, begin + size), split);
}

/* One step in place on state (B, Hk, K, V); the other tensors have no time axis. */
void delta_rule_step(const void *q, const void *k, const void *v, const void *a, const void *b, const float *g,
                     float *states, void *o, i64 heads, i64 groups, i64 keys, i64 values, i64 decay, i64 bf16,
                     i64 threads, float scale) {
    Call call = {q, k, v, a, b, g, NULL, heads, 1, 1, groups, keys, values, decay, bf16, threads, scale}, *c = &call;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (i64 head = 0; head < heads; head++) {
        float room[4][PADDED(keys)] __attribute__((aligned(64))), *state = states + head * keys * values;
        load_decay(room[0], c, head, PADDED(keys));
        const float *rows[4] = {room[0], row_of(a, head * keys, keys, room[1], (int)bf16),
                                row_of(k, head * keys, keys, room[2], (int)bf16),
                                row_of(b, head * keys, keys, room[3], (int)bf16)};
        i64 first = 0;
        for (; first + 64 <= values; first += 64) step_block(c, rows, head, state + first, values, o, first, 64, 4);
        for (; first + 16 <= values; first += 16) step_block(c, rows, head, state + first, values, o, first, 16, 1);
        if (first == values) continue;
        float rest[keys][LANES];
        memset(rest, 0, sizeof rest);
        load_block(rest[0], state + first, keys, values, values - first, LANES);
        step_block(c, rows, head, rest[0], LANES, o, first, values - first, 1);
        store_block(state + first, rest[0], keys, values, values - first, LANES);
    }
}
