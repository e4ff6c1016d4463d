/* A tape: operations with the addresses that they read and write, run one after the other by one call. Each does what the
 * operation of torch of that name does, in float32 inside and rounded once; `lowering.py` writes the steps. */
#include "vec.h"

#define DIMS 4
#define INPUTS 4
#define BLOCK 128
#define SHARED_BYTES 65536 /* of weights: below, a second thread takes longer to wake than it saves */

typedef uint32_t vu_any __attribute__((vector_size(64), aligned(2), may_alias));

/* As in `lowering.py`, in this order. */
enum { FLOAT32, BFLOAT16, INT64, BYTE };
enum {
    COPY, FILL, EXP, LOG, SQRT, RSQRT, ABS, SIGMOID, SILU, TANH, GELU, GELU_TANH, SOFTPLUS, LOG_SIGMOID, SIN, COS, EXPM1,
    LOG1P, ADD, MUL, DIV, POW, LOGADDEXP, MAXIMUM, GE, EQ, WHERE, CLAMP, SUM, MEAN, NORM, SOFTMAX, LAYER_NORM, MATMUL
};

/* A tensor as a step goes through it: strides in elements for the step's sizes. */
typedef struct { char *at; i64 stride[DIMS], type; } Operand;
typedef struct { i64 op, inputs, size[DIMS]; Operand out, in[INPUTS]; double a, b; } Step;

static const i64 WIDTHS[] = {4, 2, 8, 1};

INLINE float number(const char *at, i64 type) {
    switch (type) {
    case FLOAT32: return *(const float *)at;
    case BFLOAT16: return from_bf16(*(const uint16_t *)at);
    case INT64: return (float)*(const i64 *)at;
    default: return (float)*(const uint8_t *)at;
    }
}

/* n <= BLOCK numbers along the last dimension, from element `at` on. */
static void load(float *to, const Operand *x, i64 at, i64 n) {
    i64 stride = x->stride[DIMS - 1], width = WIDTHS[x->type];
    const char *from = x->at + at * width;
    if (stride == 0) {
        float value = number(from, x->type);
        for (i64 i = 0; i < n; i++) to[i] = value;
    } else if (stride == 1 && x->type == FLOAT32) memcpy(to, from, (size_t)n * 4);
    else if (stride == 1 && x->type == BFLOAT16) for (i64 i = 0; i < n; i++) to[i] = from_bf16(((const uint16_t *)from)[i]);
    else for (i64 i = 0; i < n; i++) to[i] = number(from + i * stride * width, x->type);
}

static void store(const float *from, const Operand *x, i64 at, i64 n) {
    i64 stride = x->stride[DIMS - 1], width = WIDTHS[x->type];
    char *to = x->at + at * width;
    if (stride == 1 && x->type == FLOAT32) {
        memcpy(to, from, (size_t)n * 4);
        return;
    }
    for (i64 i = 0; i < n; i++, to += stride * width)
        switch (x->type) {
        case FLOAT32: *(float *)to = from[i]; break;
        case BFLOAT16: *(uint16_t *)to = to_bf16(from[i]); break;
        default: *(uint8_t *)to = from[i] != 0;
        }
}

INLINE vf tanhv(vf x) {
    vf size = selectv(x < 0, -x, x), e = expv(size * -2.0f), s = x * x;
    vf large = (1.0f - e) / (1.0f + e), small = x * (1.0f + s * (-0.33333333f + s * (0.13333333f - s * 0.053968254f)));
    return selectv(size < 0.1f, small, selectv(x < 0, -large, large));
}

#define EACH(expression) for (i64 i = 0; i < n; i++) { float x = a[i], y = b[i], z = c[i]; (void)x, (void)y, (void)z; o[i] = (expression); } break
#define EACH_VECTOR(expression) for (i64 i = 0; i < n; i += LANES) { vf x = loadv(a + i); storev(o + i, (expression)); } break

