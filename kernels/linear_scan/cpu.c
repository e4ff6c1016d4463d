/* Linear scan h_t = a_t h_{t-1} + x_t on the CPU, forward and backward, for real and for complex numbers.
 *
 * The work is bound by memory: forward reads a and x and writes h; backward reads a, x and dh and writes da and dx. One
 * task is a batch row and a block of channels; it walks through time with the block's state in cache. Backward goes from
 * the last chunk of steps to the first, and makes each chunk's states again from the state before it, which forward kept.
 * While it goes back through one chunk, the inputs of the chunk before are fetched, which no processor foresees. Large
 * outputs are written past the caches (on Zen 4 a fifth less time into memory in use, 8 % into fresh) on huge pages.
 *
 * (B, T, D) tensors are contiguous, float32 or bfloat16 (bf16 = 1); complex ones are pairs (re, im) of float32.
 *     h_t = a_t h_{t-1} + x_t      g_t = dh_t + conj(a_{t+1}) g_{t+1}      dx_t = g_t      da_t = g_t conj(h_{t-1})
 */
#include "vec.h"

/* FEW_STEPS: floats of a step below which waking other threads takes longer than the work. */
enum { CHUNK = 32, BLOCK = 1024, FEW_STEPS = 1 << 14 };

/* The blocks of channels: as wide as possible, because memory is read fastest in long rows, but enough for all threads. */
static i64 block_width(i64 batch, i64 width, i64 threads) {
    i64 wanted = MAX((threads + batch - 1) / batch, (width + BLOCK - 1) / BLOCK);
    return MIN(width, PADDED((width + wanted - 1) / wanted));
}

