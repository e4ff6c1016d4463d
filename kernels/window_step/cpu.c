/* One token through the window and the linear state of gated linear attention, in place on rings of any storage.
 *
 * B batch, H query heads, Hk key/value heads (each serves G = H / Hk query heads), D key width, V value width, F feature
 * width, R ring rows of all heads together, S sinks. A head's ring is cut into parts of PART rows, fixed whatever the
 * number of threads; each part gives its largest score and its sums relative to it, and the parts are joined in order.
 *
 *     token n is kept in row n % length of its head's ring; when the next one takes its place it goes into the state
 *     s <- e^g s + features (x) [value, 1], unless it is one of the first S tokens, which the sinks keep.
 */
#include "rows.h"

#define LOWEST_SHIFT -60.0f /* as in gated_linear_attention/state.py */

typedef struct {
    i64 batch, heads, kv_heads, group, key_width, value_width, keys, values; /* the last two padded */
    i64 features, sinks, rows, absolute;
    float scale;
    const float *q, *near, *far, *new_k, *new_v, *leaving, *log_decay, *factor;
    float *s;
    Rows ring_k, ring_v, sink_k, sink_v;
    const i64 *lengths;
} Step;

/* The oldest token goes from the ring into the state, and the new one takes its place. */
static void take_in(const Step *x, i64 b, i64 h, i64 offset, i64 count, float *key, float *value) {
    i64 slot = b * x->rows + offset + count % x->lengths[h], wide = x->value_width + 1;
    if (x->features) {
        float *s = x->s + (b * x->kv_heads + h) * x->features * wide;
        int leaves = count - x->lengths[h] >= x->sinks;
        float keep = x->log_decay ? expf(x->log_decay[h]) : 1;
        if (leaves) read_row(&x->ring_v, slot, value);
        for (i64 f = 0; f < x->features; f++) {
            float feature = leaves ? x->leaving[(b * x->kv_heads + h) * x->features + f] : 0;
            float *row = s + f * wide;
            if (leaves)
                for (i64 i = 0; i < x->value_width; i++) row[i] = keep * row[i] + feature * value[i];
            else
                for (i64 i = 0; i < x->value_width; i++) row[i] *= keep;
            row[x->value_width] = keep * row[x->value_width] + feature;
        }
    }
    load_row(key, x->new_k, (b * x->kv_heads + h) * x->key_width, x->key_width, 0);
    load_row(value, x->new_v, (b * x->kv_heads + h) * x->value_width, x->value_width, 0);
    write_row(&x->ring_k, slot, key);
    write_row(&x->ring_v, slot, value);
    if (count < x->sinks) {
        i64 sink = (b * x->kv_heads + h) * x->sinks + count;
        write_row(&x->sink_k, sink, key);
        write_row(&x->sink_v, sink, value);
    }
}

/* Joins the parts of one query head with the linear part into the output. */
static void join(const Step *x, i64 b, i64 h, i64 g, i64 parts, const float *largest, const float *sums, float *o) {
    i64 values = x->values, stride = values + LANES, head = h * x->group + g, wide = x->value_width + 1;
    float shift = -INFINITY, total[stride];
    for (i64 p = 0; p < parts; p++) shift = MAX(shift, largest[p * x->group + g]);
    if (x->absolute) shift = MAX(shift, LOWEST_SHIFT);
    memset(total, 0, sizeof total);
    for (i64 p = 0; p < parts; p++) {
        float part = largest[p * x->group + g];
        if (part == -INFINITY) continue;
        float weight = expf(part - shift) * (x->factor ? x->factor[head] : 1);
        const float *own = sums + (p * x->group + g) * stride;
        for (i64 i = 0; i <= values; i++) total[i] += weight * own[i];
    }
    float denominator = total[values], outside = x->scale * (x->absolute ? expf(-shift) : 1);
    const float *query = x->q + (b * x->heads + head) * x->features;
    for (i64 f = 0; f < x->features; f++) {
        const float *row = x->s + ((b * x->kv_heads + h) * x->features + f) * wide;
        float weight = outside * query[f];
        for (i64 i = 0; i < x->value_width; i++) total[i] += weight * row[i];
        denominator += weight * row[x->value_width];
    }
    for (i64 i = 0; i < x->value_width; i++) o[i] = denominator == 0 ? 0 : total[i] / denominator;
}

