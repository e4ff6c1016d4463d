/* A call, the steps of a chunk, blocks of channels as lanes, and decays. */
#pragma once
#include "vec.h"

enum { CHUNK = 32, TILE = 4 };
static const float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

typedef struct {
    const void *x, *dt, *b, *c;
    const float *a, *d;
    const uint8_t *codes;
    i64 batch, time, width, states, bf16;
    i64 chunks, blocks, padded;      /* of steps; of 16 channels; state numbers as whole tiles */
    i64 groups, blocks_a_group;      /* of channels */
    i64 stream;                      /* whether (B, T, D) outputs go past the caches */
} Scan;

static Scan scan_of(const void *x, const void *dt, const float *a, const void *b, const void *c, const float *d,
                    const uint8_t *codes, i64 batch, i64 time, i64 width, i64 states, i64 bf16) {
    Scan s = {x, dt, b, c, a, d, codes, batch, time, width, states, bf16};
    s.chunks = (time + CHUNK - 1) / CHUNK, s.blocks = (width + LANES - 1) / LANES;
    s.padded = (states + TILE - 1) / TILE * TILE;
    s.groups = 1;
    /* Up to 8 groups of two blocks or more, 16 of four: each costs memory for its sums. */
    while (2 * s.groups * (s.groups < 8 ? 2 : 4) <= s.blocks && s.groups < 16) s.groups *= 2;
    s.blocks_a_group = (s.blocks + s.groups - 1) / s.groups;
    s.groups = (s.blocks + s.blocks_a_group - 1) / s.blocks_a_group;
    return s;
}

/* The valid steps of a chunk, an even number of them: an appended step has dt = x = B = C = 0 and changes nothing. */
typedef struct {
    i64 count, even, at[CHUNK]; /* at: row of the (B T, ...) tensors */
    uint8_t begins[CHUNK];
    float *b, *c;               /* (CHUNK, padded) */
} Steps;

static void load_steps(Steps *steps, const Scan *s, i64 batch, i64 chunk) {
    i64 start = batch * s->time + chunk * CHUNK, stop = MIN(start + CHUNK, (batch + 1) * s->time), n = 0;
    for (i64 t = start; t < stop; t++) {
        int code = s->codes ? s->codes[t] : CONTINUES;
        if (code == SKIPPED) continue;
        steps->at[n] = t, steps->begins[n] = code == BEGINS;
        float row[PADDED(s->states)];
        load_row(row, s->b, t * s->states, s->states, (int)s->bf16);
        memcpy(steps->b + n * s->padded, row, (size_t)s->states * 4);
        load_row(row, s->c, t * s->states, s->states, (int)s->bf16);
        memcpy(steps->c + n * s->padded, row, (size_t)s->states * 4);
        n++;
    }
    steps->count = n, steps->even = (n + 1) / 2 * 2;
    if (n % 2) {
        steps->begins[n] = 0;
        memset(steps->b + n * s->padded, 0, (size_t)s->padded * 4);
        memset(steps->c + n * s->padded, 0, (size_t)s->padded * 4);
    }
}

/* One vector of 16 channels a step, from or to a (B, T, D) tensor. */
static void load_channels(vf *rows, const void *tensor, const Steps *steps, const Scan *s, i64 block) {
    i64 first = block * LANES, n = MIN(LANES, s->width - first);
    for (i64 t = 0; t < steps->count; t++) load_row((float *)(rows + t), tensor, steps->at[t] * s->width + first, n, (int)s->bf16);
    if (steps->count % 2) rows[steps->count] = splat(0);
}
static void store_channels(void *tensor, const vf *rows, const Steps *steps, const Scan *s, i64 block) {
    i64 first = block * LANES, n = MIN(LANES, s->width - first);
    for (i64 t = 0; t < steps->count; t++) {
        i64 at = steps->at[t] * s->width + first;
        if (s->stream) stream_lanes(tensor, at, rows[t], 0);
        else store_row(tensor, at, (const float *)(rows + t), n, (int)s->bf16);
    }
}
/* Of float32 alone: 16 numbers in bfloat16 are half a cache line, and half lines are slow to write past the caches. */
static i64 streams(const void *tensor, const Scan *s) {
    return !s->bf16 && streamable(tensor, s->batch * s->time, s->width, 0);
}
/* What the next chunk of a block reads. It lies far apart, and hardware does not guess it; asked for all at once it would
 * fill the queues for half of a chunk's time, so each tile asks for its share, a line a step. */
