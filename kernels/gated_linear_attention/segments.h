/* Segments: their steps, products of factors, scores, and what they do to the state. */
#pragma once
#include "call.h"
#include "products.h"

typedef struct {
    i64 n, begins, step[SEGMENT];
    float *k, *v, *factor, *before, *after, *up, *down, *k_pair, *k_end; /* SEGMENT rows each */
    float *total, *kt;  /* one row; k_pair transposed, kr x SEGMENT */
    float *weights;     /* SEGMENT x SEGMENT, of the pairs (t, j) beside those in q_pair and k_pair */
} Segment;

/* Takes the first floats of `room`; returns what is left. */
static float *segment_rows(Segment *s, const Call *c, float *room) {
    float **rows[] = {&s->k, &s->factor, &s->before, &s->after, &s->up, &s->down, &s->k_pair, &s->k_end, &s->kt};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) *rows[i] = room, room += SEGMENT * c->kr;
    s->v = room, room += SEGMENT * c->vr;
    s->total = room, room += c->kr;
    s->weights = room;
    return room + SEGMENT * SEGMENT;
}
static i64 segment_floats(const Call *c) { return SEGMENT * (9 * c->kr + c->vr + SEGMENT) + c->kr; }

INLINE int any(vi x) {
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= x[i];
    return found;
}

/* Factors of step t into s->factor's row n. */
static void load_factor(const Call *c, Segment *s, i64 b, i64 h, i64 t) {
    float *row = s->factor + s->n * c->kr;
    if (c->decay == PER_CHANNEL) {
        load_row(row, c->g, ((b * c->time + t) * c->kv_heads + h) * c->key, c->key, 0);
        for (i64 i = 0; i < c->kr; i += LANES) storev(row + i, expv(loadv(row + i)));
    } else {
        vf g = c->decay == NO_DECAY ? (vf){0}
                                    : splat(c->g[c->decay == CONSTANT ? h : (b * c->time + t) * c->kv_heads + h]);
        g = expv(g);
        for (i64 i = 0; i < c->kr; i += LANES) storev(row + i, g);
    }
}

/* Whether the product of the factors since the segment's first step stays in range with those of row n; run: that product. */
static int in_range(const Call *c, const Segment *s, float *run) {
    vi out = {0};
    for (i64 i = 0; i < c->kr; i += LANES) {
        vf x = s->n ? loadv(run + i) * loadv(s->factor + s->n * c->kr + i) : splat(1);
        storev(run + i, x);
        out |= (x < splat(SMALLEST)) | (x > splat(1 / SMALLEST));
    }
    return !any(out);
}

/* The steps of the segment that begins at or after t, with their factors; returns where the next one begins. */
static i64 find_steps(const Call *c, Segment *s, i64 b, i64 h, i64 t, i64 stop) {
    float *run = s->total;
    s->n = s->begins = 0;
    for (; t < stop && s->n < SEGMENT; t++) {
        int code = c->codes ? c->codes[b * c->time + t] : CONTINUES;
        if (code == SKIPPED) continue;
        if (code == BEGINS) {
            if (s->n) break;
            s->begins = 1;
        }
        load_factor(c, s, b, h, t);
        if (c->decay == PER_CHANNEL && !in_range(c, s, run)) break;
        s->step[s->n++] = t;
    }
    return t;
}

/* Products of factors: before (of S in o_t), after (of k_j in S'), total, and for pairs up, down and weights. */
static void multiply_factors(const Call *c, Segment *s) {
    i64 kr = c->kr, n = s->n, late = c->bonus != NULL; /* late: o_t is read before step t's factor */
    for (i64 i = 0; i < kr; i += LANES) {
        vf before = splat(1), since = splat(1), after = splat(1);
        for (i64 t = 0; t < n; t++) {
            vf factor = loadv(s->factor + t * kr + i);
            if (late) storev(s->before + t * kr + i, before), storev(s->up + t * kr + i, since);
            before *= factor;
            if (t) since *= factor;
            if (!late) storev(s->before + t * kr + i, before), storev(s->up + t * kr + i, since);
            if (c->decay == PER_CHANNEL) storev(s->down + t * kr + i, 1.0f / since);
        }
        for (i64 t = n - 1; t >= 0; t--) {
            storev(s->after + t * kr + i, after);
            after *= loadv(s->factor + t * kr + i);
        }
        storev(s->total + i, after);
    }
    vf row = {0};
    for (i64 t = 0; t < n; t++) {
        float *to = s->weights + t * SEGMENT;
        if (late) storev(to, row);
        if (c->decay != PER_CHANNEL) row *= splat(s->factor[t * kr]);
        row[t] = 1;
        if (!late) storev(to, row);
    }
}

