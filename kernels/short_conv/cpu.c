/* Short causal convolution on the CPU, forward and backward, and the one-token step.
 *
 * The work is bound by memory: forward reads x and writes y, backward reads x and dy and writes dx. Masks and documents
 * are taken out of the inner loops by a list of positions for each batch row: its valid steps in order, and W-1
 * positions that hold zeros before each document but the first. Position p sees positions p-W+1 .. p; those before 0 are the
 * initial state, the last W-1 are the final state. So the inner loops are plain convolutions over row pointers.
 *
 * One task is SEGMENT positions of a batch row and a block of channels, whatever the number of threads, and it goes
 * TILE positions at a time. With z = bias + sum_i weight_i x_{p-W+1+i}:
 *     dz = dy act'(z)     dx_p = sum_i weight_i dz_{p+W-1-i}     dweight_i = sum_p dz_p x_{p-W+1+i}     dbias = sum_p dz_p
 * z is made again in backward. The sums over p run within a task in float32 and over the tasks, in order, in double.
 *
 * (B, T, D) tensors and the states (B, D, W-1) are contiguous, float32 or bfloat16 (bf16 = 1); D >= LANES. The weight
 * (D, W) and the bias are float32; W <= MOST_TAPS.
 */
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

INLINE void forward_tile(const Conv *conv, const Part *part, const char *const *rows, const char *const *next,
                         char *const *to, const i64 taps, const int bf16) {
    for (i64 i = 0; i < part->n; i += LANES) {
        i64 c = MIN(i, part->n - LANES); /* the last vector begins early, so that there is no tail */
        fetch(next, c, bf16);
        vf z[TILE], inputs[TILE + MOST_TAPS - 1];
        UNROLL for (i64 m = 0; m < TILE + taps - 1; m++) inputs[m] = conv_load(rows[m], c, bf16);
        convolve(conv, part, inputs, c, z, taps);
        if (conv->silu)
            UNROLL for (i64 j = 0; j < TILE; j++) z[j] *= logistic(z[j]);
        UNROLL for (i64 j = 0; j < TILE; j++) conv_store(to[j], c, z[j], bf16, conv->stream);
    }
}

INLINE void forward_task(const Conv *conv, i64 b, i64 segment, i64 block, char *y, char *final, const i64 taps,
                         const int bf16) {
    Part part = part_of(conv, b, block);
    i64 kept = taps - 1, floats = PADDED(part.n), segments = segment_count(conv);
    char *memory = (char *)scratch((taps + 1) * floats), *unused = memory + floats * 4;
    part.zeros = memory, part.past = unused + floats * 4;
    read_state(conv, &part, conv->initial, (char *)part.past);
    char *base = y + (b * conv->time * conv->width + part.first) * part.size;
    for (i64 p = segment * SEGMENT; p < MIN(part.count, (segment + 1) * SEGMENT); p += TILE) {
        const char *rows[TILE + MOST_TAPS - 1], *next[TILE];
        char *to[TILE];
        for (i64 j = 0; j < TILE + kept; j++) rows[j] = input_at(conv, &part, p - kept + j);
        for (i64 j = 0; j < TILE; j++) to[j] = row_at(conv, &part, base, p + j, unused);
        for (i64 j = 0; j < TILE; j++) next[j] = input_at(conv, &part, p + TILE + j);
        forward_tile(conv, &part, rows, next, to, taps, bf16);
    }
    zero_skipped(conv, &part, segment, segments, y);
    if (segment == segments - 1) {
        const char *rows[MOST_TAPS];
        for (i64 i = 0; i < kept; i++) rows[i] = input_at(conv, &part, part.count - kept + i);
        write_state(conv, &part, rows, final);
    }
    if (conv->stream) stream_end();
    free(memory);
}

/* The sums of a task and what it hands from tile to tile, in vectors of LANES channels (the last vector overlaps the one
 * before, so they are not indexed by channel): `before`, dz of the last W-1 positions; `sums`, dweight and dbias. */
typedef struct {
    float *before, *sums, *unused_sums;
    i64 stride;
} Walk;

