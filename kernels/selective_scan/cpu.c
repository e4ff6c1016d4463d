/* Selective scan on the CPU: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t.
 *
 * The work is bound by arithmetic, half of it the exponential. Lanes are 16 channels; a tile of 4 state numbers stays in
 * registers while it walks through a chunk of steps. One task is a batch row and a group of channels. dB and dC are sums
 * over all channels: each group sums its own, a second pass adds the groups up. How channels are grouped depends on their
 * number alone, so neither the number of threads nor the run changes a bit of the result.
 *
 * Backward goes from the last chunk to the first, and makes each chunk's states again from the state before it, which
 * forward kept; decays and states of one tile and chunk stay in the first-level cache.
 *     g_t = C_t dy_t + e_{t+1} g_{t+1}     with e_t = exp(dt_t A), u_t = dt_t x_t
 *     dB_t = sum_d g_t u_t      dC_t = sum_d h_t dy_t      du_t = sum_n g_t B_t      dz_t = g_t e_t h_{t-1}
 *     dA = sum_t dz_t dt_t      ddt_t = sum_n dz_t A + du_t x_t      dx_t = du_t dt_t + D dy_t
 *
 * (B, T, D) and (B, T, N) tensors are contiguous, float32 or bfloat16 (bf16 = 1); A (D, N), D and states are float32. */
#include "vec.h"

enum { CHUNK = 32, TILE = 4 };
static const float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

typedef struct {
    const void *x, *dt, *b, *c;
    const float *a, *d;
    const uint8_t *codes;
    i64 batch, time, width, states, bf16;
    i64 chunks, blocks, padded;      /* of steps; of 16 channels; state numbers as whole tiles */
    i64 groups, blocks_a_group;      /* of channels */
    i64 stream;                      /* whether (B, T, D) outputs go past the caches */
} Scan;

static Scan scan_of(const void *x, const void *dt, const float *a, const void *b, const void *c, const float *d,
                    const uint8_t *codes, i64 batch, i64 time, i64 width, i64 states, i64 bf16) {
    Scan s = {x, dt, b, c, a, d, codes, batch, time, width, states, bf16};
    s.chunks = (time + CHUNK - 1) / CHUNK, s.blocks = (width + LANES - 1) / LANES;
    s.padded = (states + TILE - 1) / TILE * TILE;
    s.groups = 1;
    /* Up to 8 groups of two blocks or more, 16 of four: each costs memory for its sums. */
    while (2 * s.groups * (s.groups < 8 ? 2 : 4) <= s.blocks && s.groups < 16) s.groups *= 2;
    s.blocks_a_group = (s.blocks + s.groups - 1) / s.groups;
    s.groups = (s.blocks + s.blocks_a_group - 1) / s.blocks_a_group;
    return s;
}

/* The valid steps of a chunk, an even number of them: an appended step has dt = x = B = C = 0 and changes nothing. */
typedef struct {
    i64 count, even, at[CHUNK]; /* at: row of the (B T, ...) tensors */
    uint8_t begins[CHUNK];
    float *b, *c;               /* (CHUNK, padded) */
} Steps;

static void load_steps(Steps *steps, const Scan *s, i64 batch, i64 chunk) {
    i64 start = batch * s->time + chunk * CHUNK, stop = MIN(start + CHUNK, (batch + 1) * s->time), n = 0;
    for (i64 t = start; t < stop; t++) {
        int code = s->codes ? s->codes[t] : CONTINUES;
        if (code == SKIPPED) continue;
        steps->at[n] = t, steps->begins[n] = code == BEGINS;
        float row[PADDED(s->states)];
        load_row(row, s->b, t * s->states, s->states, (int)s->bf16);
        memcpy(steps->b + n * s->padded, row, (size_t)s->states * 4);
        load_row(row, s->c, t * s->states, s->states, (int)s->bf16);
        memcpy(steps->c + n * s->padded, row, (size_t)s->states * 4);
        n++;
    }
    steps->count = n, steps->even = (n + 1) / 2 * 2;
    if (n % 2) {
        steps->begins[n] = 0;
        memset(steps->b + n * s->padded, 0, (size_t)s->padded * 4);
        memset(steps->c + n * s->padded, 0, (size_t)s->padded * 4);
    }
}

