/* Linear scan h_t = a_t h_{t-1} + x_t on the CPU, forward and backward, for real and for complex numbers.
 *
 * The work is bound by memory: forward reads a and x and writes h; backward reads a, x and dh and writes da and dx. One
 * task is a batch row and a block of channels; it walks through time with the block's state in cache. Backward goes from
 * the last chunk of steps to the first, and makes each chunk's states again from the state before it, which forward kept.
 *
 * (B, T, D) tensors are contiguous, float32 or bfloat16 (bf16 = 1); complex ones are pairs (re, im) of float32.
 *     h_t = a_t h_{t-1} + x_t      g_t = dh_t + conj(a_{t+1}) g_{t+1}      dx_t = g_t      da_t = g_t conj(h_{t-1})
 */
#include "vec.h"

enum { CHUNK = 32, BLOCK = 1024 };

/* The blocks of channels: as wide as possible, but enough for all threads. */
static i64 block_width(i64 batch, i64 width, i64 threads) {
    i64 wanted = MAX((threads + batch - 1) / batch, (width + BLOCK - 1) / BLOCK);
    return MIN(width, PADDED((width + wanted - 1) / wanted));
}

INLINE void step_real(float *restrict h, const float *restrict a, const float *restrict x, i64 n) {
    for (i64 i = 0; i < n; i++) h[i] = a[i] * h[i] + x[i];
}
INLINE void step_complex(float *restrict h, const float *restrict a, const float *restrict x, i64 n) {
    for (i64 i = 0; i < n; i += 2) {
        float re = a[i] * h[i] - a[i + 1] * h[i + 1] + x[i];
        h[i + 1] = a[i] * h[i + 1] + a[i + 1] * h[i] + x[i + 1];
        h[i] = re;
    }
}

/* A row of the tensor as float32: itself, or a bfloat16 row converted into `room`. */
INLINE const float *row_of(const void *tensor, i64 at, i64 n, float *room, int bf16) {
    if (!bf16) return (const float *)tensor + at;
    load_row(room, tensor, at, n, 1);
    return room;
}

INLINE void forward(const void *a, const void *x, const float *initial, const uint8_t *codes, void *h, float *final,
                    float *kept, i64 batch, i64 time, i64 width, i64 threads, const int complex, const int bf16) {
    i64 block = block_width(batch, width, threads), blocks = (width + block - 1) / block;
    i64 chunks = (time + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < batch * blocks; task++) {
        i64 b = task / blocks, first = task % blocks * block, n = MIN(block, width - first);
        float *state = scratch(3 * PADDED(n)), *room_a = state + PADDED(n), *room_x = room_a + PADDED(n);
        if (initial) memcpy(state, initial + b * width + first, (size_t)n * 4);
        for (i64 t = 0; t < time; t++) {
            i64 at = (b * time + t) * width + first;
            int code = codes ? codes[b * time + t] : CONTINUES;
            if (kept && t % CHUNK == 0) memcpy(kept + (b * chunks + t / CHUNK) * width + first, state, (size_t)n * 4);
            if (code == SKIPPED) {
                zero_row(h, at, n, bf16);
                continue;
            }
            if (code == BEGINS) memset(state, 0, (size_t)n * 4);
            const float *at_a = row_of(a, at, n, room_a, bf16), *at_x = row_of(x, at, n, room_x, bf16);
            if (complex) step_complex(state, at_a, at_x, n);
            else step_real(state, at_a, at_x, n);
            store_row(h, at, state, n, bf16);
        }
        memcpy(final + b * width + first, state, (size_t)n * 4);
        free(state);
    }
}