/* o may be a. Blocks are BLOCK long; what lies behind n in them is anything. */
static void compute(const Step *step, float *o, const float *a, const float *b, const float *c, i64 n) {
    float p = (float)step->a, q = (float)step->b;
    switch (step->op) {
    case COPY: EACH(x);
    case FILL: EACH(p);
    case EXP: EACH_VECTOR(expv(x));
    case LOG: EACH(logf(x));
    case SQRT: EACH(sqrtf(x));
    case RSQRT: EACH(1.0f / sqrtf(x));
    case ABS: EACH(fabsf(x));
    case SIGMOID: EACH_VECTOR(sigmoidv(x));
    case SILU: EACH_VECTOR(x * sigmoidv(x));
    case TANH: EACH_VECTOR(tanhv(x));
    case GELU: EACH(0.5f * x * (1.0f + erff(x * 0.70710678f)));
    case GELU_TANH: EACH_VECTOR(0.5f * x * (1.0f + tanhv(0.79788456f * (x + 0.044715f * x * x * x))));
    case SOFTPLUS: EACH(x * p > q ? x : log1pf(expf(x * p)) / p);
    case LOG_SIGMOID: EACH((x < 0 ? x : 0) - log1pf(expf(-fabsf(x))));
    case SIN: EACH(sinf(x));
    case COS: EACH(cosf(x));
    case EXPM1: EACH(expm1f(x));
    case LOG1P: EACH(log1pf(x));
    case ADD: EACH(x + p * y);
    case MUL: EACH(x * y);
    case DIV: EACH(x / y);
    case POW: EACH(powf(x, y));
    case LOGADDEXP: EACH(x == y ? x + 0.69314718f : MAX(x, y) + log1pf(expf(-fabsf(x - y))));
    case MAXIMUM: EACH(x != x ? x : y != y ? y : MAX(x, y));
    case GE: EACH(x >= y);
    case EQ: EACH(x == y);
    case WHERE: EACH(x != 0 ? y : z);
    case CLAMP: EACH(x != x ? x : MIN(MAX(x, p), q));
    }
}

/* Calls the rest of the block for every index of the first three dimensions: `x` is where operand k begins there. */
#define ROWS(step)                                                              \
    for (i64 i0 = 0; i0 < (step)->size[0]; i0++)                                \
        for (i64 i1 = 0; i1 < (step)->size[1]; i1++)                            \
            for (i64 i2 = 0; i2 < (step)->size[2]; i2++)
#define BEGIN(x) (i0 * (x).stride[0] + i1 * (x).stride[1] + i2 * (x).stride[2])

static void pointwise(const Step *step) {
    float rows[INPUTS][BLOCK];
    memset(rows, 0, sizeof rows);
    i64 n = step->size[3];
    ROWS(step) for (i64 first = 0; first < n; first += BLOCK) {
        i64 count = MIN(BLOCK, n - first);
        for (i64 k = 0; k < step->inputs; k++)
            load(rows[k], &step->in[k], BEGIN(step->in[k]) + first * step->in[k].stride[3], count);
        compute(step, rows[INPUTS - 1], rows[0], rows[1], rows[2], count);
        store(rows[INPUTS - 1], &step->out, BEGIN(step->out) + first * step->out.stride[3], count);
    }
}

/* The same between integers, exactly; what does not fit into 64 bits wraps, as in torch. */
INLINE i64 integer(const char *at, i64 type) { return type == INT64 ? *(const i64 *)at : *(const uint8_t *)at; }
static void pointwise_integers(const Step *step) {
    const double above = 9223372036854775808.0; /* 2^63; a and b may be infinite: no limit */
    i64 p = step->a <= -above ? INT64_MIN : (i64)step->a, q = step->b >= above ? INT64_MAX : (i64)step->b;
    ROWS(step) for (i64 i = 0; i < step->size[3]; i++) {
        i64 v[3] = {0};
        for (i64 k = 0; k < step->inputs; k++) {
            const Operand *x = &step->in[k];
            v[k] = integer(x->at + (BEGIN(*x) + i * x->stride[3]) * WIDTHS[x->type], x->type);
        }
        i64 x = v[0], y = v[1], z = v[2], o = 0;
        switch (step->op) {
        case COPY: o = x; break;
        case FILL: o = p; break;
        case ADD: o = (i64)((uint64_t)x + (uint64_t)p * (uint64_t)y); break;
        case MUL: o = (i64)((uint64_t)x * (uint64_t)y); break;
        case MAXIMUM: o = MAX(x, y); break;
        case GE: o = x >= y; break;
        case EQ: o = x == y; break;
        case WHERE: o = x ? y : z; break;
        case CLAMP: o = MIN(MAX(x, p), q); break;
        }
        char *to = step->out.at + (BEGIN(step->out) + i * step->out.stride[3]) * WIDTHS[step->out.type];
        if (step->out.type == INT64) *(i64 *)to = o;
        else *(uint8_t *)to = o != 0;
    }
}

