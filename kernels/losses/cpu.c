/* What lies between the matrix products of the losses, for a block of logits (rows, width): one row at a time, which stays
 * in the second-level cache for its two or three passes. The gradient is written over the logits.
 *
 * Logits are contiguous, float32 or bfloat16. Everything inside is float32, in base 2: a row of logits x is read as
 * a = x log2(e) / temperature, its log-probability is a - l with l = max a + log2 sum 2^(a - max a). A row is one thread's.
 */
#include "vec.h"

#define LOG2_E 1.44269504088896341f
#define LN_2 0.693147180559945309f

/* 16 logits from c, in base 2; what is beyond the row counts nothing. */
INLINE vf logits_at(const void *row, i64 c, i64 width, float factor, const int bf16) {
    if (c + LANES <= width) return factor * (bf16 ? load_bf16((const uint16_t *)row + c) : loadv((const float *)row + c));
    vf x = splat(-INFINITY);
    for (i64 i = c; i < width; i++)
        x[i - c] = factor * (bf16 ? from_bf16(((const uint16_t *)row)[i]) : ((const float *)row)[i]);
    return x;
}
INLINE void put(void *row, i64 c, i64 width, vf x, const int bf16) {
    if (c + LANES > width) store_row(row, c, (const float *)&x, width - c, bf16);
    else if (bf16) store_bf16((uint16_t *)row + c, x);
    else storev((float *)row + c, x);
}
INLINE float one_logit(const void *row, i64 c, const int bf16) {
    return bf16 ? from_bf16(((const uint16_t *)row)[c]) : ((const float *)row)[c];
}

/* l of a row: log2 of the sum of 2^a. Several accumulators, so that the adds do not wait for each other. */
INLINE float log2_sum(const void *row, i64 width, float factor, const int bf16) {
    vf high[4], sum[4];
    for (int k = 0; k < 4; k++) high[k] = splat(-INFINITY), sum[k] = splat(0);
    for (i64 c = 0; c < width; c += 4 * LANES)
        for (int k = 0; k < 4 && c + k * LANES < width; k++)
            high[k] = maxv(high[k], logits_at(row, c + k * LANES, width, factor, bf16));
    float top[LANES];
    storev(top, maxv(maxv(high[0], high[1]), maxv(high[2], high[3])));
    float most = top[0];
    for (int i = 1; i < LANES; i++) most = MAX(most, top[i]);
    for (i64 c = 0; c < width; c += 4 * LANES)
        for (int k = 0; k < 4 && c + k * LANES < width; k++)
            sum[k] += exp2v(logits_at(row, c + k * LANES, width, factor, bf16) - most);
    return most + log2f(sumv((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

/* loss = -log p[label] + z_loss n^2, n the log of the sum; gradient = (p (1 + 2 z_loss n) - [label]) coefficient. */
INLINE float cross_entropy_row(void *row, i64 label, const float *coefficient, i64 width, float z_loss, const int bf16) {
    float l = log2_sum(row, width, LOG2_E, bf16), n = l * LN_2;
    float loss = n - one_logit(row, label, bf16) + z_loss * n * n;
    if (!coefficient) return loss;
    float scale = (1 + 2 * z_loss * n) * *coefficient;
    float own = scale * exp2f(one_logit(row, label, bf16) * LOG2_E - l) - *coefficient;
    for (i64 c = 0; c < width; c += LANES)
        put(row, c, width, scale * exp2v(logits_at(row, c, width, LOG2_E, bf16) - l), bf16);
    if (bf16) ((uint16_t *)row)[label] = to_bf16(own);
    else ((float *)row)[label] = own;
    return loss;
}

/* KL(teacher || student), or the reverse, times temperature^2; the gradient is the student's. */
INLINE float kl_row(void *student, const void *teacher, const float *coefficient, i64 width, float temperature,
                    i64 reverse, const int bf16, const int bf16_teacher) {
    float factor = LOG2_E / temperature;
    float own = log2_sum(student, width, factor, bf16), other = log2_sum(teacher, width, factor, bf16_teacher);
    float scale = coefficient ? temperature * *coefficient : 0;
    vf sum = splat(0);
    for (i64 c = 0; c < width; c += LANES) {
        vf s = logits_at(student, c, width, factor, bf16) - own;
        vf t = logits_at(teacher, c, width, factor, bf16_teacher) - other;
        vf p = exp2v(reverse ? s : t), term = p * (reverse ? s - t : t - s);
        if (c + LANES > width)
            for (i64 i = width - c; i < LANES; i++) term[i] = 0; /* -inf - -inf */
        sum += term;
        if (coefficient && !reverse) put(student, c, width, scale * (exp2v(s) - p), bf16);
    }
    float mean = sumv(sum);
    for (i64 c = 0; coefficient && reverse && c < width; c += LANES) {
        vf s = logits_at(student, c, width, factor, bf16) - own;
        vf t = logits_at(teacher, c, width, factor, bf16_teacher) - other;
        put(student, c, width, scale * LN_2 * exp2v(s) * (s - t - mean), bf16);
    }
    return mean * LN_2 * temperature * temperature;
}

/* coefficients: (rows) float32, or NULL for losses without gradients, which leaves the logits as they are. */
void cross_entropy_rows(void *logits, const i64 *labels, const float *coefficients, float *losses, i64 rows, i64 width,
                        float z_loss, i64 threads, i64 bf16) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < rows; r++) {
        const float *coefficient = coefficients ? coefficients + r : NULL;
        if (bf16) losses[r] = cross_entropy_row((uint16_t *)logits + r * width, labels[r], coefficient, width, z_loss, 1);
        else losses[r] = cross_entropy_row((float *)logits + r * width, labels[r], coefficient, width, z_loss, 0);
    }
}

void kl_rows(void *student, const void *teacher, const float *coefficients, float *losses, i64 rows, i64 width,
             float temperature, i64 reverse, i64 threads, i64 bf16, i64 bf16_teacher) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < rows; r++) {
        const float *coefficient = coefficients ? coefficients + r : NULL;
        void *own = (char *)student + r * width * (bf16 ? 2 : 4);
        const void *other = (const char *)teacher + r * width * (bf16_teacher ? 2 : 4);
        if (bf16 && bf16_teacher) losses[r] = kl_row(own, other, coefficient, width, temperature, reverse, 1, 1);
        else if (bf16) losses[r] = kl_row(own, other, coefficient, width, temperature, reverse, 1, 0);
        else if (bf16_teacher) losses[r] = kl_row(own, other, coefficient, width, temperature, reverse, 0, 1);
        else losses[r] = kl_row(own, other, coefficient, width, temperature, reverse, 0, 0);
    }
}

/* total += part, part in bfloat16. */
void add_bf16(float *total, const uint16_t *part, i64 count, i64 threads) {
    enum { PIECE = 4096 };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 first = 0; first < count; first += PIECE) {
        i64 i = first, stop = MIN(count, first + PIECE);
        for (; i + LANES <= stop; i += LANES) storev(total + i, loadv(total + i) + load_bf16(part + i));
        for (; i < stop; i++) total[i] += from_bf16(part[i]);
    }
}
