/* Delta rule S_t = (diag(exp g_t) + a_t b_t^T) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t on the CPU, forward and backward.
 *
 * A task is a head and a block of value columns, whose part of the state stays in the first-level cache. With u_t = b_t^T
 * S_{t-1} a step is S = e S + a u^T + k v^T (e = exp g), and the same pass over S reads o_t and the next step's u: five
 * multiply-adds an element of the state, which is what bounds the speed, and about what a chunk of matrix products costs.
 *
 * Backward goes through chunks of CHUNK steps from the last to the first. It makes the chunk's states again, from the one
 * that forward kept at its edge, into memory that stays in the second-level cache, and then carries the adjoint D back:
 *     D_t = P_t + q_t do_t^T     da = D u     dk = D v     dv = k D     du = a D     dq = S_t do
 *     P_{t-1} = e D + b du^T     db = S_{t-1} du           dg = e rowsum(D * S_{t-1})
 * The second line of step t and the first of step t-1 need the same S_{t-1}, so they are one pass.
 *
 * Only the valid steps of a chunk are loaded, as float32 rows, and numbered from 0; row -1 and row `count` stand for
 * nothing, so that the passes need no special case at the chunk's edges. Tensors are contiguous, float32 or bfloat16. */
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

/* A chunk of steps of one block. Its state s goes on; `next` is the head whose steps from `next_start` on come after it. */
INLINE void forward_block(const Call *c, const Rows *r, float *s, void *o, i64 head, i64 first, i64 n, i64 start, i64 stop,
                          i64 next_head, i64 next_start, const int W) {
    i64 b = head / c->heads, h = head % c->heads, keys = c->keys, stride = W * LANES;
    float rows[4][WIDEST * LANES] __attribute__((aligned(64))) = {0}, *u = rows[0], *next = rows[1], *v = rows[2];
    float *out = rows[3];
    read_state(u, r->b, s, stride, keys, W);
    for (i64 t = start; r->count < stop - start && t < stop; t++)
        for (i64 j = 0; j < c->groups; j++)
            zero_row(o, (((b * c->time + t) * c->heads + h) * c->groups + j) * c->values + first, n, (int)c->bf16);
    for (i64 p = 0; p < r->count; p++) {
        i64 position = (b * c->time + r->step[p]) * c->heads + h, at = p * r->stride;
        const float *q = r->q + at * c->groups;
        if (next_head != head || first == 0) prefetch_step(c, NULL, next_head, next_start + p);
        if (r->begins[p]) {
            memset(s, 0, (size_t)(keys * stride) * 4);
            memset(u, 0, (size_t)stride * 4);
        }
        load_row(v, c->v, position * c->values + first, n, (int)c->bf16);
        advance(s, s, stride, r->e + at, r->a + at, r->k + at, u, v, q, out, r->b + at + r->stride, next, keys, W);
        float *swap = u;
        u = next, next = swap;
        for (i64 j = 0; j < c->groups; j++) {
            if (j) read_state(out, q + j * r->stride, s, stride, keys, W);
            store_row(o, (position * c->groups + j) * c->values + first, out, n, (int)c->bf16);
        }
    }
}

/* Heads, or their blocks, that a thread takes through a chunk before the next chunk: their rows of a step are neighbours
 * in memory. Their states must fit into the second-level cache. */
static i64 group_size(i64 items, i64 threads) {
    i64 rounds = (items + 8 * threads - 1) / (8 * threads);
    return (items + threads * rounds - 1) / (threads * rounds);
}

static void forward_group(const Call *c, const float *initial, void *o, float *final, float *kept, i64 begin, i64 end) {
    i64 block = block_width(c), blocks = (c->values + block - 1) / block, matrix = c->keys * c->values;
    i64 size = c->keys * block, chunks = (c->time + CHUNK - 1) / CHUNK;
    Rows r = new_rows(c);
    float *states = scratch((end - begin) * size);
    for (i64 chunk = 0; chunk <= chunks; chunk++)
        for (i64 item = begin; item < end; item++) {
            i64 head = item / blocks, first = item % blocks * block, n = MIN(block, c->values - first);
            i64 stride = vectors(n) * LANES, start = chunk * CHUNK, stop = MIN(c->time, start + CHUNK);
            float *s = states + (item - begin) * size;
            if (chunk == 0 && initial) load_block(s, initial + head * matrix + first, c->keys, c->values, n, stride);
            if (chunk == chunks) {
                store_block(final + head * matrix + first, s, c->keys, c->values, n, stride);
                continue;
            }
            if (kept)
                store_block(kept + (head * chunks + chunk) * matrix + first, s, c->keys, c->values, n, stride);
            if (item == begin || first == 0) load_rows(&r, c, head, start, stop);
            i64 next_head = (item + 1 < end ? item + 1 : begin) / blocks, next_start = item + 1 < end ? start : stop;
            if (stride == 64) forward_block(c, &r, s, o, head, first, n, start, stop, next_head, next_start, 4);
            else if (stride == 32) forward_block(c, &r, s, o, head, first, n, start, stop, next_head, next_start, 2);
            else forward_block(c, &r, s, o, head, first, n, start, stop, next_head, next_start, 1);
        }
    free(states);
    free(r.memory);
}

