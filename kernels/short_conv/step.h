/* One step of decoding, on the state in place. */
#pragma once
#include "parts.h"

/* One step of decoding: x and y (B, D); the state (B, D, W-1) takes in x. The weight and the bias may be bfloat16 here. A
 * structure, because ctypes takes 0.15 microseconds for each argument, and a small step not many more for its work. */
typedef struct {
    const void *x, *weight, *bias; /* bias: (D,) or NULL */
    void *state, *y;
    i64 batch, width, taps, silu, bf16, bf16_weight, threads;
} Step;

enum { WIDE = 256 };
/* Channels first .. first + n of a batch row, n <= WIDE. */
INLINE void step_any(const Step *s, i64 row, i64 first, i64 n, const i64 taps, const int bf16) {
    float sums[WIDE], input[WIDE], past[WIDE * MOST_TAPS], taken[WIDE * MOST_TAPS];
    i64 kept = taps - 1, at = row * s->width + first;
    load_row(input, s->x, at, n, bf16);
    load_row(past, s->state, at * kept, n * kept, bf16);
    load_row(taken, s->weight, first * taps, n * taps, (int)s->bf16_weight);
    if (s->bias) load_row(sums, s->bias, first, n, (int)s->bf16_weight);
    else memset(sums, 0, sizeof sums);
    for (i64 d = 0; d < n; d++) {
        float sum = sums[d] + taken[d * taps + kept] * input[d];
        for (i64 i = 0; i < kept; i++) {
            sum += taken[d * taps + i] * past[d * kept + i];
            past[d * kept + i] = i + 1 < kept ? past[d * kept + i + 1] : input[d];
        }
        sums[d] = sum;
    }
    for (i64 d = 0; s->silu && d < n; d += LANES) storev(sums + d, loadv(sums + d) * logistic(loadv(sums + d)));
    store_row(s->state, at * kept, past, n * kept, bf16);
    store_row(s->y, at, sums, n, bf16);
}

#ifdef __AVX512F__
/* Sums of neighbours: lanes 2i + (2i + 1) of a, then those of b. */
INLINE vf pairs(vf a, vf b) {
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
/* LANES channels of four taps in registers. windows[i]: of four channels, the last three inputs and the new one, as the
 * weights lie; three of four lanes of all windows are the next state. (Elsewhere such permutations are many instructions.) */
INLINE void step_four(const Step *s, i64 row, i64 first, const int bf16, const int bf16_weight) {
    i64 at = row * s->width + first;
    vf x = conv_load(s->x, at, bf16), windows[4];
    windows[0] = PICK(conv_load(s->state, at * 3, bf16), x, 0, 1, 2, 16, 3, 4, 5, 17, 6, 7, 8, 18, 9, 10, 11, 19);
    windows[1] = PICK(conv_load(s->state, at * 3 + 12, bf16), x, 0, 1, 2, 20, 3, 4, 5, 21, 6, 7, 8, 22, 9, 10, 11, 23);
    windows[2] = PICK(conv_load(s->state, at * 3 + 24, bf16), x, 0, 1, 2, 24, 3, 4, 5, 25, 6, 7, 8, 26, 9, 10, 11, 27);
    windows[3] = PICK(conv_load(s->state, at * 3 + 32, bf16), x, 4, 5, 6, 28, 7, 8, 9, 29, 10, 11, 12, 30, 13, 14, 15, 31);
    store_lanes(s->state, at * 3, PICK(windows[0], windows[1], 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21),
                LANES, bf16);
    store_lanes(s->state, at * 3 + 16, PICK(windows[1], windows[2], 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26),
                LANES, bf16);
    store_lanes(s->state, at * 3 + 32, PICK(windows[2], windows[3], 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 30, 31),
                LANES, bf16);
    UNROLL for (int i = 0; i < 4; i++) windows[i] *= conv_load(s->weight, first * 4 + i * LANES, bf16_weight);
    vf z = pairs(pairs(windows[0], windows[1]), pairs(windows[2], windows[3]));
    if (s->bias) z += conv_load(s->bias, first, bf16_weight);
    conv_store(s->y, at, s->silu ? z * logistic(z) : z, bf16, 0);
}
#endif

INLINE void step_block(const Step *s, i64 row, i64 first, i64 n, const int bf16) {
    if (s->taps != 4) {
        step_any(s, row, first, n, s->taps, bf16);
        return;
    }
#ifdef __AVX512F__
    for (; n >= LANES; n -= LANES, first += LANES)
        if (s->bf16_weight) step_four(s, row, first, bf16, 1);
        else step_four(s, row, first, bf16, 0);
#endif
    if (n) step_any(s, row, first, n, 4, bf16);
}
