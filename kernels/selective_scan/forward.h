/* Tiles and blocks of a chunk. */
#pragma once
#include "scan.h"

INLINE void forward_tile(vf *state, const vf *a, const vf *dt, const vf *u, vf *y, i64 from, const Steps *steps, i64 padded,
                         const Ahead *ahead, const int small) {
    vf h[TILE], rate[TILE];
    for (int j = 0; j < TILE; j++) h[j] = state[from + j], rate[j] = a[from + j];
    for (i64 t = 0; t < steps->count; t++) {
        const float *b = steps->b + t * padded + from, *c = steps->c + t * padded + from;
        vf out = y[t];
        fetch(ahead, t, from, padded);
        if (steps->begins[t])
            for (int j = 0; j < TILE; j++) h[j] = splat(0);
        for (int j = 0; j < TILE; j++) {
            h[j] = decay(dt[t], rate[j], small) * h[j] + u[t] * b[j];
            out += c[j] * h[j];
        }
        y[t] = out;
    }
    for (int j = 0; j < TILE; j++) state[from + j] = h[j];
}

static void forward_block(vf *state, const vf *a, const Steps *steps, const Scan *s, i64 block, void *y,
                          const Ahead *ahead) {
    vf dt[CHUNK], u[CHUNK], out[CHUNK], skip = skip_of(s, block);
    load_channels(dt, s->dt, steps, s, block);
    load_channels(u, s->x, steps, s, block);
    for (i64 t = 0; t < steps->count; t++) out[t] = skip * u[t], u[t] *= dt[t];
    int small = is_small(dt, largest(a, s), steps);
    for (i64 from = 0; from < s->padded; from += TILE)
        if (small) forward_tile(state, a, dt, u, out, from, steps, s->padded, ahead, 1);
        else forward_tile(state, a, dt, u, out, from, steps, s->padded, ahead, 0);
    store_channels(y, out, steps, s, block);
}
