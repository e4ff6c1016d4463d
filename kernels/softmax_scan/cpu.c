/* Softmax scan on the CPU, forward and backward: averages weighted by exponentials of scores, with decay and bonus.
 *
 * (B, T, S) scores k and (B, T, S * per) values v are contiguous, float32 or bfloat16 (bf16 = 1). A score weighs `per`
 * values: per = 1 has a score for each channel; else S counts heads and per is their width. One task is a batch row and a
 * block of scores with their values; it walks through time with the block's state in cache. A step is
 *     m' = max(m + w, k)   f = exp(m + w - m')   p = exp(k - m')   n' = f n + p v   d' = f d + p   out = a n + c v
 * with (a, c) = (f, p) / d', or with a bonus u (exp(m - r), exp(u + k - r)) divided by the denominator that they make,
 * r being the larger exponent.
 *
 * Backward goes from the last chunk of 16 steps to the first; it makes the weights and states of a chunk again from the
 * state before it, which forward kept. G and H are the gradients of n' and d' from later steps; sums are over the values
 * of a score:
 *     dv = c do + p G      dk = p (sum(G v) + H) + s      G <- f G + a do      H <- f H - a sum(do out)
 *     dw = f (sum(G n) + H d) - (s without a bonus)       du = s             s = c sum(do (v - out))
 * v - out is a (d v - n), which keeps its relative accuracy where the step's own value outweighs all others. What the final
 * maximum's gradient has beyond that of the pair (n exp(m), d exp(m)) goes to the score, or the decays, that it came from.
 * No result depends on the number of threads: blocks share no sums but those over the batch, made in order at the end.
 */
#include "vec.h"

enum { CHUNK = LANES, CHANNELS = 512, VALUES = 2048 };

typedef struct {
    const void *k, *v;
    const float *decay, *bonus; /* (S,) or NULL */
    const uint8_t *codes;       /* (B, T) or NULL */
    float *kept;                /* (B, chunks, S maxima, S denominators, S * per numerators) or NULL */
    i64 batch, time, scores, per, threads;
} Call;

/* One task: which batch row, which scores; widths of scratch rows. */
typedef struct {
    i64 b, first, n, row, value_row;
} Part;

static i64 block_of(const Call *call) {
    i64 most = call->per > 1 ? MAX(1, VALUES / call->per) : CHANNELS;
    i64 wanted = MAX((call->threads + call->batch - 1) / call->batch, (call->scores + most - 1) / most);
    i64 block = (call->scores + wanted - 1) / wanted;
    return call->per > 1 ? block : MIN(call->scores, PADDED(block));
}
static Part part_of(const Call *call, i64 task, i64 block) {
    i64 blocks = (call->scores + block - 1) / block, first = task % blocks * block, n = MIN(block, call->scores - first);
    return (Part){task / blocks, first, n, PADDED(n), call->per > 1 ? n * PADDED(call->per) : PADDED(n)};
}
static i64 tasks_of(const Call *call, i64 block) { return call->batch * ((call->scores + block - 1) / block); }
INLINE int code_of(const Call *call, const Part *part, i64 t) {
    return call->codes ? call->codes[part->b * call->time + t] : CONTINUES;
}

/* exp(x) for x <= 0; 0 for nan, the difference of two scores of -inf. */
INLINE vf weight_of(vf x) {
    vf low = splat(-126.0f), power = x * 1.44269504088896341f;
    vi there = power > low;
    return selectv(there, exp2v_within(selectv(there, power, low)), splat(0.0f));
}

/* -|x|; nan stays nan. */
INLINE vf downward(vf x) { return (vf)((vi)x | (vi)splat(-0.0f)); }

typedef struct {
    vf f, p, a, c;
    vi won; /* where the new score is the maximum */
} Weights;

