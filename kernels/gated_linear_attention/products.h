/* Small matrix products: out = in * factors + a b, with a's element (r, d) at a[r * ra + d * da]. */
#pragma once
#include "vec.h"

/* Stops the compiler from reading x from memory again at each use: there are more arithmetic units than load units. */
#ifdef __AVX512F__
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define IN_REGISTER(x)
#endif

enum { FULL, LOWER, UPPER }; /* which part of a is not zero */
typedef struct {
    float *out;
    const float *in, *row_factor, *column_factor; /* NULL: in = 0, factors = 1 */
    i64 ld;
    const float *a;
    i64 ra, da;
    const float *b;
    i64 ldb;
} Product;

INLINE void tile(const int R, const int C, const Product *p, i64 r, i64 c, i64 first, i64 last) {
    vf acc[16];
    for (int i = 0; i < 16; i++) acc[i] = (vf){0};
    if (p->in) {
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) {
                vf x = loadv(p->in + (r + i) * p->ld + c + j * LANES);
                if (p->row_factor) x *= splat(p->row_factor[r + i]);
                if (p->column_factor) x *= loadv(p->column_factor + c + j * LANES);
                acc[i * C + j] = x;
            }
    }
    const float *a = p->a + r * p->ra + first * p->da, *b = p->b + first * p->ldb + c;
    i64 ra = p->ra, da = p->da, ldb = p->ldb;
    for (i64 d = first; d < last; d++, a += da, b += ldb) {
        vf row[4];
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) {
            row[j] = loadv(b + j * LANES);
            IN_REGISTER(row[j]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            vf x = splat(a[i * ra]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) acc[i * C + j] += x * row[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) storev(p->out + (r + i) * p->ld + c + j * LANES, acc[i * C + j]);
}

INLINE void tile_rows(const int C, const int R, const Product *p, i64 rows, i64 c, i64 depth, const int shape) {
    i64 r = 0;
#define ROWS(n)                                                                                   \
    for (; r + n <= rows; r += n)                                                                 \
        tile(n, C, p, r, c, shape == UPPER ? r : 0, shape == LOWER ? MIN(depth, r + n) : depth)
    if (R >= 8) ROWS(8);
    ROWS(4);
    ROWS(2);
    ROWS(1);
#undef ROWS
}

/* rows x columns (a multiple of LANES); with LOWER or UPPER, a is square. */
INLINE void product(const Product *p, i64 rows, i64 columns, i64 depth, const int shape) {
    i64 c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES) tile_rows(4, 4, p, rows, c, depth, shape);
    for (; c + 2 * LANES <= columns; c += 2 * LANES) tile_rows(2, 8, p, rows, c, depth, shape);
    for (; c < columns; c += LANES) tile_rows(1, 8, p, rows, c, depth, shape);
}
static __attribute__((noinline)) void multiply(const Product *p, i64 rows, i64 columns, i64 depth) {
    product(p, rows, columns, depth, FULL);
}
static __attribute__((noinline)) void multiply_lower(const Product *p, i64 rows, i64 columns, i64 depth) {
    product(p, rows, columns, depth, LOWER);
}
static __attribute__((noinline)) void multiply_upper(const Product *p, i64 rows, i64 columns, i64 depth) {
    product(p, rows, columns, depth, UPPER);
}

/* out (columns x PADDED(rows)) = transpose of in (rows x columns); both sizes are those of padded memory. */
static void transpose(float *out, const float *in, i64 rows, i64 columns) {
    for (i64 r = 0; r < rows; r += LANES)
        for (i64 c = 0; c < columns; c += LANES) {
            vf block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = loadv(in + (r + i) * columns + c);
            transpose_rows(block);
            for (int i = 0; i < LANES; i++) storev(out + (c + i) * rows + r, block[i]);
        }
}

/* y = x * f, row by row in padded memory. */
INLINE void scale_rows(float *restrict y, const float *restrict x, const float *restrict f, i64 n) {
    for (i64 i = 0; i < n; i += LANES) storev(y + i, loadv(x + i) * loadv(f + i));
}
INLINE void add_scaled(float *restrict y, float f, const float *restrict x, i64 n) {
    for (i64 i = 0; i < n; i += LANES) storev(y + i, loadv(y + i) + splat(f) * loadv(x + i));
}
