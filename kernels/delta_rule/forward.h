/* Groups of blocks through time. */
#pragma once
#include "rows.h"

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