/* The weights of a step; m and d become those after it. */
INLINE Weights weigh(vf *m, vf *d, vf k, vf decay, vf bonus, int has_bonus) {
    vf old = *m + decay, one = splat(1.0f);
    vi won = k > old;
    vf e = weight_of(downward(old - k)); /* one of the two weights is 1 */
    vf f = selectv(won, e, one), p = selectv(won, one, e), a = f, c = p, sum;
    vf after = f * *d + p;
    if (has_bonus) {
        vf score = k + bonus;
        vi larger = score > *m;
        e = weight_of(downward(score - *m));
        a = selectv(larger, e, one), c = selectv(larger, one, e);
        sum = a * *d + c;
    } else sum = after;
    vf inverse = one / selectv(sum == 0.0f, splat(INFINITY), sum); /* 0 where nothing has weight */
    *m = selectv(won, k, old), *d = after;
    return (Weights){f, p, a * inverse, c * inverse, won};
}

/* n rows of `per` values between a tensor and scratch rows, each padded; one row where per = 1. */
INLINE void gather(float *rows, const float *tensor, i64 at, const Part *part, i64 per) {
    if (per == 1) load_row(rows, tensor, at, part->n, 0);
    else
        for (i64 i = 0; i < part->n; i++) load_row(rows + i * PADDED(per), tensor, at + i * per, per, 0);
}
INLINE void scatter(float *tensor, i64 at, const float *rows, const Part *part, i64 per) {
    if (per == 1) store_row(tensor, at, rows, part->n, 0);
    else
        for (i64 i = 0; i < part->n; i++) store_row(tensor, at + i * per, rows + i * PADDED(per), per, 0);
}

/* The kept state before a chunk: its maxima; denominators and numerators follow as said at Call. */
INLINE float *kept_at(const Call *call, const Part *part, i64 chunk) {
    i64 chunks = (call->time + CHUNK - 1) / CHUNK;
    return call->kept + (part->b * chunks + chunk) * call->scores * (2 + call->per) + part->first;
}
static void keep(const Call *call, const Part *part, i64 chunk, const float *m, const float *n, const float *d) {
    float *to = kept_at(call, part, chunk);
    memcpy(to, m, (size_t)part->n * 4);
    memcpy(to + call->scores, d, (size_t)part->n * 4);
    scatter(to + 2 * call->scores - part->first, part->first * call->per, n, part, call->per);
}
static void recall(const Call *call, const Part *part, i64 chunk, float *m, float *n, float *d) {
    const float *from = kept_at(call, part, chunk);
    memcpy(m, from, (size_t)part->n * 4);
    memcpy(d, from + call->scores, (size_t)part->n * 4);
    gather(n, from + 2 * call->scores - part->first, part->first * call->per, part, call->per);
}

/* Rows of decays and bonuses for a part, zeros where there are none. */
static void parameters(const Call *call, const Part *part, float *decay, float *bonus) {
    if (call->decay) load_row(decay, call->decay, part->first, part->n, 0);
    if (call->bonus) load_row(bonus, call->bonus, part->first, part->n, 0);
}
static void empty(const Part *part, float *m, float *n, float *d) {
    for (i64 i = 0; i < part->row; i++) m[i] = -INFINITY, d[i] = 0;
    memset(n, 0, (size_t)part->value_row * 4);
}

INLINE void put(void *tensor, i64 at, vf x, i64 n, const int bf16, int stream) {
    if (stream) stream_lanes(tensor, at, x, bf16);
    else store_lanes(tensor, at, x, n, bf16);
}
/* Processors foresee whole rows, not parts of them, nor going back: what comes next is fetched (1.8 times as fast). */
INLINE void fetch(const void *tensor, i64 at, const int bf16) {
    __builtin_prefetch((const char *)tensor + at * (bf16 ? 2 : 4), 0, 2);
}

