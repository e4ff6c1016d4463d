/* Gated linear attention on the CPU: forward, backward, and one step of decoding.
 *
 * One task is a batch row and a key/value head; it walks through time in segments of at most SEGMENT steps. Within a
 * segment, with S the state before it, P_t the product of the factors up to step t and n its last step,
 *
 *     o_t = (q_t P_t) S + sum_{j <= t} A_tj v_j      A_tj = (q_t P_t) . (k_j / P_j)      S' = P_n S + sum_j (k_j P_n / P_j)^T v_j
 *
 * which are small matrix products. A bonus reads with P_{t-1} and j < t, and puts q u k on A's diagonal. A segment ends
 * where a document begins and, with factors for each channel, before P falls below SMALLEST; the first step's factor is in
 * no quotient, so that any factor, even 0, is exact. Skipped steps are in no segment.
 *
 * Backward goes from the last chunk to the first. It makes the states before a chunk's segments again from the one that
 * forward kept, and carries dS, the gradient of the state:
 *
 *     dA_tj = do_t . v_j                      dv_j = (k_j P_n / P_j) dS' + sum_t A_tj do_t
 *     dq_t = P_t (S do_t) + sum_j dA_tj k_j P_t / P_j      dk_j = P_n / P_j (dS' v_j) + sum_t dA_tj q_t P_t / P_j
 *
 * The gradient of a log factor g_t is the sum of all products that cross step t: those from S, less those that end before
 * t (q dq), plus those that begin before t (k dk). Pairs that cross no factor at all are left out of both.
 *
 * Tensors are contiguous: q (B, T, H, K), k (B, T, Hk, K), v (B, T, Hk, V) float32 or bfloat16 (bf16 = 1); g, bonus and
 * states float32. `columns` is V, and one more with the normaliser, whose column of v is 1. */
#include "forward.h"
#include "backward.h"
#include "step.h"

/* kept: (B, Hk, chunks, K, columns) states before each chunk, denominators: (B, T, H); both NULL without gradients. */
void gated_linear_attention_forward(const void *q, const void *k, const void *v, const float *g, const float *bonus,
                                    const float *initial, const uint8_t *codes, void *o, float *final, float *kept,
                                    float *denominators, i64 batch, i64 time, i64 heads, i64 kv_heads, i64 key,
                                    i64 value, i64 decay, i64 normalize, i64 threads, i64 bf16, float scale) {
    i64 columns = value + normalize;
    Call c = {q, k, v, g, bonus, codes, batch, time, heads, kv_heads, key, value, columns, PADDED(key), PADDED(columns),
              scale, (int)decay, (int)normalize, (int)bf16};
    i64 chunks = (time + CHUNK - 1) / CHUNK;
    huge_pages(o, batch * time * heads * value * (bf16 ? 2 : 4));
    if (kept) huge_pages(kept, batch * kv_heads * chunks * key * columns * 4);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 task = 0; task < batch * kv_heads; task++)
        forward_head(&c, initial, o, final, kept, denominators, task / kv_heads, task % kv_heads);
}

/* dg and dbonus come zeroed where they are double: sums over time, for each batch row. */
void gated_linear_attention_backward(const void *q, const void *k, const void *v, const float *g, const float *bonus,
                                     const uint8_t *codes, const float *kept, const float *denominators, const void *o,
                                     const void *dout, const float *dfinal, void *dq, void *dk, void *dv, void *dg,
                                     double *dbonus, float *dinitial, i64 batch, i64 time, i64 heads, i64 kv_heads,
                                     i64 key, i64 value, i64 decay, i64 normalize, i64 threads, i64 bf16, float scale) {
    i64 columns = value + normalize;
    Call c = {q, k, v, g, bonus, codes, batch, time, heads, kv_heads, key, value, columns, PADDED(key), PADDED(columns),
              scale, (int)decay, (int)normalize, (int)bf16};
    Gradients to = {dq, dk, dv, dg, dbonus, dinitial, o, dout, kept, denominators, dfinal};
    i64 steps = batch * time, bytes = bf16 ? 2 : 4;
    huge_pages(dq, steps * heads * key * bytes), huge_pages(dk, steps * kv_heads * key * bytes);
    huge_pages(dv, steps * kv_heads * value * bytes);
    if (decay == PER_CHANNEL) huge_pages(dg, steps * kv_heads * key * 4);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 task = 0; task < batch * kv_heads; task++) backward_head(&c, &to, task / kv_heads, task % kv_heads);
}

/* Tensors as in forward, without the time axis; the state (B, Hk, K, columns) is changed in place. */
void gated_linear_attention_step(const void *q, const void *k, const void *v, const float *g, const float *bonus,
                                 float *state, void *o, i64 batch, i64 heads, i64 kv_heads, i64 key, i64 value,
                                 i64 decay, i64 normalize, i64 threads, i64 bf16, float scale) {
    i64 columns = value + normalize, tasks = batch * kv_heads;
    Call c = {q, k, v, g, bonus, NULL, batch, 1, heads, kv_heads, key, value, columns, PADDED(key), PADDED(columns),
              scale, (int)decay, (int)normalize, (int)bf16};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && tasks * key * columns >= PARALLEL_STEP)
    for (i64 task = 0; task < tasks; task++) step_head(&c, state, o, task / kv_heads, task % kv_heads);
}
