/* Tasks back, and the sums over them. */
#pragma once
#include "parts.h"

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

INLINE void all_backward(const Conv *conv, const char *dy, const char *dfinal, char *dx, char *dinitial, float *sums,
                         i64 threads, const i64 taps, const int bf16) {
    i64 blocks = block_count(conv->width), segments = segment_count(conv);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < conv->batch * segments * blocks; task++)
        backward_task(conv, task / blocks / segments, task / blocks % segments, task % blocks, dy, dfinal, dx, dinitial,
                      sums + task / blocks * (taps + 1) * conv->width, taps, bf16);
}