/* dz of TILE positions from p, and dx of the TILE positions from p - (W-1): for those, dz is complete. */
INLINE void backward_tile(const Conv *conv, const Part *part, const char *const *rows, const char *const *dy,
                          const char *const next[2][TILE], char *const *dx, const char *const *dfinal, const Walk *walk,
                          float *sums, const i64 taps, const int bf16) {
    for (i64 i = 0; i < part->n; i += LANES) {
        i64 c = MIN(i, part->n - LANES), kept = taps - 1;
        fetch(next[0], c, bf16), fetch(next[1], c, bf16);
        vf z[TILE], dz[TILE + MOST_TAPS - 1], inputs[TILE + MOST_TAPS - 1];
        vf dbias = loadv(sums + taps * walk->stride + i);
        UNROLL for (i64 m = 0; m < TILE + kept; m++) inputs[m] = conv_load(rows[m], c, bf16);
        UNROLL for (i64 m = 0; m < kept; m++) dz[m] = loadv(walk->before + m * walk->stride + i);
        UNROLL for (i64 j = 0; j < TILE; j++) dz[kept + j] = conv_load(dy[j], c, bf16);
        if (conv->silu) {
            convolve(conv, part, inputs, c, z, taps);
            UNROLL for (i64 j = 0; j < TILE; j++) {
                vf s = logistic(z[j]);
                dz[kept + j] *= s + z[j] * s * (1.0f - s);
            }
        }
        UNROLL for (i64 j = 0; j < TILE; j++) dbias += dz[kept + j];
        storev(sums + taps * walk->stride + i, dbias);
        UNROLL for (i64 j = 0; j < TILE; j++) z[j] = dfinal ? conv_load(dfinal[j], c, bf16) : splat(0);
        UNROLL for (i64 tap = 0; tap < taps; tap++) {
            vf weight = loadv(conv->weight + tap * conv->width + part->first + c), sum = splat(0);
            UNROLL for (i64 j = 0; j < TILE; j++) {
                z[j] += weight * dz[j + kept - tap];
                sum += dz[kept + j] * inputs[j + tap];
            }
            storev(sums + tap * walk->stride + i, loadv(sums + tap * walk->stride + i) + sum);
        }
        UNROLL for (i64 j = 0; j < TILE; j++) conv_store(dx[j], c, z[j], bf16, conv->stream);
        UNROLL for (i64 m = 0; m < kept; m++) storev(walk->before + m * walk->stride + i, dz[TILE + m]);
    }
}

/* dx, and into `sums` (W+1, D) this task's share of dweight (turned) and dbias. */
INLINE void backward_task(const Conv *conv, i64 b, i64 segment, i64 block, const char *dy, const char *dfinal, char *dx,
                          char *dinitial, float *sums, const i64 taps, const int bf16) {
    Part part = part_of(conv, b, block);
    i64 kept = taps - 1, floats = PADDED(part.n), row = part.n * part.size;
    i64 start = segment * SEGMENT, stop = MIN(part.count, start + SEGMENT), ending = part.count - kept < stop;
    float *memory = scratch(6 * taps * floats);
    Walk walk = {memory, memory + kept * floats, memory + 2 * taps * floats, floats};
    char *unused = (char *)(memory + (3 * taps + 1) * floats), *past = unused + floats * 4;
    char *early = past + kept * floats * 4, *late = early + kept * floats * 4;
    part.zeros = late + kept * floats * 4, part.past = past;
    read_state(conv, &part, conv->initial, past);
    if (ending) read_state(conv, &part, dfinal, late);
    i64 offset = (b * conv->time * conv->width + part.first) * part.size;
    for (i64 p = start; p < stop + kept; p += TILE) {
        const char *rows[TILE + MOST_TAPS - 1], *from[TILE], *beyond[TILE], *next[2][TILE];
        char *to[TILE];
        for (i64 j = 0; j < TILE + kept; j++) rows[j] = input_at(conv, &part, p - kept + j);
        for (i64 j = 0; j < TILE; j++) {
            i64 q = p - kept + j, after = q - (part.count - kept); /* dz of p + j completes dx of q */
            from[j] = row_at(conv, &part, dy + offset, p + j, part.zeros);
            to[j] = q >= stop || q < start ? unused : row_at(conv, &part, dx + offset, q, unused);
            if (q < 0 && segment == 0) to[j] = early + (q + kept) * row;
            beyond[j] = after >= 0 && after < kept ? late + after * row : part.zeros;
            next[0][j] = input_at(conv, &part, p + TILE + j);
            next[1][j] = row_at(conv, &part, dy + offset, p + TILE + j, part.zeros);
        }
        /* Positions from `stop` on are another task's: only their dz is needed here. */
        backward_tile(conv, &part, rows, from, (const char *const(*)[TILE])next, to, ending ? beyond : NULL, &walk,
                      p < stop ? walk.sums : walk.unused_sums, taps, bf16);
    }
    zero_skipped(conv, &part, segment, segment_count(conv), dx);
    if (segment == 0) {
        const char *rows[MOST_TAPS];
        for (i64 i = 0; i < kept; i++) rows[i] = early + i * row;
        write_state(conv, &part, rows, dinitial);
    }
    for (i64 tap = 0; tap <= taps; tap++)
        for (i64 i = 0; i < part.n; i += LANES)
            storev(sums + tap * conv->width + part.first + MIN(i, part.n - LANES), loadv(walk.sums + tap * floats + i));
    if (conv->stream) stream_end();
    free(memory);
}