/* One step of a part: the state (m, n, d) goes on, and `out` is written. */
INLINE void step(const Call *call, const Part *part, i64 row, float *m, float *n, float *d, const float *decay,
                 const float *bonus, float *weights, void *out, int stream, const int bf16) {
    i64 at = row * call->scores + part->first, per = call->per, padded = PADDED(per);
    i64 ahead = part->n < call->scores ? call->scores : 0;
    for (i64 i = 0; i < part->row; i += LANES) {
        if (ahead && per == 1) fetch(call->k, at + ahead + i, bf16), fetch(call->v, at + ahead + i, bf16);
        vf maximum = loadv(m + i), sum = loadv(d + i), k = load_lanes(call->k, at + i, part->n - i, bf16);
        Weights x = weigh(&maximum, &sum, k, loadv(decay + i), loadv(bonus + i), call->bonus != NULL);
        storev(m + i, maximum), storev(d + i, sum);
        if (per == 1) {
            vf v = load_lanes(call->v, at + i, part->n - i, bf16), before = loadv(n + i);
            put(out, at + i, x.a * before + x.c * v, part->n - i, bf16, stream);
            storev(n + i, x.f * before + x.p * v);
        } else {
            storev(weights + i, x.f), storev(weights + part->row + i, x.p);
            storev(weights + 2 * part->row + i, x.a), storev(weights + 3 * part->row + i, x.c);
        }
    }
    if (per == 1) return;
    for (i64 h = 0; h < part->n; h++) {
        const float *x = weights + h;
        vf f = splat(x[0]), p = splat(x[part->row]), a = splat(x[2 * part->row]), c = splat(x[3 * part->row]);
        for (i64 i = 0; i < per; i += LANES) {
            vf v = load_lanes(call->v, (at + h) * per + i, per - i, bf16), before = loadv(n + h * padded + i);
            put(out, (at + h) * per + i, a * before + c * v, per - i, bf16, stream);
            storev(n + h * padded + i, f * before + p * v);
        }
    }
}

INLINE void forward(const Call *call, const float *const initial[3], void *out, float *const final[3], const int bf16) {
    i64 block = block_of(call), per = call->per, tasks = tasks_of(call, block);
    i64 rows = call->batch * call->time, width = call->scores * per;
    int stream = streamable(out, rows, width, bf16) && (per == 1 || per % LANES == 0);
    huge_pages(out, rows * width * (bf16 ? 2 : 4));
#pragma omp parallel for num_threads(call->threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        Part part = part_of(call, task, block);
        i64 at = part.b * call->scores + part.first;
        float *m = scratch(8 * part.row + part.value_row), *d = m + part.row, *decay = d + part.row;
        float *bonus = decay + part.row, *weights = bonus + part.row, *n = weights + 4 * part.row;
        parameters(call, &part, decay, bonus);
        empty(&part, m, n, d);
        if (initial[0]) {
            load_row(m, initial[0], at, part.n, 0), load_row(d, initial[2], at, part.n, 0);
            gather(n, initial[1], at * per, &part, per);
        }
        for (i64 t = 0; t < call->time; t++) {
            i64 row = part.b * call->time + t;
            int code = code_of(call, &part, t);
            if (call->kept && t % CHUNK == 0) keep(call, &part, t / CHUNK, m, n, d);
            if (code == SKIPPED) {
                zero_row(out, (row * call->scores + part.first) * per, part.n * per, bf16);
                continue;
            }
            if (code == BEGINS) empty(&part, m, n, d);
            step(call, &part, row, m, n, d, decay, bonus, weights, out, stream, bf16);
        }
        store_row(final[0], at, m, part.n, 0), store_row(final[2], at, d, part.n, 0);
        scatter(final[1], at * per, n, &part, per);
        stream_end();
        free(m);
    }
}

/* What backward keeps of a chunk: CHUNK rows of each. n is the numerator before the step, of channels only. */
typedef struct {
    float *f, *p, *a, *c, *d, *won, *n;
} Chunk;

/* The gradients of the state and of the parameters, rows of a part. */
typedef struct {
    float *numerator, *denominator, *maximum, *decay, *bonus;
} Gradients;

