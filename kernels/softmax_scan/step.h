/* One step of decoding, on the state in place. */
#pragma once
#include "parts.h"

/* One step of decoding, in place on the state. Its one argument is a structure because ctypes takes 0.15 microseconds for
 * each argument, and a small step not many more for its work. */
typedef struct {
    const void *k, *v;
    const float *decay, *bonus; /* (S,) or NULL */
    float *maximum, *numerator, *denominator;
    void *out;
    i64 batch, scores, per, threads, bf16;
} Step;

/* Values of a task, and of a step below which waking other threads takes longer than the work. */
enum { STEP_BLOCK = 512, FEW_STEPS = 1 << 13 };

/* The weights of 16 scores from score i of a batch row on; maximum and denominator go on. */
INLINE Weights step_weights(const Step *s, i64 row, i64 i, const int bf16) {
    i64 at = row * s->scores + i, left = s->scores - i;
    vf m = load_lanes(s->maximum, at, left, 0), d = load_lanes(s->denominator, at, left, 0), none = splat(0.0f);
    vf decay = s->decay ? load_lanes(s->decay, i, left, 0) : none, bonus = s->bonus ? load_lanes(s->bonus, i, left, 0) : none;
    Weights x = weigh(&m, &d, load_lanes(s->k, at, left, bf16), decay, bonus, s->bonus != NULL);
    store_lanes(s->maximum, at, m, left, 0), store_lanes(s->denominator, at, d, left, 0);
    return x;
}
INLINE void step_values(const Step *s, i64 at, i64 left, vf f, vf p, vf a, vf c, const int bf16) {
    vf v = load_lanes(s->v, at, left, bf16), before = load_lanes(s->numerator, at, left, 0);
    store_lanes(s->out, at, a * before + c * v, left, bf16);
    store_lanes(s->numerator, at, f * before + p * v, left, 0);
}
INLINE void step_block(const Step *s, i64 row, i64 first, i64 stop, const int bf16) {
    for (i64 i = first; i < stop; i += LANES) {
        Weights x = step_weights(s, row, i, bf16);
        i64 at = row * s->scores + i, left = MIN(LANES, s->scores - i);
        if (s->per == 1) {
            step_values(s, at, left, x.f, x.p, x.a, x.c, bf16);
            continue;
        }
        for (i64 h = 0; h < left; h++) {
            vf f = splat(x.f[h]), p = splat(x.p[h]), a = splat(x.a[h]), c = splat(x.c[h]);
            for (i64 j = 0; j < s->per; j += LANES)
                step_values(s, (at + h) * s->per + j, s->per - j, f, p, a, c, bf16);
        }
    }
}
