/* Vectors of 16 floats for the C backends, as GCC and clang know them on any processor: one AVX-512 register, two of AVX2,
 * four of NEON. Rows in scratch memory are padded to a multiple of LANES with zeros, so that inner loops have no tails;
 * `load_row` and `store_row` go between such rows and tensors of any width in float32 or bfloat16. */
#ifndef RNNZOO_VEC_H
#define RNNZOO_VEC_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef int64_t i64;
typedef float vf __attribute__((vector_size(64)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

/* What a step is: codes of `kernels/steps.py: step_codes`. NULL stands for CONTINUES everywhere. */
enum { CONTINUES = 0, BEGINS = 1, SKIPPED = 2 };

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf loadv(const float *p) { return *(const vf_any *)p; }
INLINE void storev(float *p, vf x) { *(vf_any *)p = x; }
INLINE vf selectv(vi condition, vf yes, vf no) { return (vf)((condition & (vi)yes) | (~condition & (vi)no)); }
INLINE vf maxv(vf a, vf b) { return selectv(a > b, a, b); }
INLINE vf minv(vf a, vf b) { return selectv(a < b, a, b); }

/* bfloat16 <-> float32, rounded to nearest even; nan stays nan. */
INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
INLINE vf load_bf16(const uint16_t *p) { return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16); }
INLINE void store_bf16(uint16_t *p, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu nan = (bits >> 16) | 0x40u;
    vu is_nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
    *(vh_any *)p = __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), vh);
}

/* n numbers from element `at` of a float32 (bf16 = 0) or bfloat16 tensor into a padded row, and back. */
INLINE void load_row(float *row, const void *tensor, i64 at, i64 n, int bf16) {
    i64 i = 0;
    if (bf16) {
        const uint16_t *p = (const uint16_t *)tensor + at;
        for (; i + LANES <= n; i += LANES) storev(row + i, load_bf16(p + i));
        for (; i < n; i++) row[i] = from_bf16(p[i]);
    } else {
        const float *p = (const float *)tensor + at;
        for (; i + LANES <= n; i += LANES) storev(row + i, loadv(p + i));
        for (; i < n; i++) row[i] = p[i];
    }
    for (; i % LANES; i++) row[i] = 0;
}
INLINE void store_row(void *tensor, i64 at, const float *row, i64 n, int bf16) {
    i64 i = 0;
    if (bf16) {
        uint16_t *p = (uint16_t *)tensor + at;
        for (; i + LANES <= n; i += LANES) store_bf16(p + i, loadv(row + i));
        for (; i < n; i++) p[i] = to_bf16(row[i]);
    } else {
        float *p = (float *)tensor + at;
        for (; i + LANES <= n; i += LANES) storev(p + i, loadv(row + i));
        for (; i < n; i++) p[i] = row[i];
    }
}
INLINE void zero_row(void *tensor, i64 at, i64 n, int bf16) {
    memset((char *)tensor + at * (bf16 ? 2 : 4), 0, (size_t)n * (bf16 ? 2 : 4));
}

/* The next 16 numbers from element `at` of a float32 or bfloat16 tensor, zeros from the n-th on; and back, n of them. */
INLINE vf load_lanes(const void *tensor, i64 at, i64 n, int bf16) {
    if (n >= LANES) return bf16 ? load_bf16((const uint16_t *)tensor + at) : loadv((const float *)tensor + at);
    float row[LANES] = {0};
    load_row(row, tensor, at, n, bf16);
    return loadv(row);
}
INLINE void store_lanes(void *tensor, i64 at, vf x, i64 n, int bf16) {
    if (n < LANES) {
        float row[LANES];
        storev(row, x);
        store_row(tensor, at, row, n, bf16);
    } else if (bf16) store_bf16((uint16_t *)tensor + at, x);
    else storev((float *)tensor + at, x);
}

/* The same past the caches, for outputs far larger than them: what is overwritten is not read first. The address must be
 * a multiple of the vector's size, and `stream_end` must follow before another thread reads. */
INLINE void stream_lanes(void *tensor, i64 at, vf x, int bf16) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    if (bf16) {
        vh half;
        store_bf16((uint16_t *)&half, x);
        _mm256_stream_si256((__m256i *)((uint16_t *)tensor + at), (__m256i)half);
    } else _mm512_stream_ps((float *)tensor + at, (__m512)x);
#else
    store_lanes(tensor, at, x, LANES, bf16);
#endif
}
INLINE void stream_end(void) {
#ifdef __AVX512F__
    _mm_sfence();
#endif
}
/* Whether a tensor of rows of `width` numbers is large enough, and aligned, for `stream_lanes`. */
INLINE int streamable(const void *tensor, i64 rows, i64 width, int bf16) {
    return (uintptr_t)tensor % 64 == 0 && width % LANES == 0 && rows * width * (bf16 ? 2 : 4) >= (i64)16 << 20;
}