/* Weights of the steps of a chunk; (m, n, d) go from before it to after it, n for channels only. */
INLINE void remake(const Call *call, const Part *part, i64 start, i64 stop, float *m, float *n, float *d,
                   const float *decay, const float *bonus, const Chunk *to, const int bf16) {
    for (i64 t = start; t < stop; t++) {
        i64 at = (part->b * call->time + t) * call->scores + part->first, own = (t - start) * part->row;
        int code = code_of(call, part, t);
        if (code == SKIPPED) continue;
        if (code == BEGINS) {
            for (i64 i = 0; i < part->row; i++) m[i] = -INFINITY, d[i] = 0;
            if (call->per == 1) memset(n, 0, (size_t)part->row * 4);
        }
        for (i64 i = 0; i < part->row; i += LANES) {
            vf maximum = loadv(m + i), sum = loadv(d + i), k = load_lanes(call->k, at + i, part->n - i, bf16);
            storev(to->d + own + i, sum);
            Weights x = weigh(&maximum, &sum, k, loadv(decay + i), loadv(bonus + i), call->bonus != NULL);
            storev(m + i, maximum), storev(d + i, sum);
            storev(to->f + own + i, x.f), storev(to->p + own + i, x.p), storev(to->a + own + i, x.a);
            storev(to->c + own + i, x.c), storev(to->won + own + i, (vf)x.won);
            if (call->per == 1) {
                vf before = loadv(n + i), v = load_lanes(call->v, at + i, part->n - i, bf16);
                storev(to->n + own + i, before), storev(n + i, x.f * before + x.p * v);
            }
        }
    }
}

/* Gradients of 16 scores at one step, from do n, do v, G n and G v summed over their values. Returns that of the scores. */
INLINE vf score_gradient(const Chunk *chunk, i64 at, i64 i, vf do_n, vf do_v, vf g_n, vf g_v, const Gradients *g,
                         int has_bonus) {
    vf f = loadv(chunk->f + at), p = loadv(chunk->p + at), a = loadv(chunk->a + at), c = loadv(chunk->c + at);
    vf d = loadv(chunk->d + at), h = loadv(g->denominator + i), mu = loadv(g->maximum + i), none = splat(0.0f);
    vi won = (vi)loadv(chunk->won + at);
    vf own = c * (a * (d * do_v - do_n));
    vf moved = f * (g_n + h * d) + selectv(won, none, mu);
    storev(g->decay + i, loadv(g->decay + i) + (has_bonus ? moved : moved - own));
    storev(g->bonus + i, loadv(g->bonus + i) + own);
    storev(g->denominator + i, f * h - a * (a * do_n + c * do_v));
    storev(g->maximum + i, selectv(won, none, mu));
    return own + p * (g_v + h) + selectv(won, mu, none);
}

/* Back through a chunk, a score for each channel. */
INLINE void back_channels(const Call *call, const Part *part, i64 start, i64 stop, const Chunk *chunk, const void *dout,
                          const Gradients *g, void *dk, void *dv, int stream, const int bf16) {
    i64 ahead = start ? CHUNK * call->scores : 0;
    for (i64 t = stop - 1; t >= start; t--) {
        i64 at = (part->b * call->time + t) * call->scores + part->first, own = (t - start) * part->row;
        if (code_of(call, part, t) == SKIPPED) {
            zero_row(dk, at, part->n, bf16), zero_row(dv, at, part->n, bf16);
            continue;
        }
        for (i64 i = 0; i < part->row; i += LANES) {
            i64 left = part->n - i;
            fetch(call->k, at + i - ahead, bf16), fetch(call->v, at + i - ahead, bf16), fetch(dout, at + i - ahead, bf16);
            vf v = load_lanes(call->v, at + i, left, bf16), o = load_lanes(dout, at + i, left, bf16);
            vf n = loadv(chunk->n + own + i), later = loadv(g->numerator + i);
            vf dscore = score_gradient(chunk, own + i, i, o * n, o * v, later * n, later * v, g, call->bonus != NULL);
            put(dk, at + i, dscore, left, bf16, stream);
            put(dv, at + i, loadv(chunk->c + own + i) * o + loadv(chunk->p + own + i) * later, left, bf16, stream);
            storev(g->numerator + i, loadv(chunk->f + own + i) * later + loadv(chunk->a + own + i) * o);
        }
    }
}

