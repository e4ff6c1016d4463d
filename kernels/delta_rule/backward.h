/* Groups of blocks back through time. */
#pragma once
#include "forward.h"

/* What backward has of one block of columns, beside the chunk's rows. v, d_out and the sums are rows of the chunk. */
typedef struct {
    i64 first, n, stride;
    float *states, *zeros, *adjoint;             /* before and after each step; an empty one; D or P */
    float *v, *u, *d_out, *dv, *du;              /* value-wide; d_out has a row for each head of the group */
    float *dq, *dk, *da, *db, *dg;               /* key-wide: this block's part of the sums over the columns */
    float *more;                                 /* room for the dots of a group's other heads */
} Block;

/* One pass back: D = e D + b du^T + q do^T and everything that it and s = S_{t-1} tell. `at` is the later step's row. */
INLINE void retreat(const Block *x, const Rows *r, const float *s, i64 p, i64 groups, const int W, const int grouped) {
    i64 width = r->stride, later = p * width, earlier = later - width, column = p * x->stride;
    const float *du = x->du + column, *d_out = x->d_out + (column - x->stride) * groups;
    const float *u = x->u + column - x->stride, *v = x->v + column - x->stride, *q = r->q + earlier * groups;
    vf sum_v[WIDEST] = {0}, sum_u[WIDEST] = {0}, duu[WIDEST], dd[WIDEST];
    for (int j = 0; j < W; j++) duu[j] = loadv(du + j * LANES), dd[j] = loadv(d_out + j * LANES);
    for (i64 top = 0; top < width; top += LANES) {
        vf dot_g[LANES], dot_b[LANES], dot_q[LANES], dot_a[LANES], dot_k[LANES];
        for (int row = 0; row < LANES; row++) {
            i64 i = top + row;
            vf g = {0}, b = {0}, o = {0}, a = {0}, k = {0};
            float *adjoint = x->adjoint + i * W * LANES;
            const float *state = s + i * W * LANES;
            vf d[WIDEST], ei = splat(r->e[later + i]), bi = splat(r->b[later + i]), qi = splat(q[i]);
            vf ki = splat(r->k[earlier + i]), ai = splat(r->a[earlier + i]);
            for (int j = 0; j < W; j++) {
                vf y = loadv(state + j * LANES), before = loadv(adjoint + j * LANES);
                g += before * y, b += duu[j] * y, o += dd[j] * y;
                d[j] = before * ei + duu[j] * bi + dd[j] * qi;
            }
            for (i64 other = 1; grouped && other < groups; other++) {
                vf sum = {0};
                for (int j = 0; j < W; j++) {
                    vf with = loadv(d_out + (other * W + j) * LANES);
                    sum += with * loadv(state + j * LANES);
                    d[j] += with * splat(q[other * width + i]);
                }
                storev(x->more + (other * LANES + row) * LANES, sum);
            }
            for (int j = 0; j < W; j++) {
                storev(adjoint + j * LANES, d[j]);
                a += d[j] * loadv(u + j * LANES), k += d[j] * loadv(v + j * LANES);
                sum_v[j] += d[j] * ki, sum_u[j] += d[j] * ai;
            }
            dot_g[row] = g, dot_b[row] = b, dot_q[row] = o, dot_a[row] = a, dot_k[row] = k;
        }
        storev(x->dg + later + top, sum_rows(dot_g));
        storev(x->db + later + top, sum_rows(dot_b));
        storev(x->da + earlier + top, sum_rows(dot_a));
        storev(x->dk + earlier + top, sum_rows(dot_k));
        storev(x->dq + earlier * groups + top, sum_rows(dot_q));
        for (i64 other = 1; grouped && other < groups; other++)
            storev(x->dq + earlier * groups + other * width + top, sum_rows((vf *)(x->more + other * LANES * LANES)));
    }
    for (int j = 0; j < W; j++) {
        storev(x->dv + column - x->stride + j * LANES, sum_v[j]);
        storev(x->du + column - x->stride + j * LANES, sum_u[j]);
    }
}