INLINE void backward(const void *a, const void *x, const uint8_t *codes, const float *kept, const void *dh,
                     const float *dfinal, void *da, void *dx, float *dinitial, i64 batch, i64 time, i64 width,
                     i64 threads, const int complex, const int bf16) {
    i64 block = block_width(batch, width, threads), blocks = (width + block - 1) / block;
    i64 chunks = (time + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < batch * blocks; task++) {
        i64 b = task / blocks, first = task % blocks * block, n = MIN(block, width - first), row = PADDED(n);
        float *g = scratch((CHUNK + 6) * row), *room_a = g + row, *room_x = room_a + row, *room_d = room_x + row;
        float *out_a = room_d + row, *states = out_a + row; /* states[t - start]: before step t */
        if (dfinal) memcpy(g, dfinal + b * width + first, (size_t)n * 4);
        for (i64 chunk = chunks - 1; chunk >= 0; chunk--) {
            i64 start = chunk * CHUNK, stop = MIN(time, start + CHUNK);
            memcpy(states, kept + (b * chunks + chunk) * width + first, (size_t)n * 4);
            for (i64 t = start; t < stop; t++) {
                float *before = states + (t - start) * row, *after = before + row;
                i64 at = (b * time + t) * width + first;
                int code = codes ? codes[b * time + t] : CONTINUES;
                if (code == BEGINS) memset(before, 0, (size_t)n * 4);
                if (t + 1 == stop) break;
                memcpy(after, before, (size_t)n * 4);
                if (code == SKIPPED) continue;
                const float *at_a = row_of(a, at, n, room_a, bf16), *at_x = row_of(x, at, n, room_x, bf16);
                if (complex) step_complex(after, at_a, at_x, n);
                else step_real(after, at_a, at_x, n);
            }
            for (i64 t = stop - 1; t >= start; t--) {
                i64 at = (b * time + t) * width + first;
                int code = codes ? codes[b * time + t] : CONTINUES;
                if (code == SKIPPED) {
                    zero_row(da, at, n, bf16);
                    zero_row(dx, at, n, bf16);
                    continue;
                }
                const float *restrict at_a = row_of(a, at, n, room_a, bf16);
                const float *restrict at_d = row_of(dh, at, n, room_d, bf16);
                const float *restrict h = states + (t - start) * row;
                float *restrict to_a = bf16 ? out_a : (float *)da + at, *restrict to_x = bf16 ? room_x : (float *)dx + at;
                if (complex) {
                    for (i64 i = 0; i < n; i += 2) {
                        float re = g[i] + at_d[i], im = g[i + 1] + at_d[i + 1];
                        to_x[i] = re, to_x[i + 1] = im;
                        to_a[i] = re * h[i] + im * h[i + 1], to_a[i + 1] = im * h[i] - re * h[i + 1];
                        g[i] = re * at_a[i] + im * at_a[i + 1], g[i + 1] = im * at_a[i] - re * at_a[i + 1];
                    }
                } else {
                    for (i64 i = 0; i < n; i++) {
                        float s = g[i] + at_d[i];
                        to_x[i] = s, to_a[i] = s * h[i], g[i] = s * at_a[i];
                    }
                }
                if (bf16) {
                    store_row(da, at, out_a, n, 1);
                    store_row(dx, at, room_x, n, 1);
                }
                if (code == BEGINS) memset(g, 0, (size_t)n * 4);
            }
        }
        if (dinitial) memcpy(dinitial + b * width + first, g, (size_t)n * 4);
        free(g);
    }
}

/* width counts floats: twice the channels of complex tensors. kept: (B, chunks of 32 steps, width) or NULL. */
void linear_scan_forward(const void *a, const void *x, const float *initial, const uint8_t *codes, void *h, float *final,
                         float *kept, i64 batch, i64 time, i64 width, i64 threads, i64 complex, i64 bf16) {
    if (complex) forward(a, x, initial, codes, h, final, kept, batch, time, width, threads, 1, 0);
    else if (bf16) forward(a, x, initial, codes, h, final, kept, batch, time, width, threads, 0, 1);
    else forward(a, x, initial, codes, h, final, kept, batch, time, width, threads, 0, 0);
}

void linear_scan_backward(const void *a, const void *x, const uint8_t *codes, const float *kept, const void *dh,
                          const float *dfinal, void *da, void *dx, float *dinitial, i64 batch, i64 time, i64 width,
                          i64 threads, i64 complex, i64 bf16) {
    if (complex)
        backward(a, x, codes, kept, dh, dfinal, da, dx, dinitial, batch, time, width, threads, 1, 0);
    else if (bf16)
        backward(a, x, codes, kept, dh, dfinal, da, dx, dinitial, batch, time, width, threads, 0, 1);
    else
        backward(a, x, codes, kept, dh, dfinal, da, dx, dinitial, batch, time, width, threads, 0, 0);
}
