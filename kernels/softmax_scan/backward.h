/* Parts back through time. */
#pragma once
#include "parts.h"

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
