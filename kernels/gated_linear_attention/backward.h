/* A head's walk back through time. */
#pragma once
#include "forward.h"

typedef struct {
    void *dq, *dk, *dv, *dg;              /* dg: double (B, Hk) with a constant decay, else float32 like g */
    double *dbonus;                       /* (B, H, K) */
    float *dinitial;
    const void *o, *dout;
    const float *kept, *denominators, *dfinal;
} Gradients;

typedef struct {
    float *states, *d_state, *d_state_t;                                           /* each V x K; K x V; V x K */
    float *d_out, *dv, *vt, *dq, *dk, *from_pairs, *from_state, *near, *q_dq, *k_dk; /* rows */
    float *d_scores, *at_start;                                                    /* SEGMENT x SEGMENT; one row */
} Room;

static i64 room_floats(const Call *c) {
    return 2 * c->kr * c->vr + SEGMENT * (3 * c->vr + 7 * c->kr + SEGMENT) + c->kr;
}
static float *room_rows(Room *r, const Call *c, float *room) {
    float **k_rows[] = {&r->dq, &r->dk, &r->from_pairs, &r->from_state, &r->near, &r->q_dq, &r->k_dk};
    float **v_rows[] = {&r->d_out, &r->dv, &r->vt};
    r->d_state = room, room += c->kr * c->vr;
    r->d_state_t = room, room += c->kr * c->vr;
    for (size_t i = 0; i < sizeof k_rows / sizeof *k_rows; i++) *k_rows[i] = room, room += SEGMENT * c->kr;
    for (size_t i = 0; i < sizeof v_rows / sizeof *v_rows; i++) *v_rows[i] = room, room += SEGMENT * c->vr;
    r->d_scores = room, room += SEGMENT * SEGMENT;
    r->at_start = room;
    return room + c->kr;
}

/* Transposed states (V x K) before each segment of the chunk; starts: where each begins. Returns how many there are. */
static i64 walk_states(const Call *c, Segment *s, Room *r, const float *kept, i64 *starts, i64 b, i64 h, i64 t, i64 stop) {
    i64 size = c->kr * c->vr, count = 0;
    float *first = r->d_state_t; /* free until the walk back begins */
    load_state(first, kept, c->key, c->columns, c->vr);
    memset(first + c->key * c->vr, 0, (size_t)((c->kr - c->key) * c->vr) * 4);
    transpose(r->states, first, c->kr, c->vr);
    while (t < stop) {
        starts[count] = t;
        t = load_segment(c, s, b, h, t, stop);
        if (!s->n) break;
        float *state = r->states + count++ * size;
        if (s->begins) memset(state, 0, (size_t)size * 4);
        if (t >= stop) break;
        Product p = {state + size, state, NULL, s->total, c->kr, s->v, 1, c->vr, s->k_end, c->kr};
        multiply(&p, c->columns, c->kr, s->n);
    }
    return count;
}

/* Gradient of o_t before `scale` and of its denominator, into row d. */
static void load_gradient(const Call *c, const Gradients *to, float *d, float *o, i64 at) {
    load_row(d, to->dout, at * c->value, c->value, c->bf16);
    vf factor = splat(c->scale);
    if (c->normalize) {
        float denominator = to->denominators[at];
        vf sum = {0};
        load_row(o, to->o, at * c->value, c->value, c->bf16);
        d[c->value] = o[c->value] = 0; /* the row before may have left something there */
        for (i64 i = 0; i < c->vr; i += LANES) sum += loadv(d + i) * loadv(o + i);
        d[c->value] = -sumv(sum);
        factor = splat(denominator == 0 ? 0 : c->scale / denominator);
    }
    for (i64 i = 0; i < c->vr; i += LANES) storev(d + i, loadv(d + i) * factor);
}

/* Adds what pairs of steps without a factor between them give: (t, t), or with a bonus (t, t - 1) and the bonus itself. */
static void add_near(const Call *c, const Segment *s, const Queries *u, Room *r, const float *near, const float *own,
                     double *dbonus) {
    i64 kr = c->kr, late = c->bonus != NULL;
    float sums[kr] __attribute__((aligned(64)));
    memset(sums, 0, sizeof sums);
    for (i64 t = 0; t < s->n; t++) {
        float *dq = r->dq + t * kr, *dk = r->near + t * kr;
        const float *q = u->q + t * kr, *k = s->k + t * kr;
        if (t >= late) {
            add_scaled(dq, near[t], k - late * kr, kr);
            add_scaled(dk - late * kr, near[t], q, kr);
        }
        if (!late) continue;
        vf d = splat(own[t]);
        for (i64 i = 0; i < kr; i += LANES) {
            vf by_q = d * loadv(q + i), by_k = d * loadv(k + i), bonus = loadv(u->bonus + i);
            storev(dq + i, loadv(dq + i) + by_k * bonus);
            storev(dk + i, loadv(dk + i) + by_q * bonus);
            storev(sums + i, loadv(sums + i) + by_q * loadv(k + i));
        }
    }
    for (i64 i = 0; late && i < c->key; i++) dbonus[i] += sums[i];
}

