/* The rows of a chunk's steps, blocks of the state's columns, and one pass over a block. */
#pragma once
#include "vec.h"

enum { CHUNK = 32, WIDEST = 4 };
enum { NO_DECAY = 0, HEAD_DECAY = 1, CHANNEL_DECAY = 2 };

typedef struct {
    const void *q, *k, *v, *a, *b;
    const float *g;
    const uint8_t *codes;
    i64 batch, time, heads, groups, keys, values, decay, bf16, threads;
    float scale;
} Call;

/* The key-wide rows of a chunk's valid steps. */
typedef struct {
    i64 count, stride; /* valid steps; floats a row */
    i64 step[CHUNK];   /* which step of the call each is */
    uint8_t begins[CHUNK];
    float *memory, *q, *k, *a, *b, *e; /* row 0 of each; q has a row for each head of the group */
} Rows;

static Rows new_rows(const Call *c) {
    Rows r = {.stride = PADDED(c->keys)};
    i64 size = (CHUNK + 2) * r.stride;
    r.memory = scratch((4 + c->groups) * size);
    r.k = r.memory + r.stride, r.a = r.k + size, r.b = r.a + size, r.e = r.b + size;
    r.q = r.memory + 4 * size + c->groups * r.stride;
    return r;
}

static void load_decay(float *e, const Call *c, i64 position, i64 stride) {
    if (c->decay == CHANNEL_DECAY) load_row(e, c->g, position * c->keys, c->keys, 0);
    for (i64 i = 0; i < stride; i += LANES) {
        vf g = c->decay == CHANNEL_DECAY ? loadv(e + i) : splat(c->decay == HEAD_DECAY ? c->g[position] : 0.0f);
        storev(e + i, expv(g));
    }
}

/* Asks for what comes next of step t, which lies far from the steps beside it, while something else is computed.
 * Inlined, because GCC takes a function that only prefetches for one without effects, and drops its calls. */
INLINE void prefetch_row(const void *tensor, i64 at, i64 n, i64 bf16) {
    const char *row = (const char *)tensor + at * (bf16 ? 2 : 4);
    for (i64 byte = 0; byte < n * (bf16 ? 2 : 4); byte += 64) __builtin_prefetch(row + byte, 0, 3);
}
INLINE void prefetch_step(const Call *c, const void *d_out, i64 head, i64 t) {
    if (t < 0 || t >= c->time) return;
    i64 position = (head / c->heads * c->time + t) * c->heads + head % c->heads, n = c->groups;
    prefetch_row(c->k, position * c->keys, c->keys, c->bf16);
    prefetch_row(c->a, position * c->keys, c->keys, c->bf16);
    prefetch_row(c->b, position * c->keys, c->keys, c->bf16);
    prefetch_row(c->q, position * n * c->keys, n * c->keys, c->bf16);
    prefetch_row(c->v, position * c->values, c->values, c->bf16);
    if (d_out) prefetch_row(d_out, position * n * c->values, n * c->values, c->bf16);
    if (c->decay) prefetch_row(c->g, c->decay == HEAD_DECAY ? position : position * c->keys, c->decay == HEAD_DECAY ? 1 : c->keys, 0);
}

static void load_rows(Rows *r, const Call *c, i64 head, i64 start, i64 stop) {
    i64 b = head / c->heads, h = head % c->heads, n = 0, width = r->stride;
    for (i64 t = start; t < stop; t++) {
        int code = c->codes ? c->codes[b * c->time + t] : CONTINUES;
        if (code == SKIPPED) continue;
        i64 position = (b * c->time + t) * c->heads + h, at = position * c->keys;
        load_row(r->k + n * width, c->k, at, c->keys, (int)c->bf16);
        load_row(r->a + n * width, c->a, at, c->keys, (int)c->bf16);
        for (i64 j = 0; j < c->groups; j++) {
            float *q = r->q + (n * c->groups + j) * width;
            load_row(q, c->q, (position * c->groups + j) * c->keys, c->keys, (int)c->bf16);
            for (i64 i = 0; i < width; i++) q[i] *= c->scale;
        }
        if (code == BEGINS) {
            memset(r->b + n * width, 0, (size_t)width * 4);
            memset(r->e + n * width, 0, (size_t)width * 4);
        } else {
            load_row(r->b + n * width, c->b, at, c->keys, (int)c->bf16);
            load_decay(r->e + n * width, c, position, width);
        }
        r->begins[n] = code == BEGINS;
        r->step[n++] = t;
    }
    r->count = n;
    memset(r->b + n * width, 0, (size_t)width * 4);
    for (i64 i = 0; i < width; i++) r->e[n * width + i] = 1;
}

/* Columns of a block, by shape alone: sums over blocks must not depend on the number of threads. */
static i64 block_width(const Call *c) {
    i64 width = c->keys <= 64 ? 64 : c->keys <= 128 ? 32 : 16;
    return c->batch * c->heads == 1 ? MAX(width / 2, 16) : width;
}
static int vectors(i64 columns) { return columns <= 16 ? 1 : columns <= 32 ? 2 : 4; }

/* A block's columns of a (keys, values) matrix from and to the layout of the passes. */
static void load_block(float *block, const float *matrix, i64 keys, i64 values, i64 n, i64 stride) {
    for (i64 i = 0; i < keys; i++) memcpy(block + i * stride, matrix + i * values, (size_t)n * 4);
}
static void store_block(float *matrix, const float *block, i64 keys, i64 values, i64 n, i64 stride) {
    for (i64 i = 0; i < keys; i++) memcpy(matrix + i * values, block + i * stride, (size_t)n * 4);
}

/* y = x^T S, for a state with W vectors of each row of `stride` floats. */
INLINE void read_state(float *y, const float *x, const float *s, i64 stride, i64 keys, const int W) {
    vf sum[WIDEST] = {0};
    for (i64 i = 0; i < keys; i++)
        for (int j = 0; j < W; j++) sum[j] += loadv(s + i * stride + j * LANES) * splat(x[i]);
    for (int j = 0; j < W; j++) storev(y + j * LANES, sum[j]);
}

/* to = e from + a u^T + k v^T; where q is given, o = q^T to; where next_b is, next_u = next_b^T to. */
INLINE void advance(float *to, const float *from, i64 stride, const float *e, const float *a, const float *k,
                    const float *u, const float *v, const float *q, float *o, const float *next_b, float *next_u,
                    i64 keys, const int W) {
    vf uu[WIDEST], vv[WIDEST], sum_o[WIDEST] = {0}, sum_u[WIDEST] = {0};
    for (int j = 0; j < W; j++) uu[j] = loadv(u + j * LANES), vv[j] = loadv(v + j * LANES);
    for (i64 i = 0; i < keys; i++) {
        /* Before the stores, which the compiler must take for possible changes of these rows. */
        vf ei = splat(e[i]), ai = splat(a[i]), ki = splat(k[i]);
        vf qi = splat(q ? q[i] : 0), bi = splat(next_b ? next_b[i] : 0);
        for (int j = 0; j < W; j++) {
            vf s = loadv(from + i * stride + j * LANES);
            s = s * ei + uu[j] * ai + vv[j] * ki;
            storev(to + i * stride + j * LANES, s);
            if (q) sum_o[j] += s * qi;
            if (next_b) sum_u[j] += s * bi;
        }
    }
    for (int j = 0; j < W; j++) {
        if (q) storev(o + j * LANES, sum_o[j]);
        if (next_b) storev(next_u + j * LANES, sum_u[j]);
    }
}