/* Back through a chunk for the values of one score; sums over them go to rows of `sums`: do n, do v, G n, G v. */
INLINE void back_values(const Call *call, const Part *part, i64 head, i64 start, i64 stop, const Chunk *chunk,
                        float *n, float *g, const void *dout, void *dv, float *sums, int stream, const int bf16) {
    i64 per = call->per, padded = PADDED(per), ahead = start ? CHUNK * call->scores * per : 0;
    float *before = chunk->n;
    for (i64 t = start; t < stop; t++, before += padded) {
        i64 at = ((part->b * call->time + t) * call->scores + part->first + head) * per;
        int code = code_of(call, part, t);
        if (code == SKIPPED) continue;
        vf f = splat(chunk->f[(t - start) * part->row + head]), p = splat(chunk->p[(t - start) * part->row + head]);
        if (code == BEGINS) memset(n, 0, (size_t)padded * 4);
        for (i64 i = 0; i < per; i += LANES) {
            vf old = loadv(n + i);
            storev(before + i, old), storev(n + i, f * old + p * load_lanes(call->v, at + i, per - i, bf16));
        }
    }
    vf do_n[CHUNK] = {0}, do_v[CHUNK] = {0}, g_n[CHUNK] = {0}, g_v[CHUNK] = {0};
    for (i64 t = stop - 1; t >= start; t--) {
        i64 at = ((part->b * call->time + t) * call->scores + part->first + head) * per, own = t - start;
        if (code_of(call, part, t) == SKIPPED) {
            zero_row(dv, at, per, bf16);
            continue;
        }
        const float *x = chunk->f + own * part->row + head, *y = chunk->a + own * part->row + head;
        vf f = splat(x[0]), a = splat(y[0]), p = splat(chunk->p[own * part->row + head]);
        vf c = splat(chunk->c[own * part->row + head]), s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
        for (i64 i = 0; i < per; i += LANES) {
            fetch(call->v, at + i - ahead, bf16), fetch(dout, at + i - ahead, bf16);
            vf v = load_lanes(call->v, at + i, per - i, bf16), o = load_lanes(dout, at + i, per - i, bf16);
            vf old = loadv(chunk->n + own * padded + i), later = loadv(g + i);
            s0 += o * old, s1 += o * v, s2 += later * old, s3 += later * v;
            put(dv, at + i, c * o + p * later, per - i, bf16, stream);
            storev(g + i, f * later + a * o);
        }
        do_n[own] = s0, do_v[own] = s1, g_n[own] = s2, g_v[own] = s3;
    }
    vf *all[4] = {do_n, do_v, g_n, g_v};
    for (int q = 0; q < 4; q++) {
        vf sum = sum_rows(all[q]); /* lane t of it belongs to step start + t */
        for (i64 t = 0; t < stop - start; t++) sums[(q * CHUNK + t) * part->row + head] = sum[t];
    }
}
INLINE void back_scores(const Call *call, const Part *part, i64 start, i64 stop, const Chunk *chunk, const float *sums,
                        const Gradients *g, void *dk, const int bf16) {
    i64 all = CHUNK * part->row;
    for (i64 t = stop - 1; t >= start; t--) {
        i64 at = (part->b * call->time + t) * call->scores + part->first, own = (t - start) * part->row;
        if (code_of(call, part, t) == SKIPPED) {
            zero_row(dk, at, part->n, bf16);
            continue;
        }
        for (i64 i = 0; i < part->row; i += LANES) {
            const float *s = sums + own + i;
            vf dscore = score_gradient(chunk, own + i, i, loadv(s), loadv(s + all), loadv(s + 2 * all), loadv(s + 3 * all),
                                       g, call->bonus != NULL);
            store_lanes(dk, at + i, dscore, part->n - i, bf16);
        }
    }
}

/* to[i] += sign * (sum of the values of score i of n * g, + d[i] * h[i]). */
static void add_pair(const Part *part, i64 per, float sign, const float *n, const float *g, const float *d, const float *h,
                     float *to) {
    for (i64 i = 0; i < part->n; i++) {
        float sum = d[i] * h[i];
        if (per == 1) sum += n[i] * g[i];
        else {
            vf products = {0};
            for (i64 j = i * PADDED(per); j < (i + 1) * PADDED(per); j += LANES) products += loadv(n + j) * loadv(g + j);
            sum += sumv(products);
        }
        to[i] += sign * sum;
    }
}