/* Whole rows along the last dimension: sums, norms and softmax. */
static void by_rows(const Step *step) {
    i64 n = step->size[3], width = PADDED(n);
    float *memory = scratch(3 * MAX(width, BLOCK));
    float *row = memory, *weight = row + width, *bias = weight + width;
    const Operand *in = step->in;
    ROWS(step) {
        for (i64 i = 0; i < n; i += BLOCK) load(row + i, in, BEGIN(*in) + i * in->stride[3], MIN(BLOCK, n - i));
        if (step->op == SOFTMAX) {
            float most = -INFINITY;
            for (i64 i = 0; i < n; i++) most = row[i] > most || row[i] != row[i] ? row[i] : most;
            for (i64 i = 0; i < n; i++) row[i] -= most;
            for (i64 i = n; i < width; i++) row[i] = -INFINITY;
            for (i64 i = 0; i < width; i += LANES) storev(row + i, expv(loadv(row + i)));
        }
        vf sums = {0}, squares = {0};
        for (i64 i = 0; i < width; i += LANES) sums += loadv(row + i), squares += loadv(row + i) * loadv(row + i);
        float total = sumv(sums), square = sumv(squares);
        if (step->op <= NORM) {
            float o = step->op == SUM ? total : step->op == MEAN ? total / (float)n : sqrtf(square);
            store(&o, &step->out, BEGIN(step->out), 1);
            continue;
        }
        float mean = 0, scale;
        if (step->op == SOFTMAX) scale = 1 / total;
        else {
            mean = total / (float)n;
            float spread = 0;
            for (i64 i = 0; i < n; i++) spread += (row[i] - mean) * (row[i] - mean);
            scale = 1 / sqrtf(spread / (float)n + (float)step->a);
        }
        for (i64 i = 0; i < n; i++) row[i] = (row[i] - mean) * scale;
        for (i64 k = 1; k < step->inputs; k++) { /* the weight and the bias, where there are any */
            if (!in[k].at) continue;
            float *other = k == 1 ? weight : bias;
            for (i64 i = 0; i < n; i += BLOCK)
                load(other + i, &in[k], BEGIN(in[k]) + i * in[k].stride[3], MIN(BLOCK, n - i));
            for (i64 i = 0; i < n; i++) row[i] = k == 1 ? row[i] * other[i] : row[i] + other[i];
        }
        for (i64 i = 0; i < n; i += BLOCK)
            store(row + i, &step->out, BEGIN(step->out) + i * step->out.stride[3], MIN(BLOCK, n - i));
        for (i64 i = n; i < width; i++) row[i] = 0;
    }
    free(memory);
}

/* Four partial sums of row * x over n numbers, both float32. */
INLINE vf dot_floats(const float *row, const float *x, i64 n) {
    vf a = {0}, b = {0}, c = {0}, d = {0};
    i64 i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        a += loadv(row + i) * loadv(x + i);
        b += loadv(row + i + LANES) * loadv(x + i + LANES);
        c += loadv(row + i + 2 * LANES) * loadv(x + i + 2 * LANES);
        d += loadv(row + i + 3 * LANES) * loadv(x + i + 3 * LANES);
    }
    for (; i + LANES <= n; i += LANES) a += loadv(row + i) * loadv(x + i);
    if (i < n) b += load_lanes(row, i, n - i, 0) * loadv(x + i);
    return (a + b) + (c + d);
}

/* The same for a bfloat16 row: a register of 32 numbers holds the even ones in its low halves and the odd ones in its high
 * halves, which are float32 as soon as the other half is zero. x stands apart accordingly. */
INLINE vf dot_halves(const uint16_t *row, const float *even, const float *odd, i64 n) {
    vf a = {0}, b = {0}, c = {0}, d = {0};
    i64 i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        vu first = *(const vu_any *)(row + i), second = *(const vu_any *)(row + i + 2 * LANES);
        a += (vf)(first << 16) * loadv(even + i / 2);
        b += (vf)(first & 0xffff0000u) * loadv(odd + i / 2);
        c += (vf)(second << 16) * loadv(even + i / 2 + LANES);
        d += (vf)(second & 0xffff0000u) * loadv(odd + i / 2 + LANES);
    }
    for (; i < n; i += 2 * LANES) {
        uint16_t rest[2 * LANES] = {0};
        memcpy(rest, row + i, (size_t)MIN(2 * LANES, n - i) * 2);
        vu pairs = *(const vu_any *)rest;
        a += (vf)(pairs << 16) * loadv(even + i / 2);
        b += (vf)(pairs & 0xffff0000u) * loadv(odd + i / 2);
    }
    return (a + b) + (c + d);
}