/* One vector of 16 channels a step, from or to a (B, T, D) tensor. */
static void load_channels(vf *rows, const void *tensor, const Steps *steps, const Scan *s, i64 block) {
    i64 first = block * LANES, n = MIN(LANES, s->width - first);
    for (i64 t = 0; t < steps->count; t++) load_row((float *)(rows + t), tensor, steps->at[t] * s->width + first, n, (int)s->bf16);
    if (steps->count % 2) rows[steps->count] = splat(0);
}
static void store_channels(void *tensor, const vf *rows, const Steps *steps, const Scan *s, i64 block) {
    i64 first = block * LANES, n = MIN(LANES, s->width - first);
    for (i64 t = 0; t < steps->count; t++) {
        i64 at = steps->at[t] * s->width + first;
        if (s->stream) stream_lanes(tensor, at, rows[t], 0);
        else store_row(tensor, at, (const float *)(rows + t), n, (int)s->bf16);
    }
}
/* Of float32 alone: 16 numbers in bfloat16 are half a cache line, and half lines are slow to write past the caches. */
static i64 streams(const void *tensor, const Scan *s) {
    return !s->bf16 && streamable(tensor, s->batch * s->time, s->width, 0);
}
/* What the next chunk of a block reads. It lies far apart, and hardware does not guess it; asked for all at once it would
 * fill the queues for half of a chunk's time, so each tile asks for its share, a line a step. */
enum { AHEAD = 6 };
typedef struct {
    const char *at[AHEAD];
    i64 stride[AHEAD], count;
} Ahead;

static void look_ahead(Ahead *ahead, const void *tensor, const Scan *s, i64 batch, i64 chunk, i64 block) {
    i64 size = s->bf16 ? 2 : 4, first = (batch * s->time + chunk * CHUNK) * s->width + block * LANES;
    ahead->at[ahead->count] = (const char *)tensor + first * size;
    ahead->stride[ahead->count++] = s->width * size;
}
INLINE void fetch(const Ahead *ahead, i64 t, i64 from, i64 padded) {
    for (i64 i = from / TILE; i < ahead->count; i += padded / TILE)
        __builtin_prefetch(ahead->at[i] + t * ahead->stride[i], 0, 2);
}
static void zero_skipped(void *tensor, const Scan *s, i64 batch, i64 chunk, i64 first_block, i64 stop_block) {
    i64 start = batch * s->time + chunk * CHUNK, stop = MIN(start + CHUNK, (batch + 1) * s->time);
    i64 first = first_block * LANES, n = MIN(stop_block * LANES, s->width) - first;
    for (i64 t = start; s->codes && t < stop; t++)
        if (s->codes[t] == SKIPPED) zero_row(tensor, t * s->width + first, n, (int)s->bf16);
}

/* A (D, N) matrix as (N padded, 16) lanes of one block of channels, times `factor`; and back. */
static void lanes_of_matrix(vf *lanes, const float *matrix, float factor, const Scan *s, i64 block) {
    i64 first = block * LANES, n = MIN(LANES, s->width - first);
    memset(lanes, 0, (size_t)s->padded * sizeof(vf));
    for (i64 i = 0; matrix && i < n; i++)
        for (i64 j = 0; j < s->states; j++) ((float *)(lanes + j))[i] = matrix[(first + i) * s->states + j] * factor;
}
static void matrix_of_lanes(float *matrix, const vf *lanes, const Scan *s, i64 block) {
    i64 first = block * LANES, n = MIN(LANES, s->width - first);
    for (i64 i = 0; i < n; i++)
        for (i64 j = 0; j < s->states; j++) matrix[(first + i) * s->states + j] = ((const float *)(lanes + j))[i];
}

/* D of a block of channels; zeros without one. */
static vf skip_of(const Scan *s, i64 block) {
    vf skip = splat(0);
    if (s->d) load_row((float *)&skip, s->d, block * LANES, MIN(LANES, s->width - block * LANES), 0);
    return skip;
}

