/* One step of decoding, on the state in place. */
#pragma once
#include "rows.h"

/* Key-wide row of a (B, heads, K) tensor as float32: itself, or a bfloat16 row converted into `room`. */
INLINE const float *row_of(const void *tensor, i64 at, i64 n, float *room, int bf16) {
    if (!bf16) return (const float *)tensor + at;
    load_row(room, tensor, at, n, 1);
    return room;
}

INLINE void step_block(const Call *c, const float *rows[4], i64 head, float *state, i64 stride, void *o, i64 first,
                       i64 n, const int W) {
    const float *e = rows[0], *a = rows[1], *k = rows[2], *b = rows[3];
    i64 bf16 = c->bf16, keys = c->keys;
    float u[WIDEST * LANES], v[WIDEST * LANES] = {0}, out[WIDEST * LANES], room[PADDED(keys)];
    load_row(v, c->v, head * c->values + first, n, (int)bf16);
    read_state(u, b, state, stride, keys, W);
    for (i64 j = 0; j < c->groups; j++) {
        const float *q = row_of(c->q, (head * c->groups + j) * keys, keys, room, (int)bf16);
        if (j) read_state(out, q, state, stride, keys, W);
        else advance(state, state, stride, e, a, k, u, v, q, out, NULL, NULL, keys, W);
        for (int i = 0; i < W * LANES; i++) out[i] *= c->scale;
        store_row(o, (head * c->groups + j) * c->values + first, out, n, (int)bf16);
    }
}
