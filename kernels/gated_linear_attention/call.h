/* What a call is given. */
#pragma once
#include "vec.h"

enum { CHUNK = 64, SEGMENT = 16 };
enum { NO_DECAY, CONSTANT, PER_HEAD, PER_CHANNEL };
#define SMALLEST 1e-7f
#define PARALLEL_STEP 65536 /* numbers in the state from which a step is worth waking threads */

typedef struct {
    const void *q, *k, *v;
    const float *g, *bonus;
    const uint8_t *codes;
    i64 batch, time, heads, kv_heads, key, value, columns, kr, vr; /* kr, vr: padded rows */
    float scale;
    int decay, normalize, bf16;
} Call;