INLINE vf absv(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE int all(vi condition) {
    uint64_t pairs[LANES / 2], both = ~(uint64_t)0;
    memcpy(pairs, &condition, sizeof pairs);
    for (int i = 0; i < LANES / 2; i++) both &= pairs[i];
    return both == ~(uint64_t)0;
}
/* Largest |A| of each channel, and whether no exponent of this chunk leaves the range of `exp2v_within`. */
static vf largest(const vf *a, const Scan *s) {
    vf top = splat(0);
    for (i64 j = 0; j < s->padded; j++) top = maxv(absv(a[j]), top);
    return top;
}
static int is_small(const vf *dt, vf top, const Steps *steps) {
    vf most = splat(0);
    for (i64 t = 0; t < steps->count; t++) most = maxv(absv(dt[t]), most);
    return all(most * top < 126.0f);
}
/* exp(dt A); a is A / ln 2. */
INLINE vf decay(vf dt, vf a, const int small) { return small ? exp2v_within(dt * a) : exp2v(dt * a); }

INLINE void forward_tile(vf *state, const vf *a, const vf *dt, const vf *u, vf *y, i64 from, const Steps *steps, i64 padded,
                         const Ahead *ahead, const int small) {
    vf h[TILE], rate[TILE];
    for (int j = 0; j < TILE; j++) h[j] = state[from + j], rate[j] = a[from + j];
    for (i64 t = 0; t < steps->count; t++) {
        const float *b = steps->b + t * padded + from, *c = steps->c + t * padded + from;
        vf out = y[t];
        fetch(ahead, t, from, padded);
        if (steps->begins[t])
            for (int j = 0; j < TILE; j++) h[j] = splat(0);
        for (int j = 0; j < TILE; j++) {
            h[j] = decay(dt[t], rate[j], small) * h[j] + u[t] * b[j];
            out += c[j] * h[j];
        }
        y[t] = out;
    }
    for (int j = 0; j < TILE; j++) state[from + j] = h[j];
}

static void forward_block(vf *state, const vf *a, const Steps *steps, const Scan *s, i64 block, void *y,
                          const Ahead *ahead) {
    vf dt[CHUNK], u[CHUNK], out[CHUNK], skip = skip_of(s, block);
    load_channels(dt, s->dt, steps, s, block);
    load_channels(u, s->x, steps, s, block);
    for (i64 t = 0; t < steps->count; t++) out[t] = skip * u[t], u[t] *= dt[t];
    int small = is_small(dt, largest(a, s), steps);
    for (i64 from = 0; from < s->padded; from += TILE)
        if (small) forward_tile(state, a, dt, u, out, from, steps, s->padded, ahead, 1);
        else forward_tile(state, a, dt, u, out, from, steps, s->padded, ahead, 0);
    store_channels(y, out, steps, s, block);
}

/* Scratch of one task: A and states of its blocks, B and C of a chunk. */
static Steps steps_in(float *room, const Scan *s) { return (Steps){.b = room, .c = room + CHUNK * s->padded}; }

/* kept: (B, chunks, blocks, padded, 16), the state before each chunk of 32 steps, or NULL. final: (B, D, N). */
void selective_scan_forward(const void *x, const void *dt, const float *a, const void *b, const void *c, const float *d,
                            const float *initial, const uint8_t *codes, void *y, float *final, float *kept, i64 batch,
                            i64 time, i64 width, i64 states, i64 threads, i64 bf16) {
    Scan s = scan_of(x, dt, a, b, c, d, codes, batch, time, width, states, bf16);
    s.stream = streams(y, &s);
    huge_pages(y, batch * time * width * (bf16 ? 2 : 4));
    if (kept) huge_pages(kept, batch * s.chunks * s.blocks * s.padded * LANES * 4);
    int past_caches = kept && streamable(kept, batch * s.chunks * s.blocks, s.padded * LANES, 0);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 task = 0; task < s.batch * s.groups; task++) {
        i64 row = task / s.groups, first = task % s.groups * s.blocks_a_group;
        i64 stop = MIN(first + s.blocks_a_group, s.blocks), n = (stop - first) * s.padded;
        vf *rates = (vf *)scratch(2 * n * LANES + 2 * CHUNK * s.padded), *state = rates + n;
        Steps steps = steps_in((float *)(state + n), &s);
        for (i64 block = first; block < stop; block++) {
            lanes_of_matrix(rates + (block - first) * s.padded, s.a, LOG2_E, &s, block);
            lanes_of_matrix(state + (block - first) * s.padded, initial ? initial + row * width * states : NULL, 1, &s, block);
        }
        for (i64 chunk = 0; chunk < s.chunks; chunk++) {
            i64 at = (row * s.chunks + chunk) * s.blocks + first;
            float *keep = kept ? kept + at * s.padded * LANES : NULL;
            if (kept && past_caches)
                for (i64 i = 0; i < n; i++) stream_lanes(keep, i * LANES, state[i], 0);
            else if (kept) memcpy(keep, state, (size_t)n * sizeof(vf));
            load_steps(&steps, &s, row, chunk);
            for (i64 block = first; block < stop; block++) {
                i64 own = (block - first) * s.padded;
                Ahead ahead = {.count = 0};
                if (chunk + 1 < s.chunks) {
                    look_ahead(&ahead, x, &s, row, chunk + 1, block), look_ahead(&ahead, dt, &s, row, chunk + 1, block);
                    if (!s.stream) look_ahead(&ahead, y, &s, row, chunk + 1, block);
                }
                forward_block(state + own, rates + own, &steps, &s, block, y, &ahead);
            }
            zero_skipped(y, &s, row, chunk, first, stop);
        }
        for (i64 block = first; block < stop; block++)
            matrix_of_lanes(final + row * width * states, state + (block - first) * s.padded, &s, block);
        stream_end();
        free(rates);
    }
}

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