INLINE void backward(const Call *call, const void *dout, const float *const dfinal[3], void *dk, void *dv,
                     float *const dinitial[3], float *ddecay, float *dbonus, const int bf16) {
    i64 block = block_of(call), per = call->per, tasks = tasks_of(call, block), scores = call->scores;
    i64 rows = call->batch * call->time, chunks = (call->time + CHUNK - 1) / CHUNK, bytes = bf16 ? 2 : 4;
    int stream = streamable(dv, rows, scores * per, bf16) && (per > 1 || streamable(dk, rows, scores, bf16));
    stream = stream && (per == 1 || per % LANES == 0);
    huge_pages(dk, rows * scores * bytes), huge_pages(dv, rows * scores * per * bytes);
    float *partial = scratch(2 * call->batch * scores); /* of each batch row: of the decay, of the bonus */
#pragma omp parallel for num_threads(call->threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        Part part = part_of(call, task, block);
        i64 at = part.b * scores + part.first, row = part.row, kept_values = per > 1 ? PADDED(per) : row;
        float *m = scratch((10 + 10 * CHUNK) * row + 3 * part.value_row + CHUNK * kept_values), *d = m + row;
        float *decay = d + row, *bonus = decay + row, *total = bonus + row, *first = total + 2 * row;
        Gradients g = {first + 4 * row, first, first + row, first + 2 * row, first + 3 * row};
        float *n = g.numerator + part.value_row, *last = n + part.value_row, *f = last + part.value_row;
        i64 all = CHUNK * row;
        Chunk chunk = {f, f + all, f + 2 * all, f + 3 * all, f + 4 * all, f + 5 * all, f + 10 * all};
        float *sums = f + 6 * all;
        parameters(call, &part, decay, bonus);
        load_row(g.maximum, dfinal[0], at, part.n, 0), load_row(g.denominator, dfinal[2], at, part.n, 0);
        gather(g.numerator, dfinal[1], at * per, &part, per);
        memcpy(last, g.numerator, (size_t)part.value_row * 4);
        for (i64 number = chunks - 1; number >= 0; number--) {
            i64 start = number * CHUNK, stop = MIN(call->time, start + CHUNK);
            recall(call, &part, number, m, n, d);
            remake(call, &part, start, stop, m, n, d, decay, bonus, &chunk, bf16);
            if (per > 1)
                for (i64 h = 0; h < part.n; h++)
                    back_values(call, &part, h, start, stop, &chunk, n + h * PADDED(per), g.numerator + h * PADDED(per),
                                dout, dv, sums, stream, bf16);
            /* n and d are now those after the last step: what the maximum's gradient has beyond the pair's. */
            if (number == chunks - 1) add_pair(&part, per, -1, n, last, d, g.denominator, g.maximum);
            if (per > 1) back_scores(call, &part, start, stop, &chunk, sums, &g, dk, bf16);
            else back_channels(call, &part, start, stop, &chunk, dout, &g, dk, dv, stream, bf16);
            for (i64 i = 0; i < row; i++) total[i] += g.decay[i], total[row + i] += g.bonus[i]; /* short sums: exact */
            memset(g.decay, 0, (size_t)row * 8);
        }
        recall(call, &part, 0, m, n, d);
        add_pair(&part, per, 1, n, g.numerator, d, g.denominator, g.maximum);
        store_row(dinitial[0], at, g.maximum, part.n, 0), store_row(dinitial[2], at, g.denominator, part.n, 0);
        scatter(dinitial[1], at * per, g.numerator, &part, per);
        store_row(partial, at, total, part.n, 0), store_row(partial + call->batch * scores, at, total + row, part.n, 0);
        stream_end();
        free(m);
    }
    for (i64 i = 0; i < scores; i++) {
        ddecay[i] = dbonus[i] = 0;
        for (i64 b = 0; b < call->batch; b++) {
            ddecay[i] += partial[b * scores + i];
            dbonus[i] += partial[(call->batch + b) * scores + i];
        }
    }
    free(partial);
}

/* The state is three tensors (B, S), (B, S * per), (B, S): maximum, numerator, denominator. `initial` may be NULLs. */
void softmax_scan_forward(const void *k, const void *v, const float *decay, const float *bonus, const float *maximum,
                          const float *numerator, const float *denominator, const uint8_t *codes, void *out,
                          float *to_maximum, float *to_numerator, float *to_denominator, float *kept, i64 batch, i64 time,
                          i64 scores, i64 per, i64 threads, i64 bf16) {
    Call call = {k, v, decay, bonus, codes, kept, batch, time, scores, per, threads};
    const float *initial[3] = {maximum, numerator, denominator};
    float *final[3] = {to_maximum, to_numerator, to_denominator};
    if (bf16) forward(&call, initial, out, final, 1);
    else forward(&call, initial, out, final, 0);
}

