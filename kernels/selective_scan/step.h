/* One step of decoding, on the state in place. */
#pragma once
#include "scan.h"

/* One step of 16 channels with 16 state numbers, in place on h (16, 16): C h. z: exponents by channel, base 2. */
INLINE vf step_rows(float *h, vf *z, vf b, vf c, const float *u, const int small) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        vf next = (small ? exp2v_within(z[i]) : exp2v(z[i])) * loadv(h + i * LANES) + u[i] * b;
        storev(h + i * LANES, next);
        z[i] = next * c;
    }
    return sum_rows(z);
}
/* Not inline, so that rate and u are broadcast from memory; from registers that takes shuffles. */
static __attribute__((noinline)) vf step_square(float *h, const float *a, const float *b, const float *c, const float *rate,
                                                const float *u) {
    vf z[LANES], squares = splat(0);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) z[i] = rate[i] * loadv(a + i * LANES), squares += z[i] * z[i];
    if (all(squares < 126.0f * 126.0f)) return step_rows(h, z, loadv(b), loadv(c), u, 1);
    return step_rows(h, z, loadv(b), loadv(c), u, 0);
}
/* The same of n channels with any number of state numbers; b and c are padded rows. */
static vf step_any(float *h, const float *a, const float *b, const float *c, const float *rate, const float *u, i64 n,
                   i64 states) {
    vf rows[LANES];
    for (i64 i = 0; i < LANES; i++) {
        rows[i] = splat(0);
        for (i64 j = 0; i < n && j < states; j += LANES) {
            i64 at = i * states + j, few = states - j;
            vf next = exp2v(rate[i] * load_lanes(a, at, few, 0)) * load_lanes(h, at, few, 0) + u[i] * loadv(b + j);
            store_lanes(h, at, next, few, 0);
            rows[i] += next * loadv(c + j);
        }
    }
    return sum_rows(rows);
}

/* One step of decoding, in place on state (B, D, N); y (B, D). Lanes are state numbers here, as they lie in memory. A
 * structure, because ctypes takes 0.15 microseconds for each argument, and a small step not many more for its work. */
typedef struct {
    const void *x, *dt;
    const float *a;
    const void *b, *c;
    const float *d; /* (D,) or NULL */
    float *state;
    void *y;
    i64 batch, width, states, threads, bf16;
} Step;