INLINE void backward_block(const Call *c, const Block *x, const Rows *r, const float *kept, const void *d_out, void *dv,
                           i64 head, i64 next_head, i64 next_start, const int W, const int grouped) {
    i64 b = head / c->heads, h = head % c->heads, keys = c->keys, stride = W * LANES, size = r->stride * stride, n = r->count;
    load_block(x->states, kept + x->first, keys, c->values, x->n, stride);
    read_state(x->u, r->b, x->states, stride, keys, W);
    for (i64 p = 0; p < n; p++) {
        i64 position = (b * c->time + r->step[p]) * c->heads + h, at = p * r->stride;
        float *u = x->u + p * stride, *v = x->v + p * stride;
        load_row(v, c->v, position * c->values + x->first, x->n, (int)c->bf16);
        for (i64 j = 0; j < c->groups; j++)
            load_row(x->d_out + (p * c->groups + j) * stride, d_out, (position * c->groups + j) * c->values + x->first,
                     x->n, (int)c->bf16);
        if (r->begins[p]) memset(u, 0, (size_t)stride * 4);
        const float *from = r->begins[p] ? x->zeros : x->states + p * size;
        advance(x->states + (p + 1) * size, from, stride, r->e + at, r->a + at, r->k + at, u, v, NULL, NULL,
                r->b + at + r->stride, u + stride, keys, W);
    }
    memset(x->u + n * stride, 0, (size_t)stride * 4);
    memset(x->du + n * stride, 0, (size_t)stride * 4);
    for (i64 p = n; p >= 0; p--) {
        int begins = p < n && r->begins[p];
        if (x->first == 0) prefetch_step(c, d_out, next_head, next_start + p);
        if (begins) {
            memset(x->adjoint, 0, (size_t)size * 4);
            memset(x->du + p * stride, 0, (size_t)stride * 4);
        }
        retreat(x, r, x->states + p * size, p, c->groups, W, grouped);
        if (begins) {
            memset(x->db + p * r->stride, 0, (size_t)r->stride * 4);
            memset(x->dg + p * r->stride, 0, (size_t)r->stride * 4);
        }
    }
    for (i64 p = 0; p < n; p++) {
        i64 position = (b * c->time + r->step[p]) * c->heads + h;
        store_row(dv, position * c->values + x->first, x->dv + p * stride, x->n, (int)c->bf16);
    }
}

static void backward_width(const Call *c, const Block *x, const Rows *r, const float *kept, const void *d_out, void *dv,
                           i64 head, i64 next_head, i64 next_start) {
    int grouped = c->groups > 1;
    if (x->stride == 64 && grouped) backward_block(c, x, r, kept, d_out, dv, head, next_head, next_start, 4, 1);
    else if (x->stride == 64) backward_block(c, x, r, kept, d_out, dv, head, next_head, next_start, 4, 0);
    else if (x->stride == 32 && grouped) backward_block(c, x, r, kept, d_out, dv, head, next_head, next_start, 2, 1);
    else if (x->stride == 32) backward_block(c, x, r, kept, d_out, dv, head, next_head, next_start, 2, 0);
    else if (grouped) backward_block(c, x, r, kept, d_out, dv, head, next_head, next_start, 1, 1);
    else backward_block(c, x, r, kept, d_out, dv, head, next_head, next_start, 1, 0);
}

typedef struct {
    void *dq, *dk, *dv, *da, *db;
    float *dg, *d_initial;
} Gradients;

/* Floats of a block's memory, and, with `x`, its pointers into it. */
static i64 lay_block(Block *x, float *memory, const Call *c, i64 width) {
    i64 stride = x->stride, rows = CHUNK + 2, size = width * stride, at = 0;
    struct {
        float **field;
        i64 floats, ahead; /* ahead: floats before row 0 */
    } parts[] = {
        {&x->zeros, size, 0},
        {&x->v, rows * stride, stride},
        {&x->u, rows * stride, stride},
        {&x->dv, rows * stride, stride},
        {&x->du, rows * stride, stride},
        {&x->d_out, rows * stride * c->groups, stride * c->groups},
        {&x->dk, rows * width, width},
        {&x->da, rows * width, width},
        {&x->db, rows * width, width},
        {&x->dg, rows * width, width},
        {&x->dq, rows * width * c->groups, width * c->groups},
        {&x->more, c->groups * LANES * LANES, 0},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (memory) *parts[i].field = memory + at + parts[i].ahead;
        at += parts[i].floats;
    }
    return at;
}

/* Zeros for all steps of a chunk: those that are not there keep them. */
static void clear_rows(const Call *c, const Gradients *to, i64 head, i64 start, i64 stop) {
    i64 b = head / c->heads, h = head % c->heads;
    for (i64 t = start; t < stop; t++) {
        i64 position = (b * c->time + t) * c->heads + h;
        void *tensors[] = {to->dk, to->da, to->db};
        for (int i = 0; i < 3; i++) zero_row(tensors[i], position * c->keys, c->keys, (int)c->bf16);
        zero_row(to->dq, position * c->groups * c->keys, c->groups * c->keys, (int)c->bf16);
        zero_row(to->dv, position * c->values, c->values, (int)c->bf16);
        if (c->decay == HEAD_DECAY) to->dg[position] = 0;
        if (c->decay == CHANNEL_DECAY) zero_row(to->dg, position * c->keys, c->keys, 0);
    }
}