/* a * h, or h * conj(a), number by number; complex ones are pairs of lanes. */
INLINE vf times(vf a, vf h, const int complex, const int conjugate) {
    if (!complex) return a * h;
    vf re = PICK(a, a, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
    vf im = PICK(a, a, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
    vf turned = PICK(h, h, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    float s = conjugate ? 1.0f : -1.0f;
    return re * h + im * (turned * (vf){s, -s, s, -s, s, -s, s, -s, s, -s, s, -s, s, -s, s, -s});
}

INLINE void write(void *tensor, i64 at, vf x, i64 n, const int bf16, const int stream) {
    if (stream) stream_lanes(tensor, at, x, bf16);
    else store_lanes(tensor, at, x, n, bf16);
}

/* Into the second cache: 16 numbers that are read some ten thousand cycles later. */
INLINE void fetch(const void *tensor, i64 at, const int bf16) {
    __builtin_prefetch((const char *)tensor + at * (bf16 ? 2 : 4), 0, 2);
}

INLINE void forward(const void *a, const void *x, const float *initial, const uint8_t *codes, void *h, float *final,
                    float *kept, i64 batch, i64 time, i64 width, i64 threads, const int complex, const int bf16,
                    const int stream) {
    i64 block = block_width(batch, width, threads), blocks = (width + block - 1) / block;
    i64 chunks = (time + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < batch * blocks; task++) {
        i64 b = task / blocks, first = task % blocks * block, n = MIN(block, width - first);
        i64 ahead = n < width ? width : 0; /* whole rows are read in order, which processors foresee; parts are not */
        float *state = scratch(PADDED(n));
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
            for (i64 i = 0; i < n; i += LANES) {
                if (ahead) fetch(a, at + i + ahead, bf16), fetch(x, at + i + ahead, bf16);
                vf factor = load_lanes(a, at + i, n - i, bf16), input = load_lanes(x, at + i, n - i, bf16);
                vf next = times(factor, loadv(state + i), complex, 0) + input;
                storev(state + i, next);
                write(h, at + i, next, n - i, bf16, stream);
            }
        }
        memcpy(final + b * width + first, state, (size_t)n * 4);
        stream_end();
        free(state);
    }
}

/* Rows states[t - start], the state that step t reads, for the steps of a chunk; the first row is there. */
INLINE void remake(float *states, i64 row, const void *a, const void *x, i64 at, i64 width, const uint8_t *codes,
                   i64 steps, i64 n, const int complex, const int bf16) {
    for (i64 t = 0; t < steps; t++, at += width, states += row) {
        int code = codes ? codes[t] : CONTINUES;
        if (code == BEGINS) memset(states, 0, (size_t)n * 4);
        if (t + 1 == steps) return;
        if (code == SKIPPED) {
            memcpy(states + row, states, (size_t)n * 4);
            continue;
        }
        for (i64 i = 0; i < n; i += LANES) {
            vf factor = load_lanes(a, at + i, n - i, bf16), input = load_lanes(x, at + i, n - i, bf16);
            storev(states + row + i, times(factor, loadv(states + i), complex, 0) + input);
        }
    }
}

INLINE void backward(const void *a, const void *x, const uint8_t *codes, const float *kept, const void *dh,
                     const float *dfinal, void *da, void *dx, float *dinitial, i64 batch, i64 time, i64 width,
                     i64 threads, const int complex, const int bf16, const int stream) {
    i64 block = block_width(batch, width, threads), blocks = (width + block - 1) / block;
    i64 chunks = (time + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < batch * blocks; task++) {
        i64 b = task / blocks, first = task % blocks * block, n = MIN(block, width - first), row = PADDED(n);
        float *g = scratch((CHUNK + 1) * row), *states = g + row;
        if (dfinal) memcpy(g, dfinal + b * width + first, (size_t)n * 4);
        for (i64 chunk = chunks - 1; chunk >= 0; chunk--) {
            i64 start = chunk * CHUNK, stop = MIN(time, start + CHUNK), ahead = chunk ? CHUNK * width : 0;
            memcpy(states, kept + (b * chunks + chunk) * width + first, (size_t)n * 4);
            remake(states, row, a, x, (b * time + start) * width + first, width, codes ? codes + b * time + start : NULL,
                   stop - start, n, complex, bf16);
            for (i64 t = stop - 1; t >= start; t--) {
                i64 at = (b * time + t) * width + first;
                int code = codes ? codes[b * time + t] : CONTINUES;
                const float *before = states + (t - start) * row;
                if (code == SKIPPED) {
                    zero_row(da, at, n, bf16);
                    zero_row(dx, at, n, bf16);
                    continue;
                }
                for (i64 i = 0; i < n; i += LANES) {
                    fetch(dh, at + i - ahead, bf16), fetch(a, at + i - ahead, bf16), fetch(x, at + i - ahead, bf16);
                    vf sum = loadv(g + i) + load_lanes(dh, at + i, n - i, bf16);
                    vf factor = load_lanes(a, at + i, n - i, bf16);
                    write(dx, at + i, sum, n - i, bf16, stream);
                    write(da, at + i, times(loadv(before + i), sum, complex, 1), n - i, bf16, stream);
                    storev(g + i, times(factor, sum, complex, 1));
                }
                if (code == BEGINS) memset(g, 0, (size_t)n * 4);
            }
        }
        if (dinitial) memcpy(dinitial + b * width + first, g, (size_t)n * 4);
        stream_end();
        free(g);
    }
}

/* width counts floats: twice the channels of complex tensors. kept: (B, chunks of 32 steps, width) or NULL. */
void linear_scan_forward(const void *a, const void *x, const float *initial, const uint8_t *codes, void *h, float *final,
                         float *kept, i64 batch, i64 time, i64 width, i64 threads, i64 complex, i64 bf16) {
    huge_pages(h, batch * time * width * (bf16 ? 2 : 4));
    int stream = streamable(h, batch * time, width, (int)bf16);
#define FORWARD(complex, bf16, stream) \
    forward(a, x, initial, codes, h, final, kept, batch, time, width, threads, complex, bf16, stream)
    if (complex && stream) FORWARD(1, 0, 1);
    else if (complex) FORWARD(1, 0, 0);
    else if (bf16 && stream) FORWARD(0, 1, 1);
    else if (bf16) FORWARD(0, 1, 0);
    else if (stream) FORWARD(0, 0, 1);
    else FORWARD(0, 0, 0);
}

void linear_scan_backward(const void *a, const void *x, const uint8_t *codes, const float *kept, const void *dh,
                          const float *dfinal, void *da, void *dx, float *dinitial, i64 batch, i64 time, i64 width,
                          i64 threads, i64 complex, i64 bf16) {
    huge_pages(da, batch * time * width * (bf16 ? 2 : 4));
    huge_pages(dx, batch * time * width * (bf16 ? 2 : 4));
    int stream = streamable(da, batch * time, width, (int)bf16) && streamable(dx, batch * time, width, (int)bf16);
#define BACKWARD(complex, bf16, stream)                                                                                \
    backward(a, x, codes, kept, dh, dfinal, da, dx, dinitial, batch, time, width, threads, complex, bf16, stream)
    if (complex && stream) BACKWARD(1, 0, 1);
    else if (complex) BACKWARD(1, 0, 0);
    else if (bf16 && stream) BACKWARD(0, 1, 1);
    else if (bf16) BACKWARD(0, 1, 0);
    else if (stream) BACKWARD(0, 0, 1);
    else BACKWARD(0, 0, 0);
}

/* One token: state = a state + x in place, of n floats, and its copy in x's type. */
INLINE void step(const void *a, const void *x, float *state, void *h, i64 i, i64 left, const int complex, const int bf16) {
    vf factor = load_lanes(a, i, left, bf16), input = load_lanes(x, i, left, bf16);
    vf next = times(factor, load_lanes(state, i, left, 0), complex, 0) + input;
    store_lanes(state, i, next, left, 0);
    store_lanes(h, i, next, left, bf16);
}
void linear_scan_step(const void *a, const void *x, float *state, void *h, i64 n, i64 threads, i64 complex, i64 bf16) {
    if (threads < 2 || n < FEW_STEPS) {
        for (i64 i = 0; i < n; i += LANES) step(a, x, state, h, i, n - i, (int)complex, (int)bf16);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < n; i += LANES) step(a, x, state, h, i, n - i, (int)complex, (int)bf16);
}