/* One query head in a segment: dq, and its share of dv, dk, dS. `state`: transposed, before the segment. */
static void backward_queries(const Call *c, const Segment *s, Queries *u, Room *r, const Gradients *to,
                             const float *state, i64 b, i64 h, i64 head) {
    i64 kr = c->kr, vr = c->vr, n = s->n, late = c->bonus != NULL;
    float near[SEGMENT], own[SEGMENT];
    prefetch(c, c->q, b, c->heads, head, c->key, s->step[0] - SEGMENT, c->bf16 ? 2 : 4);
    prefetch(c, to->dout, b, c->heads, head, c->value, s->step[0] - SEGMENT, c->bf16 ? 2 : 4);
    load_queries(c, s, u, b, head, 1);
    for (i64 t = 0; t < n; t++)
        load_gradient(c, to, r->d_out + t * vr, r->from_state, (b * c->time + s->step[t]) * c->heads + head);
    Product d_scores = {r->d_scores, NULL, NULL, NULL, SEGMENT, r->d_out, vr, 1, r->vt, SEGMENT};
    multiply(&d_scores, n, SEGMENT, c->columns);
    for (i64 t = 0; t < n; t++) {
        own[t] = r->d_scores[t * SEGMENT + t];
        near[t] = t >= late ? r->d_scores[t * SEGMENT + t - late] : 0;
    }
    weigh(r->d_scores, s);
    for (i64 t = late; t < n; t++) r->d_scores[t * SEGMENT + t - late] = 0;

    Product dv = {r->dv, r->dv, NULL, NULL, vr, u->scores, 1, SEGMENT, r->d_out, vr};
    multiply_upper(&dv, n, vr, n);
    Product dk = {r->dk, r->dk, NULL, NULL, kr, r->d_scores, 1, SEGMENT, u->pair, kr};
    multiply_upper(&dk, n, kr, n);
    Product dq = {r->from_pairs, NULL, NULL, NULL, kr, r->d_scores, SEGMENT, 1, s->k_pair, kr};
    multiply_lower(&dq, n, kr, n);
    Product dq_state = {r->from_state, NULL, NULL, NULL, kr, r->d_out, vr, 1, state, kr};
    multiply(&dq_state, n, kr, c->columns);
    int first = head == h * (c->heads / c->kv_heads);
    Product d_state = {r->d_state, r->d_state, first ? s->total : NULL, NULL, vr, u->state, 1, kr, r->d_out, vr};
    multiply(&d_state, c->key, vr, n);

    for (i64 t = 0; t < n; t++)
        for (i64 i = t * kr; i < (t + 1) * kr; i += LANES) {
            vf pairs = loadv(r->from_pairs + i), from_state = loadv(r->from_state + i) * loadv(s->before + i);
            if (c->decay == PER_CHANNEL) pairs *= loadv(s->up + i);
            vf q = loadv(u->q + i), total = pairs + from_state;
            storev(r->dq + i, total);
            storev(r->q_dq + i, loadv(r->q_dq + i) + q * total);
            float *at_start = r->at_start + i - t * kr;
            if (t >= late) storev(at_start, loadv(at_start) + q * from_state);
        }
    add_near(c, s, u, r, near, own, to->dbonus + (b * c->heads + head) * c->key);
    for (i64 t = 0; t < n; t++)
        store_row(to->dq, ((b * c->time + s->step[t]) * c->heads + head) * c->key, r->dq + t * kr, c->key, c->bf16);
}

/* Gradients of the segment's log factors: what crosses the first step, then step by step what ends and what begins. */
static void store_decays(const Call *c, const Segment *s, Room *r, const Gradients *to, i64 b, i64 h) {
    i64 kr = c->kr, late = c->bonus != NULL;
    float *crossing = r->at_start;
    for (i64 t = 0; t < s->n; t++) {
        vf sum = {0};
        for (i64 i = 0; i < kr; i += LANES) {
            vf x = loadv(crossing + i);
            if (t) x += loadv(r->k_dk + (t - 1) * kr + i) - loadv(r->q_dq + (t - 1 + late) * kr + i);
            storev(crossing + i, x);
            sum += x;
        }
        i64 at = (b * c->time + s->step[t]) * c->kv_heads + h;
        if (c->decay == CONSTANT) ((double *)to->dg)[b * c->kv_heads + h] += sumv(sum);
        else if (c->decay == PER_HEAD) ((float *)to->dg)[at] = sumv(sum);
        else store_row(to->dg, at * c->key, crossing, c->key, 0);
    }
}