/* kept: as forward wrote it. da (D, N), dd (D,) or NULL, dinitial (B, D, N): float32. */
void selective_scan_backward(const void *x, const void *dt, const float *a, const void *b, const void *c, const float *d,
                             const uint8_t *codes, const float *kept, const void *dy, const float *dfinal, void *dx, void *ddt,
                             float *da, void *db, void *dc, float *dd, float *dinitial, i64 batch, i64 time, i64 width,
                             i64 states, i64 threads, i64 bf16) {
    Scan s = scan_of(x, dt, a, b, c, d, codes, batch, time, width, states, bf16);
    s.stream = streams(dx, &s) && streams(ddt, &s);
    i64 part = batch * time * 2 * states;
    float *parts = malloc((size_t)(s.groups * part) * sizeof(float));
    vf *sum_a = (vf *)scratch(batch * s.blocks * (s.padded + 1) * LANES), *sum_d = sum_a + batch * s.blocks * s.padded;
    if (!parts) abort();
    i64 bytes = batch * time * width * (bf16 ? 2 : 4);
    huge_pages(dx, bytes), huge_pages(ddt, bytes), huge_pages(parts, s.groups * part * 4);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 task = 0; task < batch * s.groups; task++) {
        i64 row = task / s.groups, group = task % s.groups;
        backward_task(&s, row, group, kept, dy, dfinal, dx, ddt, dinitial, parts + group * part,
                      sum_a + row * s.blocks * s.padded, sum_d + row * s.blocks);
    }
    add_parts(&s, parts, sum_a, sum_d, db, dc, da, dd, threads);
    free(sum_a);
    free(parts);
}

/* One step of 16 channels with 16 state numbers, in place on h (16, 16): C h. z: exponents by channel, base 2. */
INLINE vf step_rows(float *h, vf *z, vf b, vf c, const float *u, const int small) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        vf next = (small ? exp2v_within(z[i]) : exp2v(z[i])) * loadv(h + i * LANES) + u[i] * b;
        storev(h + i * LANES, next);
        z[i] = next * c;
    }
    return sum_rows(z);
}
/* Not inline, so that rate and u are broadcast from memory; from registers that takes shuffles. */
static __attribute__((noinline)) vf step_square(float *h, const float *a, const float *b, const float *c, const float *rate,
                                                const float *u) {
    vf z[LANES], squares = splat(0);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) z[i] = rate[i] * loadv(a + i * LANES), squares += z[i] * z[i];
    if (all(squares < 126.0f * 126.0f)) return step_rows(h, z, loadv(b), loadv(c), u, 1);
    return step_rows(h, z, loadv(b), loadv(c), u, 0);
}
/* The same of n channels with any number of state numbers; b and c are padded rows. */
static vf step_any(float *h, const float *a, const float *b, const float *c, const float *rate, const float *u, i64 n,
                   i64 states) {
    vf rows[LANES];
    for (i64 i = 0; i < LANES; i++) {
        rows[i] = splat(0);
        for (i64 j = 0; i < n && j < states; j += LANES) {
            i64 at = i * states + j, few = states - j;
            vf next = exp2v(rate[i] * load_lanes(a, at, few, 0)) * load_lanes(h, at, few, 0) + u[i] * loadv(b + j);
            store_lanes(h, at, next, few, 0);
            rows[i] += next * loadv(c + j);
        }
    }
    return sum_rows(rows);
}

/* One step of decoding, in place on state (B, D, N); y (B, D). Lanes are state numbers here, as they lie in memory. A
 * structure, because ctypes takes 0.15 microseconds for each argument, and a small step not many more for its work. */
typedef struct {
    const void *x, *dt;
    const float *a;
    const void *b, *c;
    const float *d; /* (D,) or NULL */
    float *state;
    void *y;
    i64 batch, width, states, threads, bf16;
} Step;

void selective_scan_step(const Step *s) {
    i64 width = s->width, states = s->states, blocks = (width + LANES - 1) / LANES, tasks = s->batch * blocks;
    i64 threads = s->batch * width * states < 1 << 14 ? 1 : s->threads; /* waking the others takes longer */
    int bf16 = (int)s->bf16;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 task = 0; task < tasks; task++) {
        i64 row = task / blocks, first = task % blocks * LANES, n = MIN(LANES, width - first), at = row * width + first;
        float maps[2 * PADDED(states)], *to_y = maps + PADDED(states);
        load_row(maps, s->b, row * states, states, bf16);
        load_row(to_y, s->c, row * states, states, bf16);
        vf input = load_lanes(s->x, at, n, bf16), dts = load_lanes(s->dt, at, n, bf16), out;
        float rate[LANES], u[LANES];
        storev(rate, dts * LOG2_E), storev(u, dts * input);
        float *h = s->state + at * states;
        const float *own = s->a + first * states;
        if (n == LANES && states == LANES) out = step_square(h, own, maps, to_y, rate, u);
        else out = step_any(h, own, maps, to_y, rate, u, n, states);
        if (s->d) out += input * load_lanes(s->d, first, n, 0);
        store_lanes(s->y, at, out, n, bf16);
    }
}