/* Asks for the rows of SEGMENT steps from `first`: a head's rows lie too far apart for the processor to foresee them. */
static void prefetch(const Call *c, const void *tensor, i64 b, i64 heads, i64 head, i64 width, i64 first, int bytes) {
    for (i64 t = MAX(first, 0); t < MIN(first + SEGMENT, c->time); t++) {
        const char *row = (const char *)tensor + ((b * c->time + t) * heads + head) * width * bytes;
        for (i64 i = 0; i < width * bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
    }
}

/* Everything about the segment that begins at or after t and does not depend on queries; returns where the next begins. */
static i64 load_segment(const Call *c, Segment *s, i64 b, i64 h, i64 t, i64 stop) {
    i64 kr = c->kr, vr = c->vr, next = find_steps(c, s, b, h, t, stop);
    int bytes = c->bf16 ? 2 : 4;
    prefetch(c, c->k, b, c->kv_heads, h, c->key, next, bytes);
    prefetch(c, c->v, b, c->kv_heads, h, c->value, next, bytes);
    multiply_factors(c, s);
    for (i64 j = 0; j < s->n; j++) {
        i64 at = (b * c->time + s->step[j]) * c->kv_heads + h;
        float *k = s->k + j * kr, *v = s->v + j * vr;
        load_row(k, c->k, at * c->key, c->key, c->bf16);
        load_row(v, c->v, at * c->value, c->value, c->bf16);
        if (c->normalize) v[c->value] = 1; /* what follows it in the row is 0 and stays so */
        scale_rows(s->k_end + j * kr, k, s->after + j * kr, kr);
        if (c->decay == PER_CHANNEL) scale_rows(s->k_pair + j * kr, k, s->down + j * kr, kr);
    }
    if (c->decay != PER_CHANNEL) memcpy(s->k_pair, s->k, (size_t)(s->n * kr) * 4);
    transpose(s->kt, s->k_pair, SEGMENT, kr);
    return next;
}

/* S' = total S + k_end^T v: rows are channels of k. */
static void update_state(const Call *c, const Segment *s, float *state) {
    Product p = {state, state, s->total, NULL, c->vr, s->k_end, 1, c->kr, s->v, c->vr};
    multiply(&p, c->key, c->vr, s->n);
}

typedef struct {
    float *q, *pair, *state, *scores, *bonus; /* SEGMENT rows: q, q * up, q * before; SEGMENT x SEGMENT: A; one row */
} Queries;

static float *query_rows(Queries *u, const Call *c, float *room) {
    u->q = room, u->pair = u->q + SEGMENT * c->kr, u->state = u->pair + SEGMENT * c->kr;
    u->bonus = u->state + SEGMENT * c->kr, u->scores = u->bonus + c->kr;
    return u->scores + SEGMENT * SEGMENT;
}
static i64 query_floats(const Call *c) { return SEGMENT * (3 * c->kr + SEGMENT) + c->kr; }

INLINE void weigh(float *scores, const Segment *s) {
    for (i64 t = 0; t < s->n; t++) {
        vf w = loadv(s->weights + t * SEGMENT), x = loadv(scores + t * SEGMENT);
        storev(scores + t * SEGMENT, selectv(w != 0, x * w, splat(0)));
    }
}

/* Query head `head` in the segment, times `scale`, and its scores A. */
static void load_queries(const Call *c, const Segment *s, Queries *u, i64 b, i64 head, float scale) {
    i64 kr = c->kr;
    for (i64 t = 0; t < s->n; t++) {
        float *q = u->q + t * kr;
        load_row(q, c->q, ((b * c->time + s->step[t]) * c->heads + head) * c->key, c->key, c->bf16);
        for (i64 i = 0; i < kr; i += LANES) storev(q + i, loadv(q + i) * splat(scale));
        scale_rows(u->state + t * kr, q, s->before + t * kr, kr);
        if (c->decay == PER_CHANNEL) scale_rows(u->pair + t * kr, q, s->up + t * kr, kr);
    }
    if (c->decay != PER_CHANNEL) memcpy(u->pair, u->q, (size_t)(s->n * kr) * 4);
    Product p = {u->scores, NULL, NULL, NULL, SEGMENT, u->pair, kr, 1, s->kt, SEGMENT};
    multiply(&p, s->n, SEGMENT, c->key);
    weigh(u->scores, s);
    if (!c->bonus) return;
    load_row(u->bonus, c->bonus, head * c->key, c->key, 0);
    for (i64 t = 0; t < s->n; t++) {
        const float *q = u->q + t * kr, *k = s->k + t * kr;
        vf sum = {0};
        for (i64 i = 0; i < kr; i += LANES) sum += loadv(q + i) * loadv(u->bonus + i) * loadv(k + i);
        u->scores[t * SEGMENT + t] = sumv(sum);
    }
}
