/* A call, its positions, the part of it that is one task, and rows of it. */
#pragma once
#include "vec.h"

/* FEW: numbers, FEW_STEPS: channels of a step, below which waking threads takes longer than the work. */
enum { SEGMENT = 256, BLOCK = 512, TILE = 8, MOST_TAPS = 16, FEW = 1 << 14, FEW_STEPS = 1 << 13 };
#define UNROLL _Pragma("GCC unroll 16")

typedef struct {
    const char *x, *initial;
    const float *weight, *bias; /* weight: (W, D), turned */
    const uint8_t *codes;
    const i64 *steps, *counts; /* positions of each batch row; NULL: they are the steps */
    i64 batch, time, width, taps, most, silu, bf16;
    i64 stream; /* whether the output goes past the caches */
} Conv;

INLINE vf conv_load(const void *row, i64 c, int bf16) {
#ifdef __AVX512F__
    if (bf16) /* GCC 12 makes four instructions of what load_bf16 says */
        return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(*(const __m256i_u *)((const uint16_t *)row + c)), 16);
#endif
    return bf16 ? load_bf16((const uint16_t *)row + c) : loadv((const float *)row + c);
}
INLINE void conv_store(void *row, i64 c, vf x, int bf16, i64 stream) {
#ifdef __AVX512BF16__
    if (bf16) { /* one instruction, where store_bf16 takes a dozen; it takes subnormal numbers for zero */
        __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)x);
        if (stream) _mm256_stream_si256((__m256i *)((uint16_t *)row + c), half);
        else _mm256_storeu_si256((__m256i_u *)((uint16_t *)row + c), half);
        return;
    }
#endif
    if (stream) stream_lanes(row, c, x, bf16);
    else if (bf16) store_bf16((uint16_t *)row + c, x);
    else storev((float *)row + c, x);
}

/* 1 / (1 + exp(-z)) to float32's accuracy, at least 2^-126; nan gives some number. */
INLINE vf logistic(vf z) {
    vf x = z * -1.44269504088896341f, high = splat(126.0f), low = splat(-126.0f);
    x = selectv(x > high, high, x);
    return 1.0f / (1.0f + exp2v_within(selectv(x < low, low, x)));
}

/* Positions of a batch row: into `steps` (where not NULL) the step of each, -1 for one of zeros; returns how many. */
static i64 list_positions(const uint8_t *codes, i64 time, i64 taps, i64 *steps) {
    i64 count = 0;
    for (i64 t = 0; t < time; t++) {
        if (codes[t] == SKIPPED) continue;
        for (i64 i = 1; codes[t] == BEGINS && i < taps; i++, count++)
            if (steps) steps[count] = -1;
        if (steps) steps[count] = t;
        count++;
    }
    return count;
}

/* Fills the parts of `conv` that follow from its tensors; returns the memory that it points to. */
static float *prepare(Conv *conv, const float *weight, void *output) {
    i64 rows = conv->batch * conv->time;
    huge_pages(output, rows * conv->width * (conv->bf16 ? 2 : 4));
    conv->stream = streamable(output, rows, conv->width, (int)conv->bf16);
    i64 room = 0, *counts = NULL;
    conv->most = conv->time;
    if (conv->codes) {
        counts = (i64 *)scratch(2 * conv->batch);
        conv->most = 0;
        for (i64 b = 0; b < conv->batch; b++) {
            counts[b] = list_positions(conv->codes + b * conv->time, conv->time, conv->taps, NULL);
            conv->most = MAX(conv->most, counts[b]);
        }
        room = 2 * conv->batch * (1 + conv->most);
    }
    float *memory = scratch(room + conv->width * conv->taps), *turned = memory + room;
    if (conv->codes) {
        i64 *steps = (i64 *)memory + conv->batch;
        memcpy(memory, counts, (size_t)conv->batch * sizeof(i64));
        for (i64 b = 0; b < conv->batch; b++)
            list_positions(conv->codes + b * conv->time, conv->time, conv->taps, steps + b * conv->most);
        conv->counts = (const i64 *)memory;
        conv->steps = steps;
        free(counts);
    }
    for (i64 d = 0; d < conv->width; d++)
        for (i64 i = 0; i < conv->taps; i++) turned[i * conv->width + d] = weight[d * conv->taps + i];
    conv->weight = turned;
    return memory;
}