/* Tells the system that a large output, not written yet, may lie on huge pages: 2 MB cost one fault, not 512. */
INLINE void huge_pages(void *tensor, i64 bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t page = (uintptr_t)2 << 20, first = ((uintptr_t)tensor + page - 1) / page * page;
    uintptr_t stop = ((uintptr_t)tensor + (uintptr_t)bytes) / page * page;
    if (bytes >= (i64)8 << 20 && stop > first) madvise((void *)first, stop - first, MADV_HUGEPAGE);
#endif
}

/* exp(x), relative error below 2.4e-7 (two units in the last place, measured): 2^n exp(r), |r| <= ln(2)/2, exp(r) by a polynomial of degree 6.
 * exp(x < -87.3) is 0, exp(x > 88.7) is infinite, exp(nan) is nan. */
INLINE vf expv(vf x) {
    vf low = splat(-87.33f), high = splat(88.72f);
    vf clamped = minv(maxv(x, low), high);
    vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf n = (clamped * 1.44269504088896341f + magic) - magic;
    vf r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.3888949086e-3f);
    p = p * r + 8.3333691e-3f;
    p = p * r + 4.1666664e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi half = __builtin_convertvector(n, vi) >> 1; /* in two factors: 2^128 does not fit into one */
    vi rest = __builtin_convertvector(n, vi) - half;
    vf y = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    y = selectv(x < low, splat(0.0f), y);
    y = selectv(x > high, splat(INFINITY), y);
    return selectv(x != x, x, y);
}
/* 2^x, relative error below 1.8e-7 (measured), for about half the work of expv: the whole part of x is added to the exponent
 * of a polynomial of degree 5 in the rest. 2^(x <= -127) is 0, 2^(x >= 128) is infinite, 2^nan is nan. `exp2v_within` is
 * the same without the two comparisons, for -126.5 < x < 127.5. */
INLINE vf exp2v_within(vf x) {
    vf shifted = x + 12582912.0f; /* 1.5 * 2^23: the low bits are now the nearest integer to x */
    vf f = x - (shifted - 12582912.0f);
    vf p = splat(1.3264653e-3f);
    p = p * f + 9.671511e-3f;
    p = p * f + 5.550734e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.9314700e-1f;
    p = p * f + 1.0f;
    return (vf)((vu)p + ((vu)shifted << 23));
}
INLINE vf exp2v(vf x) {
    vf low = splat(-127.0f), high = splat(128.0f);
    x = selectv(low > x, low, x);
    x = selectv(high < x, high, x);
    return exp2v_within(x);
}
INLINE vf sigmoidv(vf x) { return 1.0f / (1.0f + expv(-x)); }

/* Sum of the 16 lanes, always in the same order. */
INLINE float sumv(vf x) {
    float s[LANES];
    storev(s, x);
    for (int w = LANES / 2; w; w /= 2)
        for (int i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
}

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
/* Lane i of the result: the sum of the lanes of rows[i]. Four rounds of pairwise sums; the rows are overwritten. */
INLINE vf sum_rows(vf rows[LANES]) {
    for (int i = 0; i < 8; i++)
        rows[i] = PICK(rows[i], rows[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  PICK(rows[i], rows[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        rows[i] = PICK(rows[i], rows[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                  PICK(rows[i], rows[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        rows[i] = PICK(rows[i], rows[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                  PICK(rows[i], rows[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return PICK(rows[0], rows[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           PICK(rows[0], rows[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* Transposes 16 rows of 16 lanes in place: four rounds, each exchanges the off-diagonal blocks of half the size before. */
INLINE void transpose_rows(vf rows[LANES]) {
#define EXCHANGE(w, low, high)                                    \
    for (int i = 0; i < LANES; i++)                               \
        if (!(i & w)) {                                           \
            vf a = rows[i], b = rows[i + w];                      \
            rows[i] = PICK(a, b, low), rows[i + w] = PICK(a, b, high); \
        }
#define LIST(...) __VA_ARGS__
    EXCHANGE(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
             LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    EXCHANGE(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
             LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    EXCHANGE(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
             LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    EXCHANGE(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
             LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef EXCHANGE
#undef LIST
}

/* Zeroed memory, aligned to a cache line; free with free(). */
INLINE float *scratch(i64 floats) {
    size_t bytes = ((size_t)floats * sizeof(float) + 63) / 64 * 64;
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? bytes : 64)) abort();
    memset(p, 0, bytes);
    return (float *)p;
}

#endif
