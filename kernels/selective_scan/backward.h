/* Tiles, blocks and groups back through time. */
#pragma once
#include "scan.h"

/* Of one block of channels and one chunk, a vector a step. */
typedef struct {
    vf dt[CHUNK], x[CHUNK], u[CHUNK], dy[CHUNK], du[CHUNK], dz[CHUNK]; /* dz: sum over n of dz_t A / ln 2 */
} Rows;

/* Gradients of one tile. sums: (CHUNK / 2, 16) vectors' lanes: [step of the pair][dB, dC][4 state numbers], added to. */
INLINE void backward_tile(const vf *before, const vf *a, vf *carry, vf *da, Rows *r, vf *sums, i64 from, const Steps *steps,
                          i64 padded, const Ahead *ahead, const int small) {
    vf e[CHUNK][TILE], h[CHUNK + 1][TILE], g[TILE], grad_a[TILE];
    for (int j = 0; j < TILE; j++) h[0][j] = before[from + j], g[j] = carry[from + j], grad_a[j] = splat(0);
    for (i64 t = 0; t < steps->even; t++) {
        const float *b = steps->b + t * padded + from;
        fetch(ahead, t, from, padded);
        for (int j = 0; j < TILE; j++) e[t][j] = decay(r->dt[t], a[from + j], small);
        if (steps->begins[t])
            for (int j = 0; j < TILE; j++) e[t][j] = splat(0);
        for (int j = 0; j < TILE; j++) h[t + 1][j] = e[t][j] * h[t][j] + r->u[t] * b[j];
    }
    for (i64 pair = steps->even / 2 - 1; pair >= 0; pair--) {
        vf rows[LANES];
        for (int odd = 1; odd >= 0; odd--) {
            i64 t = 2 * pair + odd;
            const float *b = steps->b + t * padded + from, *c = steps->c + t * padded + from;
            vf dt = r->dt[t], u = r->u[t], dy = r->dy[t], du = r->du[t], dz = r->dz[t];
            for (int j = 0; j < TILE; j++) {
                rows[8 * odd + 4 + j] = dy * h[t + 1][j];
                g[j] += dy * c[j];
                rows[8 * odd + j] = g[j] * u;
                du += g[j] * b[j];
                g[j] *= e[t][j];
                vf one = g[j] * h[t][j];
                dz += one * a[from + j];
                grad_a[j] += one * dt;
            }
            r->du[t] = du, r->dz[t] = dz;
        }
        sums[pair] += sum_rows(rows);
    }
    for (int j = 0; j < TILE; j++) carry[from + j] = g[j], da[from + j] += grad_a[j];
}

typedef struct {
    void *dx, *ddt;
    vf *carry, *da, *dd; /* of the block: g of the step after, sums over time */
    vf *sums;            /* (padded / TILE, CHUNK / 2): see backward_tile; over the blocks of the group */
} Gradients;

static void backward_block(const vf *before, const vf *a, const void *dy, const Gradients *to, const Steps *steps,
                           const Scan *s, i64 block, const Ahead *ahead) {
    Rows r;
    vf skip = skip_of(s, block), dd = splat(0);
    load_channels(r.dt, s->dt, steps, s, block);
    load_channels(r.x, s->x, steps, s, block);
    load_channels(r.dy, dy, steps, s, block);
    for (i64 t = 0; t < steps->even; t++) r.u[t] = r.dt[t] * r.x[t], r.du[t] = r.dz[t] = splat(0);
    int small = is_small(r.dt, largest(a, s), steps);
    for (i64 from = 0; from < s->padded; from += TILE) {
        vf *sums = to->sums + from / TILE * (CHUNK / 2);
        if (small) backward_tile(before, a, to->carry, to->da, &r, sums, from, steps, s->padded, ahead, 1);
        else backward_tile(before, a, to->carry, to->da, &r, sums, from, steps, s->padded, ahead, 0);
    }
    for (i64 t = 0; t < steps->count; t++) {
        dd += r.dy[t] * r.x[t];
        r.u[t] = r.dz[t] * LN_2 + r.du[t] * r.x[t];
        r.dz[t] = r.du[t] * r.dt[t] + skip * r.dy[t];
    }
    *to->dd += dd;
    store_channels(to->ddt, r.u, steps, s, block);
    store_channels(to->dx, r.dz, steps, s, block);
}