/* Blocks of channels: BLOCK each, the last one also takes what is left. */
static i64 block_count(i64 width) { return MAX(1, width / BLOCK); }
static i64 block_end(i64 block, i64 width) { return block + 1 == block_count(width) ? width : (block + 1) * BLOCK; }
static i64 segment_count(const Conv *conv) { return MAX(1, (conv->most + SEGMENT - 1) / SEGMENT); }

/* What a task works on: n channels from `first` of batch row b. */
typedef struct {
    i64 b, first, n, count, size; /* count: positions of the row; size: bytes of a number */
    const i64 *steps;
    const char *x, *zeros, *past; /* past: rows of the initial state, oldest first */
} Part;

static Part part_of(const Conv *conv, i64 b, i64 block) {
    i64 first = block * BLOCK, size = conv->bf16 ? 2 : 4;
    return (Part){.b = b,
                  .first = first,
                  .n = block_end(block, conv->width) - first,
                  .count = conv->counts ? conv->counts[b] : conv->time,
                  .size = size,
                  .steps = conv->steps ? conv->steps + b * conv->most : NULL,
                  .x = conv->x + (b * conv->time * conv->width + first) * size};
}

/* The row of position p in a (B, T, D) tensor whose rows of this part begin at `base`; `none` where p is no step. */
INLINE char *row_at(const Conv *conv, const Part *part, const char *base, i64 p, const char *none) {
    if (p < 0 || p >= part->count) return (char *)none;
    i64 step = part->steps ? part->steps[p] : p;
    return (char *)(step < 0 ? none : base + step * conv->width * part->size);
}
INLINE const char *input_at(const Conv *conv, const Part *part, i64 p) {
    if (p < 0) return part->past + (p + conv->taps - 1) * part->n * part->size;
    return row_at(conv, part, part->x, p, part->zeros);
}

/* A state (B, D, W-1) from and to W-1 rows of n channels; NULL stands for zeros. */
static void read_state(const Conv *conv, const Part *part, const char *state, char *rows) {
    i64 kept = conv->taps - 1, size = part->size;
    if (!state) {
        memset(rows, 0, (size_t)(kept * part->n * size));
        return;
    }
    state += (part->b * conv->width + part->first) * kept * size;
    for (i64 i = 0; i < kept; i++)
        for (i64 d = 0; d < part->n; d++)
            memcpy(rows + (i * part->n + d) * size, state + (d * kept + i) * size, (size_t)size);
}
static void write_state(const Conv *conv, const Part *part, const char *const *rows, char *state) {
    i64 kept = conv->taps - 1, size = part->size;
    state += (part->b * conv->width + part->first) * kept * size;
    for (i64 i = 0; i < kept; i++)
        for (i64 d = 0; d < part->n; d++) memcpy(state + (d * kept + i) * size, rows[i] + d * size, (size_t)size);
}

/* Zeros at the skipped steps of one of `segments` shares of the time. */
static void zero_skipped(const Conv *conv, const Part *part, i64 segment, i64 segments, char *tensor) {
    if (!conv->codes) return;
    for (i64 t = segment * conv->time / segments; t < (segment + 1) * conv->time / segments; t++)
        if (conv->codes[part->b * conv->time + t] == SKIPPED)
            zero_row(tensor, (part->b * conv->time + t) * conv->width + part->first, part->n, (int)conv->bf16);
}

/* z of TILE positions in the LANES channels from c; inputs[j + i] is that of tap i for position j. */
INLINE void convolve(const Conv *conv, const Part *part, const vf *inputs, i64 c, vf *z, const i64 taps) {
    vf bias = conv->bias ? loadv(conv->bias + part->first + c) : splat(0);
    UNROLL for (i64 j = 0; j < TILE; j++) z[j] = bias;
    UNROLL for (i64 i = 0; i < taps; i++) {
        vf weight = loadv(conv->weight + i * conv->width + part->first + c);
        UNROLL for (i64 j = 0; j < TILE; j++) z[j] += weight * inputs[j + i];
    }
}

/* The same channels of the next tile's rows: a row is a page, and processors do not foresee beyond one. */
INLINE void fetch(const char *const *next, i64 c, const int bf16) {
    UNROLL for (i64 j = 0; j < TILE; j++) __builtin_prefetch(next[j] + c * (bf16 ? 2 : 4), 0, 2);
}
