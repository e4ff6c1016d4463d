/* Parts through time. */
#pragma once
#include "parts.h"

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