/* The sums of a group's chunk into rows (dB, dC) of `part`, (B T, 2 N). */
static void store_sums(float *part, const vf *sums, const Steps *steps, const Scan *s) {
    for (i64 t = 0; t < steps->count; t++)
        for (i64 j = 0; j < s->states; j++) {
            const float *at = (const float *)(sums + j / TILE * (CHUNK / 2) + t / 2) + t % 2 * 8 + j % TILE;
            float *row = part + steps->at[t] * 2 * s->states + j;
            row[0] = at[0], row[s->states] = at[TILE];
        }
}

/* One batch row and group of channels. part: its (B T, 2 N). da, dd: (blocks, padded) and (blocks) of the batch row. */
static void backward_task(const Scan *s, i64 row, i64 group, const float *kept, const void *dy, const float *dfinal, void *dx,
                          void *ddt, float *dinitial, float *part, vf *da, vf *dd) {
    i64 first = group * s->blocks_a_group, stop = MIN(first + s->blocks_a_group, s->blocks), n = (stop - first) * s->padded;
    i64 matrix = row * s->width * s->states, tiles = s->padded / TILE * (CHUNK / 2);
    vf *rates = (vf *)scratch((2 * n + tiles) * LANES + 2 * CHUNK * s->padded), *carry = rates + n, *sums = carry + n;
    Steps steps = steps_in((float *)(sums + tiles), s);
    for (i64 block = first; block < stop; block++) {
        lanes_of_matrix(rates + (block - first) * s->padded, s->a, LOG2_E, s, block);
        lanes_of_matrix(carry + (block - first) * s->padded, dfinal + matrix, 1, s, block);
    }
    for (i64 chunk = s->chunks - 1; chunk >= 0; chunk--) {
        load_steps(&steps, s, row, chunk);
        memset(sums, 0, (size_t)tiles * sizeof(vf));
        for (i64 block = first; block < stop; block++) {
            i64 own = (block - first) * s->padded;
            const vf *before = (const vf *)kept + ((row * s->chunks + chunk) * s->blocks + block) * s->padded;
            Ahead ahead = {.count = 0};
            if (chunk) {
                look_ahead(&ahead, s->x, s, row, chunk - 1, block), look_ahead(&ahead, s->dt, s, row, chunk - 1, block);
                look_ahead(&ahead, dy, s, row, chunk - 1, block);
                ahead.at[ahead.count] = (const char *)(before - s->blocks * s->padded);
                ahead.stride[ahead.count++] = sizeof(vf);
                if (!s->stream)
                    look_ahead(&ahead, dx, s, row, chunk - 1, block), look_ahead(&ahead, ddt, s, row, chunk - 1, block);
            }
            Gradients to = {dx, ddt, carry + own, da + block * s->padded, dd + block, sums};
            backward_block(before, rates + own, dy, &to, &steps, s, block, &ahead);
        }
        store_sums(part, sums, &steps, s);
        zero_skipped(dx, s, row, chunk, first, stop);
        zero_skipped(ddt, s, row, chunk, first, stop);
    }
    for (i64 block = first; block < stop; block++)
        matrix_of_lanes(dinitial + matrix, carry + (block - first) * s->padded, s, block);
    stream_end();
    free(rates);
}

/* Adds up what the groups and the batch rows found, always in the same order. */
static void add_parts(const Scan *s, const float *parts, const vf *da, const vf *dd, void *db, void *dc, float *grad_a,
                      float *grad_d, i64 threads) {
    i64 rows = s->batch * s->time, n = s->states;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 t = 0; t < rows; t++) {
        float sum[2 * n];
        memset(sum, 0, (size_t)n * 8);
        for (i64 group = 0; group < s->groups && !(s->codes && s->codes[t] == SKIPPED); group++)
            for (i64 j = 0; j < 2 * n; j++) sum[j] += parts[(group * rows + t) * 2 * n + j];
        store_row(db, t * n, sum, n, (int)s->bf16);
        store_row(dc, t * n, sum + n, n, (int)s->bf16);
    }
    for (i64 block = 0; block < s->blocks; block++) {
        vf sum[s->padded], skip = splat(0);
        memset(sum, 0, sizeof sum);
        for (i64 row = 0; row < s->batch; row++) {
            for (i64 j = 0; j < s->padded; j++) sum[j] += da[(row * s->blocks + block) * s->padded + j];
            skip += dd[row * s->blocks + block];
        }
        matrix_of_lanes(grad_a, sum, s, block);
        if (grad_d) store_row(grad_d, block * LANES, (const float *)&skip, MIN(LANES, s->width - block * LANES), 0);
    }
}
