/* Selective scan on the CPU: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t.
 *
 * The work is bound by arithmetic, half of it the exponential. Lanes are 16 channels; a tile of 4 state numbers stays in
 * registers while it walks through a chunk of steps. One task is a batch row and a group of channels. dB and dC are sums
 * over all channels: each group sums its own, a second pass adds the groups up. How channels are grouped depends on their
 * number alone, so neither the number of threads nor the run changes a bit of the result.
 *
 * Backward goes from the last chunk to the first, and makes each chunk's states again from the state before it, which
 * forward kept; decays and states of one tile and chunk stay in the first-level cache.
 *     g_t = C_t dy_t + e_{t+1} g_{t+1}     with e_t = exp(dt_t A), u_t = dt_t x_t
 *     dB_t = sum_d g_t u_t      dC_t = sum_d h_t dy_t      du_t = sum_n g_t B_t      dz_t = g_t e_t h_{t-1}
 *     dA = sum_t dz_t dt_t      ddt_t = sum_n dz_t A + du_t x_t      dx_t = du_t dt_t + D dy_t
 *
 * (B, T, D) and (B, T, N) tensors are contiguous, float32 or bfloat16 (bf16 = 1); A (D, N), D and states are float32. */
#include "forward.h"
#include "backward.h"
#include "step.h"

/* kept: (B, chunks, blocks, padded, 16), the state before each chunk of 32 steps, or NULL. final: (B, D, N). */
void selective_scan_forward(const void *x, const void *dt, const float *a, const void *b, const void *c, const float *d,
                            const float *initial, const uint8_t *codes, void *y, float *final, float *kept, i64 batch,
                            i64 time, i64 width, i64 states, i64 threads, i64 bf16) {
    Scan s = scan_of(x, dt, a, b, c, d, codes, batch, time, width, states, bf16);
    s.stream = streams(y, &s);
    huge_pages(y, batch * time * width * (bf16 ? 2 : 4));
    if (kept) huge_pages(kept, batch * s.chunks * s.blocks * s.padded * LANES * 4);
    int past_caches = kept && streamable(kept, batch * s.chunks * s.blocks, s.padded * LANES, 0);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 task = 0; task < s.batch * s.groups; task++) {
        i64 row = task / s.groups, first = task % s.groups * s.blocks_a_group;
        i64 stop = MIN(first + s.blocks_a_group, s.blocks), n = (stop - first) * s.padded;
        vf *rates = (vf *)scratch(2 * n * LANES + 2 * CHUNK * s.padded), *state = rates + n;
        Steps steps = steps_in((float *)(state + n), &s);
        for (i64 block = first; block < stop; block++) {
            lanes_of_matrix(rates + (block - first) * s.padded, s.a, LOG2_E, &s, block);
            lanes_of_matrix(state + (block - first) * s.padded, initial ? initial + row * width * states : NULL, 1, &s, block);
        }
        for (i64 chunk = 0; chunk < s.chunks; chunk++) {
            i64 at = (row * s.chunks + chunk) * s.blocks + first;
            float *keep = kept ? kept + at * s.padded * LANES : NULL;
            if (kept && past_caches)
                for (i64 i = 0; i < n; i++) stream_lanes(keep, i * LANES, state[i], 0);
            else if (kept) memcpy(keep, state, (size_t)n * sizeof(vf));
            load_steps(&steps, &s, row, chunk);
            for (i64 block = first; block < stop; block++) {
                i64 own = (block - first) * s.padded;
                Ahead ahead = {.count = 0};
                if (chunk + 1 < s.chunks) {
                    look_ahead(&ahead, x, &s, row, chunk + 1, block), look_ahead(&ahead, dt, &s, row, chunk + 1, block);
                    if (!s.stream) look_ahead(&ahead, y, &s, row, chunk + 1, block);
                }
                forward_block(state + own, rates + own, &steps, &s, block, y, &ahead);
            }
            zero_skipped(y, &s, row, chunk, first, stop);
        }
        for (i64 block = first; block < stop; block++)
            matrix_of_lanes(final + row * width * states, state + (block - first) * s.padded, &s, block);
        stream_end();
        free(rates);
    }
}

/* kept: as forward wrote it. da (D, N), dd (D,) or NULL, dinitial (B, D, N): float32. */
void selective_scan_backward(const void *x, const void *dt, const float *a, const void *b, const void *c, const float *d,
                             const uint8_t *codes, const float *kept, const void *dy, const float *dfinal, void *dx, void *ddt,
                             float *da, void *db, void *dc, float *dd, float *dinitial, i64 batch, i64 time, i64 width,
                             i64 states, i64 threads, i64 bf16) {
    Scan s = scan_of(x, dt, a, b, c, d, codes, batch, time, width, states, bf16);
    s.stream = streams(dx, &s) && streams(ddt, &s);
    i64 part = batch * time * 2 * states;
    float *parts = malloc((size_t)(s.groups * part) * sizeof(float));
    vf *sum_a = (vf *)scratch(batch * s.blocks * (s.padded + 1) * LANES), *sum_d = sum_a + batch * s.blocks * s.padded;
    if (!parts) abort();
    i64 bytes = batch * time * width * (bf16 ? 2 : 4);
    huge_pages(dx, bytes), huge_pages(ddt, bytes), huge_pages(parts, s.groups * part * 4);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 task = 0; task < batch * s.groups; task++) {
        i64 row = task / s.groups, group = task % s.groups;
        backward_task(&s, row, group, kept, dy, dfinal, dx, ddt, dinitial, parts + group * part,
                      sum_a + row * s.blocks * s.padded, sum_d + row * s.blocks);
    }
    add_parts(&s, parts, sum_a, sum_d, db, dc, da, dd, threads);
    free(sum_a);
    free(parts);
}

void selective_scan_step(const Step *s) {
    i64 width = s->width, states = s->states, blocks = (width + LANES - 1) / LANES, tasks = s->batch * blocks;
    i64 threads = s->batch * width * states < 1 << 14 ? 1 : s->threads; /* waking the others takes longer */
    int bf16 = (int)s->bf16;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * LANES, n = MIN(LANES, width - first), at = row * width + first;
        float maps[2 * PADDED(states)], *to_y = maps + PADDED(states);
        load_row(maps, s->b, row * states, states, bf16);
        load_row(to_y, s->c, row * states, states, bf16);
        vf input = load_lanes(s->x, at, n, bf16), dts = load_lanes(s->dt, at, n, bf16), out;
        float rate[LANES], u[LANES];
        storev(rate, dts * LOG2_E), storev(u, dts * input);
        float *h = s->state + at * states;
        const float *own = s->a + first * states;
        if (n == LANES && states == LANES) out = step_square(h, own, maps, to_y, rate, u);
        else out = step_any(h, own, maps, to_y, rate, u, n, states);
        if (s->d) out += input * load_lanes(s->d, first, n, 0);
        store_lanes(s->y, at, out, n, bf16);
    }
}