static void forward(const Call *c, const float *initial, void *o, float *final, float *kept) {
    i64 block = block_width(c), items = c->batch * c->heads * ((c->values + block - 1) / block);
    i64 size = group_size(items, c->threads);
#pragma omp parallel for num_threads(c->threads) schedule(static)
    for (i64 begin = 0; begin < items; begin += size)
        forward_group(c, initial, o, final, kept, begin, MIN(items, begin + size));
}

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

/* kept: (B, Hk, chunks of 32 steps, K, V), or NULL. decay: 0 none, 1 g is (B, T, Hk, 1), 2 it is (B, T, Hk, K). */
void delta_rule_forward(const void *q, const void *k, const void *v, const void *a, const void *b, const float *g,
                        const float *initial, const uint8_t *codes, void *o, float *final, float *kept, i64 batch,
                        i64 time, i64 heads, i64 groups, i64 keys, i64 values, i64 decay, i64 bf16, i64 threads,
                        float scale) {
    Call c = {q, k, v, a, b, g, codes, batch, time, heads, groups, keys, values, decay, bf16, threads, scale};
    i64 chunks = (time + CHUNK - 1) / CHUNK;
    huge_pages(o, batch * time * heads * groups * values * (bf16 ? 2 : 4));
    if (kept) huge_pages(kept, batch * heads * chunks * keys * values * 4);
    forward(&c, initial, o, final, kept);
}

void delta_rule_backward(const void *q, const void *k, const void *v, const void *a, const void *b, const float *g,
                         const uint8_t *codes, const float *kept, const void *d_out, const float *d_final, void *dq,
                         void *dk, void *dv, void *da, void *db, float *dg, float *d_initial, i64 batch, i64 time,
                         i64 heads, i64 groups, i64 keys, i64 values, i64 decay, i64 bf16, i64 threads, float scale) {
    Call c = {q, k, v, a, b, g, codes, batch, time, heads, groups, keys, values, decay, bf16, threads, scale};
    Gradients to = {dq, dk, dv, da, db, dg, d_initial};
    i64 key_bytes = batch * time * heads * keys * (bf16 ? 2 : 4);
    void *tensors[] = {dk, da, db};
    for (int i = 0; i < 3; i++) huge_pages(tensors[i], key_bytes);
    huge_pages(dq, groups * key_bytes);
    huge_pages(dv, batch * time * heads * values * (bf16 ? 2 : 4));
    if (decay == CHANNEL_DECAY) huge_pages(dg, batch * time * heads * keys * 4);
    int split = batch * heads < threads;
    i64 size = split ? 1 : group_size(batch * heads, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (!split)
    for (i64 begin = 0; begin < batch * heads; begin += size)
        backward_group(&c, &to, kept, d_out, d_final, begin, MIN(batch * heads, begin + size), split);
}

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

/* One step in place on state (B, Hk, K, V); the other tensors have no time axis. */
void delta_rule_step(const void *q, const void *k, const void *v, const void *a, const void *b, const float *g,
                     float *states, void *o, i64 heads, i64 groups, i64 keys, i64 values, i64 decay, i64 bf16,
                     i64 threads, float scale) {
    Call call = {q, k, v, a, b, g, NULL, heads, 1, 1, groups, keys, values, decay, bf16, threads, scale}, *c = &call;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (i64 head = 0; head < heads; head++) {
        float room[4][PADDED(keys)] __attribute__((aligned(64))), *state = states + head * keys * values;
        load_decay(room[0], c, head, PADDED(keys));
        const float *rows[4] = {room[0], row_of(a, head * keys, keys, room[1], (int)bf16),
                                row_of(k, head * keys, keys, room[2], (int)bf16),
                                row_of(b, head * keys, keys, room[3], (int)bf16)};
        i64 first = 0;
        for (; first + 64 <= values; first += 64) step_block(c, rows, head, state + first, values, o, first, 64, 4);
        for (; first + 16 <= values; first += 16) step_block(c, rows, head, state + first, values, o, first, 16, 1);
        if (first == values) continue;
        float rest[keys][LANES];
        memset(rest, 0, sizeof rest);
        load_block(rest[0], state + first, keys, values, values - first, LANES);
        step_block(c, rows, head, rest[0], LANES, o, first, values - first, 1);
        store_block(state + first, rest[0], keys, values, values - first, LANES);
    }
}