/* dweight (D, W) and dbias (D) from the sums of all tasks of a channel, in order. */
static void add_sums(const float *sums, i64 tasks, i64 width, i64 taps, float *dweight, float *dbias, i64 threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 first = 0; first < width; first += LANES) {
        i64 n = MIN(LANES, width - first);
        for (i64 tap = 0; tap <= taps; tap++) {
            double total[LANES] = {0};
            for (i64 task = 0; task < tasks; task++)
                for (i64 d = 0; d < n; d++) total[d] += sums[(task * (taps + 1) + tap) * width + first + d];
            for (i64 d = 0; d < n; d++) {
                if (tap < taps) dweight[(first + d) * taps + tap] = (float)total[d];
                else dbias[first + d] = (float)total[d];
            }
        }
    }
}

INLINE void all_forward(const Conv *conv, char *y, char *final, i64 threads, const i64 taps, const int bf16) {
    i64 blocks = block_count(conv->width), segments = segment_count(conv);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < conv->batch * segments * blocks; task++)
        forward_task(conv, task / blocks / segments, task / blocks % segments, task % blocks, y, final, taps, bf16);
}
INLINE void all_backward(const Conv *conv, const char *dy, const char *dfinal, char *dx, char *dinitial, float *sums,
                         i64 threads, const i64 taps, const int bf16) {
    i64 blocks = block_count(conv->width), segments = segment_count(conv);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < conv->batch * segments * blocks; task++)
        backward_task(conv, task / blocks / segments, task / blocks % segments, task % blocks, dy, dfinal, dx, dinitial,
                      sums + task / blocks * (taps + 1) * conv->width, taps, bf16);
}

void short_conv_forward(const void *x, const float *weight, const float *bias, const void *initial, const uint8_t *codes,
                        void *y, void *final, i64 batch, i64 time, i64 width, i64 taps, i64 silu, i64 threads, i64 bf16) {
    Conv conv = {.x = x, .initial = initial, .bias = bias, .codes = codes, .batch = batch, .time = time,
                 .width = width, .taps = taps, .silu = silu, .bf16 = bf16};
    float *memory = prepare(&conv, weight, y);
    if (batch * time * width <= FEW) threads = 1;
    if (taps == 4 && bf16) all_forward(&conv, y, final, threads, 4, 1);
    else if (taps == 4) all_forward(&conv, y, final, threads, 4, 0);
    else if (bf16) all_forward(&conv, y, final, threads, taps, 1);
    else all_forward(&conv, y, final, threads, taps, 0);
    free(memory);
}

void short_conv_backward(const void *x, const float *weight, const float *bias, const void *initial,
                         const uint8_t *codes, const void *dy, const void *dfinal, void *dx, float *dweight, float *dbias,
                         void *dinitial, i64 batch, i64 time, i64 width, i64 taps, i64 silu, i64 threads, i64 bf16) {
    Conv conv = {.x = x, .initial = initial, .bias = bias, .codes = codes, .batch = batch, .time = time,
                 .width = width, .taps = taps, .silu = silu, .bf16 = bf16};
    float *memory = prepare(&conv, weight, dx);
    i64 tasks = batch * segment_count(&conv);
    float *sums = scratch(tasks * (taps + 1) * width);
    if (batch * time * width <= FEW) threads = 1;
    if (taps == 4 && bf16) all_backward(&conv, dy, dfinal, dx, dinitial, sums, threads, 4, 1);
    else if (taps == 4) all_backward(&conv, dy, dfinal, dx, dinitial, sums, threads, 4, 0);
    else if (bf16) all_backward(&conv, dy, dfinal, dx, dinitial, sums, threads, taps, 1);
    else all_backward(&conv, dy, dfinal, dx, dinitial, sums, threads, taps, 0);
    add_sums(sums, tasks, width, taps, dweight, dbias, threads);
    free(sums);
    free(memory);
}

/* One step of decoding: x and y (B, D); the state (B, D, W-1) takes in x. The weight and the bias may be bfloat16 here. A
 * structure, because ctypes takes 0.15 microseconds for each argument, and a small step not many more for its work. */
typedef struct {
    const void *x, *weight, *bias; /* bias: (D,) or NULL */
    void *state, *y;
    i64 batch, width, taps, silu, bf16, bf16_weight, threads;
} Step;