static void backward_segment(const Call *c, const Segment *s, Queries *u, Room *r, const Gradients *to,
                             const float *state, i64 b, i64 h) {
    i64 kr = c->kr, vr = c->vr, n = s->n, group = c->heads / c->kv_heads;
    transpose(r->d_state_t, r->d_state, kr, vr);
    transpose(r->vt, s->v, SEGMENT, vr);
    Product dv = {r->dv, NULL, NULL, NULL, vr, s->k_end, kr, 1, r->d_state, vr};
    multiply(&dv, n, vr, c->key);
    for (i64 i = 0; i < kr; i += LANES) {
        vf sum = {0};
        for (i64 row = i; row < c->columns * kr + i; row += kr) sum += loadv(state + row) * loadv(r->d_state_t + row);
        storev(r->at_start + i, sum * loadv(s->total + i));
    }
    memset(r->dk, 0, (size_t)(n * kr) * 4);
    memset(r->near, 0, (size_t)(n * kr) * 4);
    memset(r->q_dq, 0, (size_t)(n * kr) * 4);
    for (i64 head = h * group; head < (h + 1) * group; head++) backward_queries(c, s, u, r, to, state, b, h, head);

    Product dk = {r->from_state, NULL, NULL, NULL, kr, s->v, vr, 1, r->d_state_t, kr};
    multiply(&dk, n, kr, c->columns);
    for (i64 i = 0; i < n * kr; i += LANES) {
        vf x = loadv(r->dk + i);
        if (c->decay == PER_CHANNEL) x *= loadv(s->down + i);
        x += loadv(r->from_state + i) * loadv(s->after + i);
        storev(r->k_dk + i, x * loadv(s->k + i));
        storev(r->dk + i, x + loadv(r->near + i));
    }
    for (i64 t = 0; t < n; t++) {
        i64 at = (b * c->time + s->step[t]) * c->kv_heads + h;
        store_row(to->dk, at * c->key, r->dk + t * kr, c->key, c->bf16);
        store_row(to->dv, at * c->value, r->dv + t * vr, c->value, c->bf16);
    }
    if (c->decay != NO_DECAY) store_decays(c, s, r, to, b, h);
    if (s->begins) memset(r->d_state, 0, (size_t)(kr * vr) * 4);
}

static void backward_head(const Call *c, const Gradients *to, i64 b, i64 h) {
    i64 group = c->heads / c->kv_heads, chunks = (c->time + CHUNK - 1) / CHUNK, size = c->key * c->columns;
    i64 task = b * c->kv_heads + h, starts[CHUNK];
    float *memory = scratch(segment_floats(c) + query_floats(c) + room_floats(c));
    Segment s;
    Queries u;
    Room r;
    room_rows(&r, c, query_rows(&u, c, segment_rows(&s, c, memory)));
    r.states = aligned_alloc(64, (size_t)((MIN(CHUNK, c->time) + 1) * c->kr * c->vr) * 4); /* written before it is read */
    if (!r.states) abort();
    zero_skipped(c, to->dq, b, c->heads, h * group, group, c->key, c->bf16);
    zero_skipped(c, to->dk, b, c->kv_heads, h, 1, c->key, c->bf16);
    zero_skipped(c, to->dv, b, c->kv_heads, h, 1, c->value, c->bf16);
    if (c->decay == PER_HEAD || c->decay == PER_CHANNEL)
        zero_skipped(c, to->dg, b, c->kv_heads, h, 1, c->decay == PER_HEAD ? 1 : c->key, 0);
    load_state(r.d_state, to->dfinal + task * size, c->key, c->columns, c->vr);
    for (i64 chunk = chunks - 1; chunk >= 0; chunk--) {
        i64 t = chunk * CHUNK, stop = MIN(c->time, t + CHUNK);
        prefetch(c, c->k, b, c->kv_heads, h, c->key, t - CHUNK, c->bf16 ? 2 : 4);
        prefetch(c, c->v, b, c->kv_heads, h, c->value, t - CHUNK, c->bf16 ? 2 : 4);
        i64 count = walk_states(c, &s, &r, to->kept + (task * chunks + chunk) * size, starts, b, h, t, stop);
        for (i64 i = count - 1; i >= 0; i--) {
            load_segment(c, &s, b, h, starts[i], stop);
            backward_segment(c, &s, &u, &r, to, r.states + i * c->kr * c->vr, b, h);
        }
    }
    store_state(to->dinitial + task * size, r.d_state, c->key, c->columns, c->vr);
    free(r.states);
    free(memory);
}
