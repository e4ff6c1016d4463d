/* Block scan h_t = A_t h_{t-1} + x_t on the CPU, forward and backward.
 *
 * One task is a batch row and a range of blocks; it walks through time with their states in cache. The transitions are
 * read once forward and once backward, and are N times everything else, so the states that the steps read are kept.
 *
 * Tensors are contiguous float32: a, da (B, T, H, N, N); x, h, kept, dh, dx (B, T, H, N); states (B, H, N).
 *     h_t = A_t h_{t-1} + x_t      g_t = dh_t + A_{t+1}^T g_{t+1}      dx_t = g_t      dA_t = g_t h_{t-1}^T
 */
#include "vec.h"

/* Blocks a task: few enough that there are tasks for all threads. */
static i64 range(i64 batch, i64 blocks, i64 threads) {
    i64 wanted = MIN(blocks, (threads + batch - 1) / batch);
    return (blocks + wanted - 1) / wanted;
}

INLINE float dot(const float *a, const float *b, i64 n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* after = A before + x */
INLINE void advance(float *after, const float *a, const float *before, const float *x, const i64 n) {
    for (i64 i = 0; i < n; i++) after[i] = dot(a + i * n, before, n) + x[i];
}

INLINE void forward(const float *a, const float *x, const float *initial, const uint8_t *codes, float *h, float *final,
                    float *kept, i64 batch, i64 time, i64 blocks, const i64 n, i64 threads) {
    i64 each = range(batch, blocks, threads), tasks = (blocks + each - 1) / each;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < batch * tasks; task++) {
        i64 b = task / tasks, first = task % tasks * each, count = MIN(each, blocks - first) * n;
        float *state = scratch(2 * PADDED(count)), *next = state + PADDED(count);
        if (initial) memcpy(state, initial + (b * blocks + first) * n, (size_t)count * 4);
        for (i64 t = 0; t < time; t++) {
            i64 at = ((b * time + t) * blocks + first) * n;
            int code = codes ? codes[b * time + t] : CONTINUES;
            if (code == BEGINS) memset(state, 0, (size_t)count * 4);
            if (kept) memcpy(kept + at, state, (size_t)count * 4);
            if (code == SKIPPED) {
                memset(h + at, 0, (size_t)count * 4);
                continue;
            }
            for (i64 i = 0; i < count; i += n) advance(next + i, a + (at + i) * n, state + i, x + at + i, n);
            memcpy(h + at, next, (size_t)count * 4);
            float *swap = state;
            state = next, next = swap;
        }
        memcpy(final + (b * blocks + first) * n, state, (size_t)count * 4);
        free(MIN(state, next));
    }
}

/* da = sum before^T, and the new gradient A^T sum */
INLINE void retreat(float *da, float *g, const float *a, const float *before, const float *sum, const i64 n) {
    for (i64 j = 0; j < n; j++) g[j] = 0;
    for (i64 i = 0; i < n; i++) {
#pragma omp simd
        for (i64 j = 0; j < n; j++) {
            da[i * n + j] = sum[i] * before[j];
            g[j] += a[i * n + j] * sum[i];
        }
    }
}

INLINE void backward(const float *a, const uint8_t *codes, const float *kept, const float *dh, const float *dfinal,
                     float *da, float *dx, float *dinitial, i64 batch, i64 time, i64 blocks, const i64 n, i64 threads) {
    i64 each = range(batch, blocks, threads), tasks = (blocks + each - 1) / each;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < batch * tasks; task++) {
        i64 b = task / tasks, first = task % tasks * each, count = MIN(each, blocks - first) * n;
        float *g = dinitial + (b * blocks + first) * n;
        memcpy(g, dfinal + (b * blocks + first) * n, (size_t)count * 4);
        for (i64 t = time - 1; t >= 0; t--) {
            i64 at = ((b * time + t) * blocks + first) * n;
            int code = codes ? codes[b * time + t] : CONTINUES;
            if (code == SKIPPED) {
                memset(dx + at, 0, (size_t)count * 4);
                memset(da + at * n, 0, (size_t)(count * n) * 4);
                continue;
            }
            for (i64 i = 0; i < count; i++) dx[at + i] = dh[at + i] + g[i];
            for (i64 i = 0; i < count; i += n) {
                i64 own = at + i;
                retreat(da + own * n, g + i, a + own * n, kept + own, dx + own, n);
            }
            if (code == BEGINS) memset(g, 0, (size_t)count * 4);
        }
    }
}

/* kept: (B, T, H, N), the state that each step reads, or NULL. */
void block_scan_forward(const float *a, const float *x, const float *initial, const uint8_t *codes, float *h, float *final,
                        float *kept, i64 batch, i64 time, i64 blocks, i64 n, i64 threads) {
    if (n == 8) forward(a, x, initial, codes, h, final, kept, batch, time, blocks, 8, threads);
    else forward(a, x, initial, codes, h, final, kept, batch, time, blocks, n, threads);
}

void block_scan_backward(const float *a, const uint8_t *codes, const float *kept, const float *dh, const float *dfinal,
                         float *da, float *dx, float *dinitial, i64 batch, i64 time, i64 blocks, i64 n, i64 threads) {
    huge_pages(da, batch * time * blocks * n * n * 4);
    if (n == 8) backward(a, codes, kept, dh, dfinal, da, dx, dinitial, batch, time, blocks, 8, threads);
    else backward(a, codes, kept, dh, dfinal, da, dx, dinitial, batch, time, blocks, n, threads);
}