/* Sums the blocks' parts, first block first, and writes the rows. */
static void store_rows(const Call *c, const Gradients *to, const Rows *r, const Block *x, i64 blocks, i64 head) {
    i64 b = head / c->heads, h = head % c->heads, width = r->stride, keys = c->keys;
    int bf16 = (int)c->bf16;
    for (i64 i = 1; i < blocks; i++) {
        float *sums[] = {x->dk, x->da, x->db, x->dg, x->dq}, *parts[] = {x[i].dk, x[i].da, x[i].db, x[i].dg, x[i].dq};
        for (int j = 0; j < 5; j++)
            for (i64 at = 0; at < r->count * width * (j == 4 ? c->groups : 1); at++) sums[j][at] += parts[j][at];
    }
    for (i64 p = 0; p < r->count; p++) {
        i64 position = (b * c->time + r->step[p]) * c->heads + h, at = p * width;
        store_row(to->dk, position * keys, x->dk + at, keys, bf16);
        store_row(to->da, position * keys, x->da + at, keys, bf16);
        store_row(to->db, position * keys, x->db + at, keys, bf16);
        for (i64 j = 0; j < c->groups; j++) {
            float *dq = x->dq + (p * c->groups + j) * width;
            for (i64 i = 0; i < width; i++) dq[i] *= c->scale;
            store_row(to->dq, (position * c->groups + j) * keys, dq, keys, bf16);
        }
        if (c->decay == NO_DECAY) continue;
        vf sum = {0};
        for (i64 i = 0; i < width; i += LANES) {
            vf dg = loadv(x->dg + at + i) * loadv(r->e + at + i);
            storev(x->dg + at + i, dg);
            sum += dg;
        }
        if (c->decay == HEAD_DECAY) to->dg[position] = sumv(sum);
        else store_row(to->dg, position * keys, x->dg + at, keys, 0);
    }
}

static void backward_group(const Call *c, const Gradients *to, const float *kept, const void *d_out,
                           const float *d_final, i64 begin, i64 end, int split) {
    i64 chunks = (c->time + CHUNK - 1) / CHUNK, matrix = c->keys * c->values;
    i64 block = block_width(c), blocks = (c->values + block - 1) / block;
    Rows r = new_rows(c);
    i64 size = r.stride * block, states = (CHUNK + 1) * size;
    Block x[blocks];
    float *memory[blocks], *adjoints = scratch((end - begin) * blocks * size);
    float *history = scratch(states * (split ? blocks : 1)); /* one after another they can share it */
    for (i64 i = 0; i < blocks; i++) {
        x[i] = (Block){.first = i * block, .n = MIN(block, c->values - i * block)};
        x[i].stride = vectors(x[i].n) * LANES, x[i].states = history + (split ? i * states : 0);
        memory[i] = scratch(lay_block(&x[i], NULL, c, r.stride));
        lay_block(&x[i], memory[i], c, r.stride);
    }
    for (i64 chunk = chunks; chunk >= 0; chunk--)
        for (i64 head = begin; head < end; head++) {
            for (i64 i = 0; i < blocks; i++) {
                x[i].adjoint = adjoints + ((head - begin) * blocks + i) * size;
                i64 at = head * matrix + x[i].first;
                if (chunk == chunks) load_block(x[i].adjoint, d_final + at, c->keys, c->values, x[i].n, x[i].stride);
            }
            if (chunk == chunks) continue;
            i64 start = chunk * CHUNK, stop = MIN(c->time, start + CHUNK);
            i64 next_head = head + 1 < end ? head + 1 : begin, next_start = head + 1 < end ? start : start - CHUNK;
            load_rows(&r, c, head, start, stop);
            if (r.count < stop - start) clear_rows(c, to, head, start, stop);
            const float *edge = kept + (head * chunks + chunk) * matrix;
            if (r.count) {
#pragma omp parallel for num_threads(c->threads) schedule(static) if (split)
                for (i64 i = 0; i < blocks; i++)
                    backward_width(c, &x[i], &r, edge, d_out, to->dv, head, next_head, next_start);
            }
            store_rows(c, to, &r, x, blocks, head);
            for (i64 i = 0; i < blocks && chunk == 0; i++)
                store_block(to->d_initial + head * matrix + x[i].first, x[i].adjoint, c->keys, c->values, x[i].n,
                            x[i].stride);
        }
    for (i64 i = 0; i < blocks; i++) free(memory[i]);
    free(adjoints);
    free(history);
    free(r.memory);
}
