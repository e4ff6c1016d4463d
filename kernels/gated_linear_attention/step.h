/* One step of decoding, on the state in place. */
#pragma once
#include "forward.h"

typedef struct {
    float *state;
    const float *q, *k, *v, *factor; /* q: group x kr */
    float *out;                      /* group x vr */
} Step;

/* Columns c ... c + C * LANES of the state's rows: decayed, updated and read in one pass. One query head in registers. */
INLINE void step_block(const int C, const int alone, const Call *p, const Step *s, i64 group, i64 c) {
    int late = p->bonus != NULL;
    vf acc[4] = {{0}}, v[4];
    for (int j = 0; j < C; j++) v[j] = loadv(s->v + c + j * LANES);
    float *row = s->state + c;
    for (i64 k = 0; k < p->key; k++, row += p->columns) {
        vf factor = splat(s->factor[k]), key = splat(s->k[k]), read[4];
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) {
            vf before = loadv(row + j * LANES), after = factor * before + key * v[j];
            storev(row + j * LANES, after);
            read[j] = late ? before : after;
        }
        if (alone) {
            vf q = splat(s->q[k]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) acc[j] += q * read[j];
        }
        for (i64 head = 0; !alone && head < group; head++) {
            float *out = s->out + head * p->vr + c;
            vf q = splat(s->q[head * p->kr + k]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) storev(out + j * LANES, loadv(out + j * LANES) + q * read[j]);
        }
    }
    for (int j = 0; alone && j < C; j++) storev(s->out + c + j * LANES, acc[j]);
}

/* The last columns, which fill no vector. */
static void step_tail(const Call *p, const Step *s, i64 group, i64 c) {
    for (i64 k = 0; k < p->key; k++)
        for (i64 i = c; i < p->columns; i++) {
            float *x = s->state + k * p->columns + i, before = *x, after = s->factor[k] * before + s->k[k] * s->v[i];
            *x = after;
            for (i64 head = 0; head < group; head++)
                s->out[head * p->vr + i] += s->q[head * p->kr + k] * (p->bonus ? before : after);
        }
}

/* The bonus's share of o: (q u k) v. */
static void add_bonus(const Call *c, const Step *s, float *out, const float *q, i64 head) {
    float sum = 0;
    for (i64 k = 0; k < c->key; k++) sum += q[k] * c->bonus[head * c->key + k] * s->k[k];
    add_scaled(out, sum, s->v, c->vr);
}

static void step_head(const Call *c, float *state, void *o, i64 b, i64 h) {
    i64 kr = c->kr, vr = c->vr, group = c->heads / c->kv_heads, at = b * c->kv_heads + h, column = 0;
    float k[kr], v[vr], factor[kr], q[group * kr], out[group * vr];
    Step s = {state + at * c->key * c->columns, q, k, v, factor, out};
    Segment factors = {.factor = factor};
    load_factor(c, &factors, b, h, 0);
    memset(v, 0, sizeof v);
    memset(out, 0, sizeof out);
    load_row(k, c->k, at * c->key, c->key, c->bf16);
    load_row(v, c->v, at * c->value, c->value, c->bf16);
    if (c->normalize) v[c->value] = 1;
    for (i64 i = 0; i < group; i++) {
        load_row(q + i * kr, c->q, (b * c->heads + h * group + i) * c->key, c->key, c->bf16);
        for (i64 j = 0; j < kr; j += LANES) storev(q + i * kr + j, loadv(q + i * kr + j) * splat(c->scale));
    }
    for (; column + 4 * LANES <= c->columns; column += 4 * LANES) {
        if (group == 1) step_block(4, 1, c, &s, group, column);
        else step_block(4, 0, c, &s, group, column);
    }
    for (; column + LANES <= c->columns; column += LANES) step_block(1, 0, c, &s, group, column);
    step_tail(c, &s, group, column);
    for (i64 i = 0; i < group; i++) {
        if (c->bonus) add_bonus(c, &s, out + i * vr, q + i * kr, h * group + i);
        store_output(c, o, NULL, out + i * vr, b * c->heads + h * group + i);
    }
}
