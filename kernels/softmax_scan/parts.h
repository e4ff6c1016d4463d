/* A call, the part of it that is one task, and the weights of a step. */
#pragma once
#include "vec.h"

enum { CHUNK = LANES, CHANNELS = 512, VALUES = 2048 };

typedef struct {
    const void *k, *v;
    const float *decay, *bonus; /* (S,) or NULL */
    const uint8_t *codes;       /* (B, T) or NULL */
    float *kept;                /* (B, chunks, S maxima, S denominators, S * per numerators) or NULL */
    i64 batch, time, scores, per, threads;
} Call;

/* One task: which batch row, which scores; widths of scratch rows. */
typedef struct {
    i64 b, first, n, row, value_row;
} Part;

static i64 block_of(const Call *call) {
    i64 most = call->per > 1 ? MAX(1, VALUES / call->per) : CHANNELS;
    i64 wanted = MAX((call->threads + call->batch - 1) / call->batch, (call->scores + most - 1) / most);
    i64 block = (call->scores + wanted - 1) / wanted;
    return call->per > 1 ? block : MIN(call->scores, PADDED(block));
}
static Part part_of(const Call *call, i64 task, i64 block) {
    i64 blocks = (call->scores + block - 1) / block, first = task % blocks * block, n = MIN(block, call->scores - first);
    return (Part){task / blocks, first, n, PADDED(n), call->per > 1 ? n * PADDED(call->per) : PADDED(n)};
}
static i64 tasks_of(const Call *call, i64 block) { return call->batch * ((call->scores + block - 1) / block); }
INLINE int code_of(const Call *call, const Part *part, i64 t) {
    return call->codes ? call->codes[part->b * call->time + t] : CONTINUES;
}

/* exp(x) for x <= 0; 0 for nan, the difference of two scores of -inf. */
INLINE vf weight_of(vf x) {
    vf low = splat(-126.0f), power = x * 1.44269504088896341f;
    vi there = power > low;
    return selectv(there, exp2v_within(selectv(there, power, low)), splat(0.0f));
}

/* -|x|; nan stays nan. */
INLINE vf downward(vf x) { return (vf)((vi)x | (vi)splat(-0.0f)); }

typedef struct {
    vf f, p, a, c;
    vi won; /* where the new score is the maximum */
} Weights;

/* The weights of a step; m and d become those after it. */
INLINE Weights weigh(vf *m, vf *d, vf k, vf decay, vf bonus, int has_bonus) {
    vf old = *m + decay, one = splat(1.0f);
    vi won = k > old;
    vf e = weight_of(downward(old - k)); /* one of the two weights is 1 */
    vf f = selectv(won, e, one), p = selectv(won, one, e), a = f, c = p, sum;
    vf after = f * *d + p;
    if (has_bonus) {
        vf score = k + bonus;
        vi larger = score > *m;
        e = weight_of(downward(score - *m));
        a = selectv(larger, e, one), c = selectv(larger, one, e);
        sum = a * *d + c;
    } else sum = after;
    vf inverse = one / selectv(sum == 0.0f, splat(INFINITY), sum); /* 0 where nothing has weight */
    *m = selectv(won, k, old), *d = after;
    return (Weights){f, p, a * inverse, c * inverse, won};
}

/* n rows of `per` values between a tensor and scratch rows, each padded; one row where per = 1. */
INLINE void gather(float *rows, const float *tensor, i64 at, const Part *part, i64 per) {
    if (per == 1) load_row(rows, tensor, at, part->n, 0);
    else
        for (i64 i = 0; i < part->n; i++) load_row(rows + i * PADDED(per), tensor, at + i * per, per, 0);
}
INLINE void scatter(float *tensor, i64 at, const float *rows, const Part *part, i64 per) {
    if (per == 1) store_row(tensor, at, rows, part->n, 0);
    else
        for (i64 i = 0; i < part->n; i++) store_row(tensor, at + i * per, rows + i * PADDED(per), per, 0);
}

/* The kept state before a chunk: its maxima; denominators and numerators follow as said at Call. */
INLINE float *kept_at(const Call *call, const Part *part, i64 chunk) {
    i64 chunks = (call->time + CHUNK - 1) / CHUNK;
    return call->kept + (part->b * chunks + chunk) * call->scores * (2 + call->per) + part->first;
}
static void keep(const Call *call, const Part *part, i64 chunk, const float *m, const float *n, const float *d) {
    float *to = kept_at(call, part, chunk);
    memcpy(to, m, (size_t)part->n * 4);
    memcpy(to + call->scores, d, (size_t)part->n * 4);
    scatter(to + 2 * call->scores - part->first, part->first * call->per, n, part, call->per);
}
static void recall(const Call *call, const Part *part, i64 chunk, float *m, float *n, float *d) {
    const float *from = kept_at(call, part, chunk);
    memcpy(m, from, (size_t)part->n * 4);
    memcpy(d, from + call->scores, (size_t)part->n * 4);
    gather(n, from + 2 * call->scores - part->first, part->first * call->per, part, call->per);
}

/* Rows of decays and bonuses for a part, zeros where there are none. */
static void parameters(const Call *call, const Part *part, float *decay, float *bonus) {
    if (call->decay) load_row(decay, call->decay, part->first, part->n, 0);
    if (call->bonus) load_row(bonus, call->bonus, part->first, part->n, 0);
}
static void empty(const Part *part, float *m, float *n, float *d) {
    for (i64 i = 0; i < part->row; i++) m[i] = -INFINITY, d[i] = 0;
    memset(n, 0, (size_t)part->value_row * 4);
}

INLINE void put(void *tensor, i64 at, vf x, i64 n, const int bf16, int stream) {
    if (stream) stream_lanes(tensor, at, x, bf16);
    else store_lanes(tensor, at, x, n, bf16);
}
/* Processors foresee whole rows, not parts of them, nor going back: what comes next is fetched (1.8 times as fast). */
INLINE void fetch(const void *tensor, i64 at, const int bf16) {
    __builtin_prefetch((const char *)tensor + at * (bf16 ? 2 : 4), 0, 2);
}