enum { WIDE = 256 };
/* Channels first .. first + n of a batch row, n <= WIDE. */
INLINE void step_any(const Step *s, i64 row, i64 first, i64 n, const i64 taps, const int bf16) {
    float sums[WIDE], input[WIDE], past[WIDE * MOST_TAPS], taken[WIDE * MOST_TAPS];
    i64 kept = taps - 1, at = row * s->width + first;
    load_row(input, s->x, at, n, bf16);
    load_row(past, s->state, at * kept, n * kept, bf16);
    load_row(taken, s->weight, first * taps, n * taps, (int)s->bf16_weight);
    if (s->bias) load_row(sums, s->bias, first, n, (int)s->bf16_weight);
    else memset(sums, 0, sizeof sums);
    for (i64 d = 0; d < n; d++) {
        float sum = sums[d] + taken[d * taps + kept] * input[d];
        for (i64 i = 0; i < kept; i++) {
            sum += taken[d * taps + i] * past[d * kept + i];
            past[d * kept + i] = i + 1 < kept ? past[d * kept + i + 1] : input[d];
        }
        sums[d] = sum;
    }
    for (i64 d = 0; s->silu && d < n; d += LANES) storev(sums + d, loadv(sums + d) * logistic(loadv(sums + d)));
    store_row(s->state, at * kept, past, n * kept, bf16);
    store_row(s->y, at, sums, n, bf16);
}

#ifdef __AVX512F__
/* Sums of neighbours: lanes 2i + (2i + 1) of a, then those of b. */
INLINE vf pairs(vf a, vf b) {
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
/* LANES channels of four taps in registers. windows[i]: of four channels, the last three inputs and the new one, as the
 * weights lie; three of four lanes of all windows are the next state. (Elsewhere such permutations are many instructions.) */
INLINE void step_four(const Step *s, i64 row, i64 first, const int bf16, const int bf16_weight) {
    i64 at = row * s->width + first;
    vf x = conv_load(s->x, at, bf16), windows[4];
    windows[0] = PICK(conv_load(s->state, at * 3, bf16), x, 0, 1, 2, 16, 3, 4, 5, 17, 6, 7, 8, 18, 9, 10, 11, 19);
    windows[1] = PICK(conv_load(s->state, at * 3 + 12, bf16), x, 0, 1, 2, 20, 3, 4, 5, 21, 6, 7, 8, 22, 9, 10, 11, 23);
    windows[2] = PICK(conv_load(s->state, at * 3 + 24, bf16), x, 0, 1, 2, 24, 3, 4, 5, 25, 6, 7, 8, 26, 9, 10, 11, 27);
    windows[3] = PICK(conv_load(s->state, at * 3 + 32, bf16), x, 4, 5, 6, 28, 7, 8, 9, 29, 10, 11, 12, 30, 13, 14, 15, 31);
    store_lanes(s->state, at * 3, PICK(windows[0], windows[1], 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21),
                LANES, bf16);
    store_lanes(s->state, at * 3 + 16, PICK(windows[1], windows[2], 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26),
                LANES, bf16);
    store_lanes(s->state, at * 3 + 32, PICK(windows[2], windows[3], 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 30, 31),
                LANES, bf16);
    UNROLL for (int i = 0; i < 4; i++) windows[i] *= conv_load(s->weight, first * 4 + i * LANES, bf16_weight);
    vf z = pairs(pairs(windows[0], windows[1]), pairs(windows[2], windows[3]));
    if (s->bias) z += conv_load(s->bias, first, bf16_weight);
    conv_store(s->y, at, s->silu ? z * logistic(z) : z, bf16, 0);
}
#endif

INLINE void step_block(const Step *s, i64 row, i64 first, i64 n, const int bf16) {
    if (s->taps != 4) {
        step_any(s, row, first, n, s->taps, bf16);
        return;
    }
#ifdef __AVX512F__
    for (; n >= LANES; n -= LANES, first += LANES)
        if (s->bf16_weight) step_four(s, row, first, bf16, 1);
        else step_four(s, row, first, bf16, 0);
#endif
    if (n) step_any(s, row, first, n, 4, bf16);
}

void short_conv_step(const Step *s) {
    i64 blocks = (s->width + WIDE - 1) / WIDE, tasks = s->batch * blocks;
    i64 threads = s->batch * s->width < FEW_STEPS ? 1 : s->threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * WIDE, n = MIN(WIDE, s->width - first);
        if (s->bf16) step_block(s, row, first, n, 1);
        else step_block(s, row, first, n, 0);
    }
}