/* kinds: of keys and of values, as in the enum. lengths: (Hk,). far, leaving, log_decay, factor may be NULL. */
void window_step(const float *q, const float *near, const float *far, const float *new_k, const float *new_v,
                 const float *leaving, const float *log_decay, const float *factor, float *s, void *ring_k,
                 int8_t *ring_k_exponents, void *ring_v, int8_t *ring_v_exponents, void *sink_k,
                 int8_t *sink_k_exponents, void *sink_v, int8_t *sink_v_exponents, i64 *count, const i64 *lengths,
                 float *o, i64 batch, i64 heads, i64 kv_heads, i64 key_width, i64 value_width, i64 features, i64 sinks,
                 i64 k_kind, i64 v_kind, i64 absolute, float score_scale, float scale, i64 threads) {
    i64 rows = 0, parts = 0, group = heads / kv_heads;
    i64 first_row[kv_heads], first_part[kv_heads];
    for (i64 h = 0; h < kv_heads; h++) {
        first_row[h] = rows, first_part[h] = parts;
        rows += lengths[h];
        parts += 1 + (lengths[h] + PART - 1) / PART; /* the first one is the sinks */
    }
    Step x = {batch, heads, kv_heads, group, key_width, value_width, PADDED(key_width), PADDED(value_width),
              features, sinks, rows, absolute, scale, q, near, far, new_k, new_v, leaving, log_decay,
              factor, s, rows_of(ring_k, ring_k_exponents, key_width, k_kind),
              rows_of(ring_v, ring_v_exponents, value_width, v_kind),
              rows_of(sink_k, sink_k_exponents, key_width, k_kind),
              rows_of(sink_v, sink_v_exponents, value_width, v_kind), lengths};
    i64 stride = x.values + LANES;
    float *largest = scratch(batch * parts * group * (1 + stride)), *sums = largest + batch * parts * group;
    float *rooms = scratch(threads * (group * (x.keys + PART) + LANES * MAX(x.keys, x.values)));
    i64 room_size = group * (x.keys + PART) + LANES * MAX(x.keys, x.values);
    for (i64 b = 0; b < batch; b++)
        for (i64 h = 0; h < kv_heads; h++) take_in(&x, b, h, first_row[h], count[b], rooms, rooms + x.keys);
#pragma omp parallel num_threads(threads)
    {
        i64 me = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        me = omp_get_thread_num();
#endif
        float *queries = rooms + me * room_size, *room = queries + group * x.keys;
        uint8_t inside[PART];
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < batch * parts; task++) {
            i64 b = task / parts, part = task % parts, h = kv_heads - 1;
            while (first_part[h] > part) h--;
            i64 number = part - first_part[h] - 1; /* -1: the sinks */
            const float *from = number < 0 && far ? far : near;
            for (i64 g = 0; g < group; g++)
                load_row(queries + g * x.keys, from, (b * heads + h * group + g) * key_width, key_width, 0);
            float *most = largest + task * group, *own = sums + task * group * stride;
            if (number < 0) {
                for (i64 i = 0; i < MIN(sinks, PART); i++) inside[i] = i <= count[b];
                i64 at = (b * kv_heads + h) * sinks;
                sum_part(group, score_scale, queries, &x.sink_k, &x.sink_v, at, sinks, inside, most, own, room);
            } else {
                i64 first = number * PART, n = MIN(PART, lengths[h] - first);
                for (i64 r = 0; r < n; r++) {
                    i64 back = (count[b] - (first + r)) % lengths[h];
                    inside[r] = count[b] - (back < 0 ? back + lengths[h] : back) >= sinks;
                }
                i64 at = b * rows + first_row[h] + first;
                sum_part(group, score_scale, queries, &x.ring_k, &x.ring_v, at, n, inside, most, own, room);
            }
        }
#pragma omp for schedule(static)
        for (i64 task = 0; task < batch * heads; task++) {
            i64 b = task / heads, h = task % heads / group, g = task % group;
            i64 own = 1 + (lengths[h] + PART - 1) / PART, at = b * parts + first_part[h];
            join(&x, b, h, g, own, largest + at * group, sums + at * group * stride, o + task * value_width);
        }
    }
    for (i64 b = 0; b < batch; b++) count[b]++;
    free(largest);
    free(rooms);
}

/* keys (batch, kv_heads, width) of the rows that the next token overwrites, count[b] % lengths[h] in each head's ring. */
void leaving_keys(void *ring_k, int8_t *exponents, const i64 *count, const i64 *lengths, float *keys, i64 batch,
                  i64 kv_heads, i64 width, i64 kind) {
    Rows ring = rows_of(ring_k, exponents, width, kind);
    i64 rows = 0, padded = PADDED(width);
    for (i64 h = 0; h < kv_heads; h++) rows += lengths[h];
    for (i64 b = 0; b < batch; b++) {
        i64 first = b * rows;
        for (i64 h = 0; h < kv_heads; first += lengths[h++]) {
            float row[padded];
            read_row(&ring, first + count[b] % lengths[h], row);
            memcpy(keys + (b * kv_heads + h) * width, row, (size_t)width * 4);
        }
    }
}