enum { AHEAD = 6 };
typedef struct {
    const char *at[AHEAD];
    i64 stride[AHEAD], count;
} Ahead;

static void look_ahead(Ahead *ahead, const void *tensor, const Scan *s, i64 batch, i64 chunk, i64 block) {
    i64 size = s->bf16 ? 2 : 4, first = (batch * s->time + chunk * CHUNK) * s->width + block * LANES;
    ahead->at[ahead->count] = (const char *)tensor + first * size;
    ahead->stride[ahead->count++] = s->width * size;
}
INLINE void fetch(const Ahead *ahead, i64 t, i64 from, i64 padded) {
    for (i64 i = from / TILE; i < ahead->count; i += padded / TILE)
        __builtin_prefetch(ahead->at[i] + t * ahead->stride[i], 0, 2);
}
static void zero_skipped(void *tensor, const Scan *s, i64 batch, i64 chunk, i64 first_block, i64 stop_block) {
    i64 start = batch * s->time + chunk * CHUNK, stop = MIN(start + CHUNK, (batch + 1) * s->time);
    i64 first = first_block * LANES, n = MIN(stop_block * LANES, s->width) - first;
    for (i64 t = start; s->codes && t < stop; t++)
        if (s->codes[t] == SKIPPED) zero_row(tensor, t * s->width + first, n, (int)s->bf16);
}

/* A (D, N) matrix as (N padded, 16) lanes of one block of channels, times `factor`; and back. */
static void lanes_of_matrix(vf *lanes, const float *matrix, float factor, const Scan *s, i64 block) {
    i64 first = block * LANES, n = MIN(LANES, s->width - first);
    memset(lanes, 0, (size_t)s->padded * sizeof(vf));
    for (i64 i = 0; matrix && i < n; i++)
        for (i64 j = 0; j < s->states; j++) ((float *)(lanes + j))[i] = matrix[(first + i) * s->states + j] * factor;
}
static void matrix_of_lanes(float *matrix, const vf *lanes, const Scan *s, i64 block) {
    i64 first = block * LANES, n = MIN(LANES, s->width - first);
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < s->states; j++) matrix[(first + i) * s->states + j] = ((const float *)(lanes + j))[i];
}

/* D of a block of channels; zeros without one. */
static vf skip_of(const Scan *s, i64 block) {
    vf skip = splat(0);
    if (s->d) load_row((float *)&skip, s->d, block * LANES, MIN(LANES, s->width - block * LANES), 0);
    return skip;
}

INLINE vf absv(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE int all(vi condition) {
    uint64_t pairs[LANES / 2], both = ~(uint64_t)0;
    memcpy(pairs, &condition, sizeof pairs);
    for (int i = 0; i < LANES / 2; i++) both &= pairs[i];
    return both == ~(uint64_t)0;
}
/* Largest |A| of each channel, and whether no exponent of this chunk leaves the range of `exp2v_within`. */
static vf largest(const vf *a, const Scan *s) {
    vf top = splat(0);
    for (i64 j = 0; j < s->padded; j++) top = maxv(absv(a[j]), top);
    return top;
}
static int is_small(const vf *dt, vf top, const Steps *steps) {
    vf most = splat(0);
    for (i64 t = 0; t < steps->count; t++) most = maxv(absv(dt[t]), most);
    return all(most * top < 126.0f);
}
/* exp(dt A); a is A / ln 2. */
INLINE vf decay(vf dt, vf a, const int small) { return small ? exp2v_within(dt * a) : exp2v(dt * a); }

/* Scratch of one task: A and states of its blocks, B and C of a chunk. */
static Steps steps_in(float *room, const Scan *s) { return (Steps){.b = room, .c = room + CHUNK * s->padded}; }
