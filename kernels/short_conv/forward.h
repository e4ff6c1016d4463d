/* Tasks forward. */
#pragma once
#include "parts.h"

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

INLINE void all_forward(const Conv *conv, char *y, char *final, i64 threads, const i64 taps, const int bf16) {
    i64 blocks = block_count(conv->width), segments = segment_count(conv);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < conv->batch * segments * blocks; task++)
        forward_task(conv, task / blocks / segments, task / blocks % segments, task % blocks, y, final, taps, bf16);
}