/* out (batch, rows, n) = b bias + a x w, x (batch, rows, k), w (batch, n, k), in any order of its last two dimensions. One
 * token reads each weight once, so what counts is how fast w comes in: each thread reads it as one stream. */
static void matmul(const Step *step, i64 threads) {
    i64 batch = step->size[0], rows = step->size[1], outs = step->size[2], depth = step->size[3];
    const Operand *x = &step->in[0], *w = &step->in[1], *added = step->inputs > 2 ? &step->in[2] : NULL;
    i64 half = PADDED((depth + 1) / 2), width = 2 * half, by_row = w->stride[3] == 1 || depth == 1;
    int bf16 = w->type == BFLOAT16, apart = bf16 && by_row;
    float *given = scratch(batch * rows * width + width);
    for (i64 r = 0; r < batch * rows; r++) {
        float *row = given + r * width, *to = apart ? given + batch * rows * width : row;
        i64 at = r / rows * x->stride[0] + r % rows * x->stride[1];
        for (i64 i = 0; i < depth; i += BLOCK) load(to + i, x, at + i * x->stride[3], MIN(BLOCK, depth - i));
        if (apart) for (i64 i = 0; i < depth; i++) row[i % 2 * half + i / 2] = to[i];
    }
    i64 blocks = (outs + LANES - 1) / LANES, bytes = batch * outs * depth * WIDTHS[w->type];
    /* A w whose columns lie together is read over several columns at once. */
    i64 together = by_row ? 1 : 4, tasks = batch * ((blocks + together - 1) / together);
#pragma omp parallel for num_threads((int)threads) schedule(static) if (threads > 1 && bytes > SHARED_BYTES)
    for (i64 task = 0; task < tasks; task++) {
        i64 b = task / (tasks / batch), begin = task % (tasks / batch) * together * LANES;
        for (i64 r = 0; r < rows; r++) {
            const float *row = given + (b * rows + r) * width;
            vf sums[LANES] = {{0}}, results[4];
            i64 count = MIN(together * LANES, outs - begin);
            if (by_row) {
                for (i64 i = 0; i < count; i++) {
                    i64 at = b * w->stride[0] + (begin + i) * w->stride[2];
                    sums[i] = bf16 ? dot_halves((const uint16_t *)w->at + at, row, row + half, depth)
                                   : dot_floats((const float *)w->at + at, row, depth);
                }
                results[0] = sum_rows(sums);
            } else if (w->stride[2] == 1) {
                for (i64 i = 0; i < depth; i++) {
                    i64 at = b * w->stride[0] + i * w->stride[3] + begin;
                    for (i64 j = 0; j * LANES < count; j++)
                        sums[j] += load_lanes(w->at, at + j * LANES, count - j * LANES, bf16) * row[i];
                }
                memcpy(results, sums, sizeof results);
            } else {
                float *o = (float *)results;
                for (i64 j = 0; j < count; j++) {
                    float sum = 0;
                    for (i64 i = 0; i < depth; i++) {
                        i64 at = b * w->stride[0] + (begin + j) * w->stride[2] + i * w->stride[3];
                        sum += row[i] * number(w->at + at * WIDTHS[w->type], w->type);
                    }
                    o[j] = sum;
                }
            }
            float *o = (float *)results;
            for (i64 j = 0; j < count; j++) o[j] *= (float)step->a;
            if (added) {
                float bias[4 * LANES];
                Operand along = *added;
                along.stride[3] = added->stride[2];
                load(bias, &along, b * added->stride[0] + r * added->stride[1] + begin * added->stride[2], count);
                for (i64 j = 0; j < count; j++) o[j] += (float)step->b * bias[j];
            }
            Operand to = step->out;
            to.stride[3] = to.stride[2];
            store(o, &to, b * to.stride[0] + r * to.stride[1] + begin * to.stride[2], count);
        }
    }
    free(given);
}

INLINE int whole(const Operand *x) { return x->type == INT64 || x->type == BYTE; }

void tape_run(const Step *steps, i64 count, i64 threads) {
    for (const Step *step = steps; step < steps + count; step++) {
        if (step->op == MATMUL) matmul(step, threads);
        else if (step->op >= SUM) by_rows(step);
        else {
            int integers = whole(&step->out);
            for (i64 k = 0; k < step->inputs; k++) integers &= whole(&step->in[k]);
            if (integers) pointwise_integers(step);
            else pointwise(step);
        }
    }
}
