/* A head's walk forward through time. */
#pragma once
#include "segments.h"

INLINE void load_state(float *state, const float *from, i64 rows, i64 n, i64 padded) {
    for (i64 k = 0; k < rows; k++) load_row(state + k * padded, from, k * n, n, 0);
}
INLINE void store_state(float *to, const float *state, i64 rows, i64 n, i64 padded) {
    for (i64 k = 0; k < rows; k++) store_row(to, k * n, state + k * padded, n, 0);
}

/* Writes o_t from its row; a normaliser divides by the last column, and 0 / 0 is 0. */
static void store_output(const Call *c, void *o, float *denominators, float *row, i64 at) {
    if (c->normalize) {
        float d = row[c->value];
        vf factor = splat(d == 0 ? 0 : 1 / d);
        for (i64 i = 0; i < c->vr; i += LANES) storev(row + i, loadv(row + i) * factor);
        if (denominators) denominators[at] = d;
    }
    store_row(o, at * c->value, row, c->value, c->bf16);
}

static void forward_segment(const Call *c, const Segment *s, Queries *u, float *state, float *out, void *o,
                            float *denominators, i64 b, i64 h) {
    i64 group = c->heads / c->kv_heads;
    for (i64 head = h * group; head < (h + 1) * group; head++) {
        if (s->n) prefetch(c, c->q, b, c->heads, head, c->key, s->step[s->n - 1] + 1, c->bf16 ? 2 : 4);
        load_queries(c, s, u, b, head, c->scale);
        Product from_state = {out, NULL, NULL, NULL, c->vr, u->state, c->kr, 1, state, c->vr};
        multiply(&from_state, s->n, c->vr, c->key);
        Product from_pairs = {out, out, NULL, NULL, c->vr, u->scores, SEGMENT, 1, s->v, c->vr};
        multiply_lower(&from_pairs, s->n, c->vr, s->n);
        for (i64 t = 0; t < s->n; t++)
            store_output(c, o, denominators, out + t * c->vr, (b * c->time + s->step[t]) * c->heads + head);
    }
    update_state(c, s, state);
}

/* Zeros for every skipped step of a (B, T, heads, width) tensor's heads first ... first + n. */
static void zero_skipped(const Call *c, void *tensor, i64 b, i64 heads, i64 first, i64 n, i64 width, int bf16) {
    for (i64 t = 0; tensor && c->codes && t < c->time; t++)
        if (c->codes[b * c->time + t] == SKIPPED)
            zero_row(tensor, ((b * c->time + t) * heads + first) * width, n * width, bf16);
}

static void forward_head(const Call *c, const float *initial, void *o, float *final, float *kept, float *denominators,
                         i64 b, i64 h) {
    i64 group = c->heads / c->kv_heads, chunks = (c->time + CHUNK - 1) / CHUNK, size = c->key * c->columns;
    float *state = scratch(c->kr * c->vr + SEGMENT * c->vr + segment_floats(c) + query_floats(c));
    float *out = state + c->kr * c->vr;
    Segment s;
    Queries u;
    query_rows(&u, c, segment_rows(&s, c, out + SEGMENT * c->vr));
    zero_skipped(c, o, b, c->heads, h * group, group, c->value, c->bf16);
    zero_skipped(c, denominators, b, c->heads, h * group, group, 1, 0);
    if (initial) load_state(state, initial + (b * c->kv_heads + h) * size, c->key, c->columns, c->vr);
    for (i64 chunk = 0; chunk < chunks; chunk++) {
        i64 t = chunk * CHUNK, stop = MIN(c->time, t + CHUNK);
        if (kept)
            store_state(kept + ((b * c->kv_heads + h) * chunks + chunk) * size, state, c->key, c->columns, c->vr);
        while (t < stop) {
            t = load_segment(c, &s, b, h, t, stop);
            if (s.begins) memset(state, 0, (size_t)(c->kr * c->vr) * 4);
            forward_segment(c, &s, &u, state, out, o, denominators, b, h);
        }
    }
    store_state(final + (b * c->kv_heads + h) * size, state, c->key, c->columns, c->vr);
    free(state);
}
