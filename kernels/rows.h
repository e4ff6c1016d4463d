/* Rows of keys and values in float32, bfloat16, or in 8 or 4 bits, and softmax attention over some of them: what the
 * steps of layers with a bounded number of exact tokens have in common. */
#ifndef RNNZOO_ROWS_H
#define RNNZOO_ROWS_H

#include "vec.h"

enum { FLOAT32 = 0, BFLOAT16 = 1, EIGHT_BITS = 2, FOUR_BITS = 3 };
enum { PART = 128 }; /* most rows that `sum_part` takes at once */

typedef int8_t vb_any __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint8_t vub_any __attribute__((vector_size(16), aligned(1), may_alias));

/* Rows of `width` numbers. Packed ones: codes, and one exponent for each block of 32 (of the width, if 32 does not divide
 * it); with 4 bits the first half of the row is in the low bits. See kernels/block_floating_point.py. */
typedef struct {
    void *data;
    int8_t *exponents;
    i64 width, block, kind;
} Rows;

static Rows rows_of(void *data, int8_t *exponents, i64 width, i64 kind) {
    return (Rows){data, exponents, width, width % 32 ? width : 32, kind};
}

INLINE float power_of_two(int exponent) {
    int32_t bits = MAX(exponent + 127, 1) << 23;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static void read_row(const Rows *rows, i64 at, float *to) {
    i64 n = rows->width;
    if (rows->kind <= BFLOAT16) {
        load_row(to, rows->data, at * n, n, (int)rows->kind);
        return;
    }
    const int8_t *exponents = rows->exponents + at * (n / rows->block);
    if (rows->kind == EIGHT_BITS) {
        const int8_t *codes = (const int8_t *)rows->data + at * n;
        i64 i = 0;
        for (; i + LANES <= n && n % 32 == 0; i += LANES)
            storev(to + i, __builtin_convertvector(*(const vb_any *)(codes + i), vf) * power_of_two(exponents[i / 32]));
        for (; i < n; i++) to[i] = (float)codes[i] * power_of_two(exponents[i / rows->block]);
    } else {
        const uint8_t *codes = (const uint8_t *)rows->data + at * (n / 2);
        i64 half = n / 2, i = 0;
        for (; i + LANES <= half && half % 32 == 0; i += LANES) {
            vi both = (vi)__builtin_convertvector(*(const vub_any *)(codes + i), vu);
            storev(to + i, __builtin_convertvector((both << 28) >> 28, vf) * power_of_two(exponents[i / 32]));
            vf high = __builtin_convertvector((both << 24) >> 28, vf);
            storev(to + half + i, high * power_of_two(exponents[(half + i) / 32]));
        }
        for (; i < half; i++) {
            to[i] = (float)((int8_t)(codes[i] << 4) >> 4) * power_of_two(exponents[i / rows->block]);
            to[half + i] = (float)((int8_t)codes[i] >> 4) * power_of_two(exponents[(half + i) / rows->block]);
        }
    }
    for (i64 i = n; i % LANES; i++) to[i] = 0;
}

/* `from` rounded to what the row can hold; the same numbers as `pack` in kernels/block_floating_point.py. */
static void write_row(const Rows *rows, i64 at, const float *from) {
    i64 n = rows->width;
    if (rows->kind <= BFLOAT16) {
        store_row(rows->data, at * n, from, n, (int)rows->kind);
        return;
    }
    int top = rows->kind == EIGHT_BITS ? 127 : 7;
    int codes[n];
    for (i64 first = 0; first < n; first += rows->block) {
        float largest = 0;
        for (i64 i = first; i < first + rows->block; i++) largest = MAX(largest, fabsf(from[i]));
        int exponent;
        float mantissa = frexpf(largest / (float)top, &exponent);
        exponent -= mantissa == 0.5f;
        exponent = MIN(MAX(exponent, -126), 120);
        for (i64 i = first; i < first + rows->block; i++) {
            float code = rintf(from[i] * power_of_two(-exponent));
            codes[i] = (int)MIN(MAX(code, (float)-top), (float)top);
        }
        rows->exponents[at * (n / rows->block) + first / rows->block] = (int8_t)exponent;
    }
    if (rows->kind == EIGHT_BITS)
        for (i64 i = 0; i < n; i++) ((int8_t *)rows->data)[at * n + i] = (int8_t)codes[i];
    else
        for (i64 i = 0; i < n / 2; i++)
            ((uint8_t *)rows->data)[at * (n / 2) + i] = (uint8_t)((codes[i] & 15) | ((codes[n / 2 + i] & 15) << 4));
}

/* Adds rows [first, first + n) of a ring (or the sinks) to a part: its queries' largest scores, then sums of weights and
 * weighted values relative to it. `inside` says which rows count. sums: G x (values + LANES), the weight's sum at the end. */
static void sum_part(i64 group, float scale, const float *query, const Rows *k, const Rows *v, i64 first, i64 n,
                     const uint8_t *inside, float *largest, float *sums, float *room) {
    i64 keys = PADDED(k->width), values = PADDED(v->width);
    float *scores = room, *tile = scores + group * PART; /* tile: 16 rows of keys or values */
    i64 padded = PADDED(n);
    for (i64 r = 0; r < padded; r += LANES) {
        for (i64 i = 0; i < LANES; i++)
            if (r + i < n && inside[r + i]) read_row(k, first + r + i, tile + i * keys);
            else memset(tile + i * keys, 0, (size_t)keys * 4);
        for (i64 g = 0; g < group; g++) {
            vf products[LANES];
            for (i64 i = 0; i < LANES; i++) {
                vf sum = splat(0);
                for (i64 d = 0; d < keys; d += LANES) sum += loadv(tile + i * keys + d) * loadv(query + g * keys + d);
                products[i] = sum;
            }
            storev(scores + g * PART + r, sum_rows(products) * scale);
        }
    }
    for (i64 g = 0; g < group; g++) {
        float most = -INFINITY, *own = scores + g * PART;
        for (i64 r = 0; r < padded; r++) {
            if (r >= n || !inside[r]) own[r] = -INFINITY;
            most = MAX(most, own[r]);
        }
        largest[g] = most;
        float shift = most == -INFINITY ? 0 : most;
        for (i64 r = 0; r < padded; r += LANES) storev(own + r, expv(loadv(own + r) - shift));
        memset(sums + g * (values + LANES), 0, (size_t)(values + LANES) * 4);
        float total = 0;
        for (i64 r = 0; r < n; r++) total += own[r];
        sums[g * (values + LANES) + values] = total;
    }
    for (i64 r = 0; r < n; r++) {
        if (!inside[r]) continue;
        read_row(v, first + r, tile);
        for (i64 g = 0; g < group; g++) {
            vf weight = splat(scores[g * PART + r]);
            float *sum = sums + g * (values + LANES);
            for (i64 i = 0; i < values; i += LANES) storev(sum + i, loadv(sum + i) + weight * loadv(tile + i));
        }
    }
}

#endif
