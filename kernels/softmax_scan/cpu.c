/* Softmax scan on the CPU, forward and backward: averages weighted by exponentials of scores, with decay and bonus.
 *
 * (B, T, S) scores k and (B, T, S * per) values v are contiguous, float32 or bfloat16 (bf16 = 1). A score weighs `per`
 * values: per = 1 has a score for each channel; else S counts heads and per is their width. One task is a batch row and a
 * block of scores with their values; it walks through time with the block's state in cache. A step is
 *     m' = max(m + w, k)   f = exp(m + w - m')   p = exp(k - m')   n' = f n + p v   d' = f d + p   out = a n + c v
 * with (a, c) = (f, p) / d', or with a bonus u (exp(m - r), exp(u + k - r)) divided by the denominator that they make,
 * r being the larger exponent.
 *
 * Backward goes from the last chunk of 16 steps to the first; it makes the weights and states of a chunk again from the
 * state before it, which forward kept. G and H are the gradients of n' and d' from later steps; sums are over the values
 * of a score:
 *     dv = c do + p G      dk = p (sum(G v) + H) + s      G <- f G + a do      H <- f H - a sum(do out)
 *     dw = f (sum(G n) + H d) - (s without a bonus)       du = s             s = c sum(do (v - out))
 * v - out is a (d v - n), which keeps its relative accuracy where the step's own value outweighs all others. What the final
 * maximum's gradient has beyond that of the pair (n exp(m), d exp(m)) goes to the score, or the decays, that it came from.
 * No result depends on the number of threads: blocks share no sums but those over the batch, made in order at the end.
 */
#include "forward.h"
#include "backward.h"
#include "step.h"

/* The state is three tensors (B, S), (B, S * per), (B, S): maximum, numerator, denominator. `initial` may be NULLs. */
void softmax_scan_forward(const void *k, const void *v, const float *decay, const float *bonus, const float *maximum,
                          const float *numerator, const float *denominator, const uint8_t *codes, void *out,
                          float *to_maximum, float *to_numerator, float *to_denominator, float *kept, i64 batch, i64 time,
                          i64 scores, i64 per, i64 threads, i64 bf16) {
    Call call = {k, v, decay, bonus, codes, kept, batch, time, scores, per, threads};
    const float *initial[3] = {maximum, numerator, denominator};
    float *final[3] = {to_maximum, to_numerator, to_denominator};
    if (bf16) forward(&call, initial, out, final, 1);
    else forward(&call, initial, out, final, 0);
}

void softmax_scan_backward(const void *k, const void *v, const float *decay, const float *bonus, const uint8_t *codes,
                           float *kept, const void *dout, const float *maximum, const float *numerator,
                           const float *denominator, void *dk, void *dv, float *ddecay, float *dbonus, float *to_maximum,
                           float *to_numerator, float *to_denominator, i64 batch, i64 time, i64 scores, i64 per,
                           i64 threads, i64 bf16) {
    Call call = {k, v, decay, bonus, codes, kept, batch, time, scores, per, threads};
    const float *dfinal[3] = {maximum, numerator, denominator};
    float *dinitial[3] = {to_maximum, to_numerator, to_denominator};
    if (bf16) backward(&call, dout, dfinal, dk, dv, dinitial, ddecay, dbonus, 1);
    else backward(&call, dout, dfinal, dk, dv, dinitial, ddecay, dbonus, 0);
}

void softmax_scan_step(const Step *s) {
    i64 block = s->per > 1 ? LANES : STEP_BLOCK, blocks = (s->scores + block - 1) / block, tasks = s->batch * blocks;
    i64 threads = s->batch * s->scores * s->per < FEW_STEPS ? 1 : MIN(s->threads, tasks);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * block, stop = MIN(s->scores, first + block);
        if (s->bf16) step_block(s, row, first, stop, 1);
        else step_block(s, row, first, stop, 0);
    }
}
