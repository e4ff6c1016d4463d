/* Short causal convolution on the CPU, forward and backward, and the one-token step.
 *
 * The work is bound by memory: forward reads x and writes y, backward reads x and dy and writes dx. Masks and documents
 * are taken out of the inner loops by a list of positions for each batch row: its valid steps in order, and W-1
 * positions that hold zeros before each document but the first. Position p sees positions p-W+1 .. p; those before 0 are the
 * initial state, the last W-1 are the final state. So the inner loops are plain convolutions over row pointers.
 *
 * One task is SEGMENT positions of a batch row and a block of channels, whatever the number of threads, and it goes
 * TILE positions at a time. With z = bias + sum_i weight_i x_{p-W+1+i}:
 *     dz = dy act'(z)     dx_p = sum_i weight_i dz_{p+W-1-i}     dweight_i = sum_p dz_p x_{p-W+1+i}     dbias = sum_p dz_p
 * z is made again in backward. The sums over p run within a task in float32 and over the tasks, in order, in double.
 *
 * (B, T, D) tensors and the states (B, D, W-1) are contiguous, float32 or bfloat16 (bf16 = 1); D >= LANES. The weight
 * (D, W) and the bias are float32; W <= MOST_TAPS.
 */
#include "forward.h"
#include "backward.h"
#include "step.h"

void short_conv_forward(const void *x, const float *weight, const float *bias, const void *initial, const uint8_t *codes,
                        void *y, void *final, i64 batch, i64 time, i64 width, i64 taps, i64 silu, i64 threads, i64 bf16) {
    Conv conv = {.x = x, .initial = initial, .bias = bias, .codes = codes, .batch = batch, .time = time,
                 .width = width, .taps = taps, .silu = silu, .bf16 = bf16};
    float *memory = prepare(&conv, weight, y);
    if (batch * time * width <= FEW) threads = 1;
    if (taps == 4 && bf16) all_forward(&conv, y, final, threads, 4, 1);
    else if (taps == 4) all_forward(&conv, y, final, threads, 4, 0);
    else if (bf16) all_forward(&conv, y, final, threads, taps, 1);
    else all_forward(&conv, y, final, threads, taps, 0);
    free(memory);
}

void short_conv_backward(const void *x, const float *weight, const float *bias, const void *initial,
                         const uint8_t *codes, const void *dy, const void *dfinal, void *dx, float *dweight, float *dbias,
                         void *dinitial, i64 batch, i64 time, i64 width, i64 taps, i64 silu, i64 threads, i64 bf16) {
    Conv conv = {.x = x, .initial = initial, .bias = bias, .codes = codes, .batch = batch, .time = time,
                 .width = width, .taps = taps, .silu = silu, .bf16 = bf16};
    float *memory = prepare(&conv, weight, dx);
    i64 tasks = batch * segment_count(&conv);
    float *sums = scratch(tasks * (taps + 1) * width);
    if (batch * time * width <= FEW) threads = 1;
    if (taps == 4 && bf16) all_backward(&conv, dy, dfinal, dx, dinitial, sums, threads, 4, 1);
    else if (taps == 4) all_backward(&conv, dy, dfinal, dx, dinitial, sums, threads, 4, 0);
    else if (bf16) all_backward(&conv, dy, dfinal, dx, dinitial, sums, threads, taps, 1);
    else all_backward(&conv, dy, dfinal, dx, dinitial, sums, threads, taps, 0);
    add_sums(sums, tasks, width, taps, dweight, dbias, threads);
    free(sums);
    free(memory);
}

void short_conv_step(const Step *s) {
    i64 blocks = (s->width + WIDE - 1) / WIDE, tasks = s->batch * blocks;
    i64 threads = s->batch * s->width < FEW_STEPS ? 1 : s->threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * WIDE, n = MIN(WIDE, s->width - first);
        if (s->bf16) step_block(s, row, first, n, 1);
        else step_block(s, row, first, n, 0);
    }
}