void softmax_scan_backward(const void *k, const void *v, const float *decay, const float *bonus, const uint8_t *codes,
                           float *kept, const void *dout, const float *maximum, const float *numerator,
                           const float *denominator, void *dk, void *dv, float *ddecay, float *dbonus, float *to_maximum,
                           float *to_numerator, float *to_denominator, i64 batch, i64 time, i64 scores, i64 per,
                           i64 threads, i64 bf16) {
    Call call = {k, v, decay, bonus, codes, kept, batch, time, scores, per, threads};
    const float *dfinal[3] = {maximum, numerator, denominator};
    float *dinitial[3] = {to_maximum, to_numerator, to_denominator};
    if (bf16) backward(&call, dout, dfinal, dk, dv, dinitial, ddecay, dbonus, 1);
    else backward(&call, dout, dfinal, dk, dv, dinitial, ddecay, dbonus, 0);
}

/* One step of decoding, in place on the state. Its one argument is a structure because ctypes takes 0.15 microseconds for
 * each argument, and a small step not many more for its work. */
typedef struct {
    const void *k, *v;
    const float *decay, *bonus; /* (S,) or NULL */
    float *maximum, *numerator, *denominator;
    void *out;
    i64 batch, scores, per, threads, bf16;
} Step;

/* Values of a task, and of a step below which waking other threads takes longer than the work. */
enum { STEP_BLOCK = 512, FEW_STEPS = 1 << 13 };

/* The weights of 16 scores from score i of a batch row on; maximum and denominator go on. */
INLINE Weights step_weights(const Step *s, i64 row, i64 i, const int bf16) {
    i64 at = row * s->scores + i, left = s->scores - i;
    vf m = load_lanes(s->maximum, at, left, 0), d = load_lanes(s->denominator, at, left, 0), none = splat(0.0f);
    vf decay = s->decay ? load_lanes(s->decay, i, left, 0) : none, bonus = s->bonus ? load_lanes(s->bonus, i, left, 0) : none;
    Weights x = weigh(&m, &d, load_lanes(s->k, at, left, bf16), decay, bonus, s->bonus != NULL);
    store_lanes(s->maximum, at, m, left, 0), store_lanes(s->denominator, at, d, left, 0);
    return x;
}
INLINE void step_values(const Step *s, i64 at, i64 left, vf f, vf p, vf a, vf c, const int bf16) {
    vf v = load_lanes(s->v, at, left, bf16), before = load_lanes(s->numerator, at, left, 0);
    store_lanes(s->out, at, a * before + c * v, left, bf16);
    store_lanes(s->numerator, at, f * before + p * v, left, 0);
}
INLINE void step_block(const Step *s, i64 row, i64 first, i64 stop, const int bf16) {
    for (i64 i = first; i < stop; i += LANES) {
        Weights x = step_weights(s, row, i, bf16);
        i64 at = row * s->scores + i, left = MIN(LANES, s->scores - i);
        if (s->per == 1) {
            step_values(s, at, left, x.f, x.p, x.a, x.c, bf16);
            continue;
        }
        for (i64 h = 0; h < left; h++) {
            vf f = splat(x.f[h]), p = splat(x.p[h]), a = splat(x.a[h]), c = splat(x.c[h]);
            for (i64 j = 0; j < s->per; j += LANES)
                step_values(s, (at + h) * s->per + j, s->per - j, f, p, a, c, bf16);
        }
    }
}

void softmax_scan_step(const Step *s) {
    i64 block = s->per > 1 ? LANES : STEP_BLOCK, blocks = (s->scores + block - 1) / block, tasks = s->batch * blocks;
    i64 threads = s->batch * s->scores * s->per < FEW_STEPS ? 1 : MIN(s->threads, tasks);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * block, stop = MIN(s->scores, first + block);
        if (s->bf16) step_block(s, row, first, stop, 1);
        else step_block(s, row, first, stop, 0);
    }
}
