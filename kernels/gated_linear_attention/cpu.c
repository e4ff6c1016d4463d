/* Gated linear attention on the CPU: forward, backward, and one step of decoding.
 *
 * One task is a batch row and a key/value head; it walks through time in segments of at most SEGMENT steps. Within a
 * segment, with S the state before it, P_t the product of the factors up to step t and n its last step,
 *
 *     o_t = (q_t P_t) S + sum_{j <= t} A_tj v_j      A_tj = (q_t P_t) . (k_j / P_j)      S' = P_n S + sum_j (k_j P_n / P_j)^T v_j
 *
 * which are small matrix products. A bonus reads with P_{t-1} and j < t, and puts q u k on A's diagonal. A segment ends
 * where a document begins and, with factors for each channel, before P falls below SMALLEST; the first step's factor is in
 * no quotient, so that any factor, even 0, is exact. Skipped steps are in no segment.
 *
 * Backward goes from the last chunk to the first. It makes the states before a chunk's segments again from the one that
 * forward kept, and carries dS, the gradient of the state:
 *
 *     dA_tj = do_t . v_j                      dv_j = (k_j P_n / P_j) dS' + sum_t A_tj do_t
 *     dq_t = P_t (S do_t) + sum_j dA_tj k_j P_t / P_j      dk_j = P_n / P_j (dS' v_j) + sum_t dA_tj q_t P_t / P_j
 *
 * The gradient of a log factor g_t is the sum of all products that cross step t: those from S, less those that end before
 * t (q dq), plus those that begin before t (k dk). Pairs that cross no factor at all are left out of both.
 *
 * Tensors are contiguous: q (B, T, H, K), k (B, T, Hk, K), v (B, T, Hk, V) float32 or bfloat16 (bf16 = 1); g, bonus and
 * states float32. `columns` is V, and one more with the normaliser, whose column of v is 1. */
#include "vec.h"

enum { CHUNK = 64, SEGMENT = 16 };
enum { NO_DECAY, CONSTANT, PER_HEAD, PER_CHANNEL };
#define SMALLEST 1e-7f
#define PARALLEL_STEP 65536 /* numbers in the state from which a step is worth waking threads */

typedef struct {
    const void *q, *k, *v;
    const float *g, *bonus;
    const uint8_t *codes;
    i64 batch, time, heads, kv_heads, key, value, columns, kr, vr; /* kr, vr: padded rows */
    float scale;
    int decay, normalize, bf16;
} Call;

/* ---- small matrix products: out = in * factors + a b, with a's element (r, d) at a[r * ra + d * da] ---- */

/* Stops the compiler from reading x from memory again at each use: there are more arithmetic units than load units. */
#ifdef __AVX512F__
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define IN_REGISTER(x)
#endif

enum { FULL, LOWER, UPPER }; /* which part of a is not zero */
typedef struct {
    float *out;
    const float *in, *row_factor, *column_factor; /* NULL: in = 0, factors = 1 */
    i64 ld;
    const float *a;
    i64 ra, da;
    const float *b;
    i64 ldb;
} Product;

INLINE void tile(const int R, const int C, const Product *p, i64 r, i64 c, i64 first, i64 last) {
    vf acc[16];
    for (int i = 0; i < 16; i++) acc[i] = (vf){0};
    if (p->in) {
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) {
                vf x = loadv(p->in + (r + i) * p->ld + c + j * LANES);
                if (p->row_factor) x *= splat(p->row_factor[r + i]);
                if (p->column_factor) x *= loadv(p->column_factor + c + j * LANES);
                acc[i * C + j] = x;
            }
    }
    const float *a = p->a + r * p->ra + first * p->da, *b = p->b + first * p->ldb + c;
    i64 ra = p->ra, da = p->da, ldb = p->ldb;
    for (i64 d = first; d < last; d++, a += da, b += ldb) {
        vf row[4];
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) {
            row[j] = loadv(b + j * LANES);
            IN_REGISTER(row[j]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            vf x = splat(a[i * ra]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) acc[i * C + j] += x * row[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) storev(p->out + (r + i) * p->ld + c + j * LANES, acc[i * C + j]);
}

INLINE void tile_rows(const int C, const int R, const Product *p, i64 rows, i64 c, i64 depth, const int shape) {
    i64 r = 0;
#define ROWS(n)                                                                                   \
    for (; r + n <= rows; r += n)                                                                 \
        tile(n, C, p, r, c, shape == UPPER ? r : 0, shape == LOWER ? MIN(depth, r + n) : depth)
    if (R >= 8) ROWS(8);
    ROWS(4);
    ROWS(2);
    ROWS(1);
#undef ROWS
}

/* rows x columns (a multiple of LANES); with LOWER or UPPER, a is square. */
INLINE void product(const Product *p, i64 rows, i64 columns, i64 depth, const int shape) {
    i64 c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES) tile_rows(4, 4, p, rows, c, depth, shape);
    for (; c + 2 * LANES <= columns; c += 2 * LANES) tile_rows(2, 8, p, rows, c, depth, shape);
    for (; c < columns; c += LANES) tile_rows(1, 8, p, rows, c, depth, shape);
}
static __attribute__((noinline)) void multiply(const Product *p, i64 rows, i64 columns, i64 depth) {
    product(p, rows, columns, depth, FULL);
}
static __attribute__((noinline)) void multiply_lower(const Product *p, i64 rows, i64 columns, i64 depth) {
    product(p, rows, columns, depth, LOWER);
}
static __attribute__((noinline)) void multiply_upper(const Product *p, i64 rows, i64 columns, i64 depth) {
    product(p, rows, columns, depth, UPPER);
}

/* out (columns x PADDED(rows)) = transpose of in (rows x columns); both sizes are those of padded memory. */
static void transpose(float *out, const float *in, i64 rows, i64 columns) {
    for (i64 r = 0; r < rows; r += LANES)
        for (i64 c = 0; c < columns; c += LANES) {
            vf block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = loadv(in + (r + i) * columns + c);
            transpose_rows(block);
            for (int i = 0; i < LANES; i++) storev(out + (c + i) * rows + r, block[i]);
        }
}

/* y = x * f, row by row in padded memory. */
INLINE void scale_rows(float *restrict y, const float *restrict x, const float *restrict f, i64 n) {
    for (i64 i = 0; i < n; i += LANES) storev(y + i, loadv(x + i) * loadv(f + i));
}
INLINE void add_scaled(float *restrict y, float f, const float *restrict x, i64 n) {
    for (i64 i = 0; i < n; i += LANES) storev(y + i, loadv(y + i) + splat(f) * loadv(x + i));
}

/* ---- segments ---- */

typedef struct {
    i64 n, begins, step[SEGMENT];
    float *k, *v, *factor, *before, *after, *up, *down, *k_pair, *k_end; /* SEGMENT rows each */
    float *total, *kt;  /* one row; k_pair transposed, kr x SEGMENT */
    float *weights;     /* SEGMENT x SEGMENT, of the pairs (t, j) beside those in q_pair and k_pair */
} Segment;

/* Takes the first floats of `room`; returns what is left. */
static float *segment_rows(Segment *s, const Call *c, float *room) {
    float **rows[] = {&s->k, &s->factor, &s->before, &s->after, &s->up, &s->down, &s->k_pair, &s->k_end, &s->kt};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) *rows[i] = room, room += SEGMENT * c->kr;
    s->v = room, room += SEGMENT * c->vr;
    s->total = room, room += c->kr;
    s->weights = room;
    return room + SEGMENT * SEGMENT;
}
static i64 segment_floats(const Call *c) { return SEGMENT * (9 * c->kr + c->vr + SEGMENT) + c->kr; }

INLINE int any(vi x) {
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= x[i];
    return found;
}

/* Factors of step t into s->factor's row n. */
static void load_factor(const Call *c, Segment *s, i64 b, i64 h, i64 t) {
    float *row = s->factor + s->n * c->kr;
    if (c->decay == PER_CHANNEL) {
        load_row(row, c->g, ((b * c->time + t) * c->kv_heads + h) * c->key, c->key, 0);
        for (i64 i = 0; i < c->kr; i += LANES) storev(row + i, expv(loadv(row + i)));
    } else {
        vf g = c->decay == NO_DECAY ? (vf){0}
                                    : splat(c->g[c->decay == CONSTANT ? h : (b * c->time + t) * c->kv_heads + h]);
        g = expv(g);
        for (i64 i = 0; i < c->kr; i += LANES) storev(row + i, g);
    }
}

/* Whether the product of the factors since the segment's first step stays in range with those of row n; run: that product. */
static int in_range(const Call *c, const Segment *s, float *run) {
    vi out = {0};
    for (i64 i = 0; i < c->kr; i += LANES) {
        vf x = s->n ? loadv(run + i) * loadv(s->factor + s->n * c->kr + i) : splat(1);
        storev(run + i, x);
        out |= (x < splat(SMALLEST)) | (x > splat(1 / SMALLEST));
    }
    return !any(out);
}

/* The steps of the segment that begins at or after t, with their factors; returns where the next one begins. */
static i64 find_steps(const Call *c, Segment *s, i64 b, i64 h, i64 t, i64 stop) {
    float *run = s->total;
    s->n = s->begins = 0;
    for (; t < stop && s->n < SEGMENT; t++) {
        int code = c->codes ? c->codes[b * c->time + t] : CONTINUES;
        if (code == SKIPPED) continue;
        if (code == BEGINS) {
            if (s->n) break;
            s->begins = 1;
        }
        load_factor(c, s, b, h, t);
        if (c->decay == PER_CHANNEL && !in_range(c, s, run)) break;
        s->step[s->n++] = t;
    }
    return t;
}

/* Products of factors: before (of S in o_t), after (of k_j in S'), total, and for pairs up, down and weights. */
static void multiply_factors(const Call *c, Segment *s) {
    i64 kr = c->kr, n = s->n, late = c->bonus != NULL; /* late: o_t is read before step t's factor */
    for (i64 i = 0; i < kr; i += LANES) {
        vf before = splat(1), since = splat(1), after = splat(1);
        for (i64 t = 0; t < n; t++) {
            vf factor = loadv(s->factor + t * kr + i);
            if (late) storev(s->before + t * kr + i, before), storev(s->up + t * kr + i, since);
            before *= factor;
            if (t) since *= factor;
            if (!late) storev(s->before + t * kr + i, before), storev(s->up + t * kr + i, since);
            if (c->decay == PER_CHANNEL) storev(s->down + t * kr + i, 1.0f / since);
        }
        for (i64 t = n - 1; t >= 0; t--) {
            storev(s->after + t * kr + i, after);
            after *= loadv(s->factor + t * kr + i);
        }
        storev(s->total + i, after);
    }
    vf row = {0};
    for (i64 t = 0; t < n; t++) {
        float *to = s->weights + t * SEGMENT;
        if (late) storev(to, row);
        if (c->decay != PER_CHANNEL) row *= splat(s->factor[t * kr]);
        row[t] = 1;
        if (!late) storev(to, row);
    }
}

/* Asks for the rows of SEGMENT steps from `first`: a head's rows lie too far apart for the processor to foresee them. */
static void prefetch(const Call *c, const void *tensor, i64 b, i64 heads, i64 head, i64 width, i64 first, int bytes) {
    for (i64 t = MAX(first, 0); t < MIN(first + SEGMENT, c->time); t++) {
        const char *row = (const char *)tensor + ((b * c->time + t) * heads + head) * width * bytes;
        for (i64 i = 0; i < width * bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
    }
}

/* Everything about the segment that begins at or after t and does not depend on queries; returns where the next begins. */
static i64 load_segment(const Call *c, Segment *s, i64 b, i64 h, i64 t, i64 stop) {
    i64 kr = c->kr, vr = c->vr, next = find_steps(c, s, b, h, t, stop);
    int bytes = c->bf16 ? 2 : 4;
    prefetch(c, c->k, b, c->kv_heads, h, c->key, next, bytes);
    prefetch(c, c->v, b, c->kv_heads, h, c->value, next, bytes);
    multiply_factors(c, s);
    for (i64 j = 0; j < s->n; j++) {
        i64 at = (b * c->time + s->step[j]) * c->kv_heads + h;
        float *k = s->k + j * kr, *v = s->v + j * vr;
        load_row(k, c->k, at * c->key, c->key, c->bf16);
        load_row(v, c->v, at * c->value, c->value, c->bf16);
        if (c->normalize) v[c->value] = 1; /* what follows it in the row is 0 and stays so */
        scale_rows(s->k_end + j * kr, k, s->after + j * kr, kr);
        if (c->decay == PER_CHANNEL) scale_rows(s->k_pair + j * kr, k, s->down + j * kr, kr);
    }
    if (c->decay != PER_CHANNEL) memcpy(s->k_pair, s->k, (size_t)(s->n * kr) * 4);
    transpose(s->kt, s->k_pair, SEGMENT, kr);
    return next;
}

/* S' = total S + k_end^T v: rows are channels of k. */
static void update_state(const Call *c, const Segment *s, float *state) {
    Product p = {state, state, s->total, NULL, c->vr, s->k_end, 1, c->kr, s->v, c->vr};
    multiply(&p, c->key, c->vr, s->n);
}

typedef struct {
    float *q, *pair, *state, *scores, *bonus; /* SEGMENT rows: q, q * up, q * before; SEGMENT x SEGMENT: A; one row */
} Queries;

static float *query_rows(Queries *u, const Call *c, float *room) {
    u->q = room, u->pair = u->q + SEGMENT * c->kr, u->state = u->pair + SEGMENT * c->kr;
    u->bonus = u->state + SEGMENT * c->kr, u->scores = u->bonus + c->kr;
    return u->scores + SEGMENT * SEGMENT;
}
static i64 query_floats(const Call *c) { return SEGMENT * (3 * c->kr + SEGMENT) + c->kr; }

INLINE void weigh(float *scores, const Segment *s) {
    for (i64 t = 0; t < s->n; t++) {
        vf w = loadv(s->weights + t * SEGMENT), x = loadv(scores + t * SEGMENT);
        storev(scores + t * SEGMENT, selectv(w != 0, x * w, splat(0)));
    }
}

/* Query head `head` in the segment, times `scale`, and its scores A. */
static void load_queries(const Call *c, const Segment *s, Queries *u, i64 b, i64 head, float scale) {
    i64 kr = c->kr;
    for (i64 t = 0; t < s->n; t++) {
        float *q = u->q + t * kr;
        load_row(q, c->q, ((b * c->time + s->step[t]) * c->heads + head) * c->key, c->key, c->bf16);
        for (i64 i = 0; i < kr; i += LANES) storev(q + i, loadv(q + i) * splat(scale));
        scale_rows(u->state + t * kr, q, s->before + t * kr, kr);
        if (c->decay == PER_CHANNEL) scale_rows(u->pair + t * kr, q, s->up + t * kr, kr);
    }
    if (c->decay != PER_CHANNEL) memcpy(u->pair, u->q, (size_t)(s->n * kr) * 4);
    Product p = {u->scores, NULL, NULL, NULL, SEGMENT, u->pair, kr, 1, s->kt, SEGMENT};
    multiply(&p, s->n, SEGMENT, c->key);
    weigh(u->scores, s);
    if (!c->bonus) return;
    load_row(u->bonus, c->bonus, head * c->key, c->key, 0);
    for (i64 t = 0; t < s->n; t++) {
        const float *q = u->q + t * kr, *k = s->k + t * kr;
        vf sum = {0};
        for (i64 i = 0; i < kr; i += LANES) sum += loadv(q + i) * loadv(u->bonus + i) * loadv(k + i);
        u->scores[t * SEGMENT + t] = sumv(sum);
    }
}

/* ---- forward ---- */

INLINE void load_state(float *state, const float *from, i64 rows, i64 n, i64 padded) {
    for (i64 k = 0; k < rows; k++) load_row(state + k * padded, from, k * n, n, 0);
}
INLINE void store_state(float *to, const float *state, i64 rows, i64 n, i64 padded) {
    for (i64 k = 0; k < rows; k++) store_row(to, k * n, state + k * padded, n, 0);
}

/* Writes o_t from its row; a normaliser divides by the last column, and 0 / 0 is 0. */
static void store_output(const Call *c, void *o, float *denominators, float *row, i64 at) {
    if (c->normalize) {
        float d = row[c->value];
        vf factor = splat(d == 0 ? 0 : 1 / d);
        for (i64 i = 0; i < c->vr; i += LANES) storev(row + i, loadv(row + i) * factor);
        if (denominators) denominators[at] = d;
    }
    store_row(o, at * c->value, row, c->value, c->bf16);
}

static void forward_segment(const Call *c, const Segment *s, Queries *u, float *state, float *out, void *o,
                            float *denominators, i64 b, i64 h) {
    i64 group = c->heads / c->kv_heads;
    for (i64 head = h * group; head < (h + 1) * group; head++) {
        if (s->n) prefetch(c, c->q, b, c->heads, head, c->key, s->step[s->n - 1] + 1, c->bf16 ? 2 : 4);
        load_queries(c, s, u, b, head, c->scale);
        Product from_state = {out, NULL, NULL, NULL, c->vr, u->state, c->kr, 1, state, c->vr};
        multiply(&from_state, s->n, c->vr, c->key);
        Product from_pairs = {out, out, NULL, NULL, c->vr, u->scores, SEGMENT, 1, s->v, c->vr};
        multiply_lower(&from_pairs, s->n, c->vr, s->n);
        for (i64 t = 0; t < s->n; t++)
            store_output(c, o, denominators, out + t * c->vr, (b * c->time + s->step[t]) * c->heads + head);
    }
    update_state(c, s, state);
}

/* Zeros for every skipped step of a (B, T, heads, width) tensor's heads first ... first + n. */
static void zero_skipped(const Call *c, void *tensor, i64 b, i64 heads, i64 first, i64 n, i64 width, int bf16) {
    for (i64 t = 0; tensor && c->codes && t < c->time; t++)
        if (c->codes[b * c->time + t] == SKIPPED)
            zero_row(tensor, ((b * c->time + t) * heads + first) * width, n * width, bf16);
}

static void forward_head(const Call *c, const float *initial, void *o, float *final, float *kept, float *denominators,
                         i64 b, i64 h) {
    i64 group = c->heads / c->kv_heads, chunks = (c->time + CHUNK - 1) / CHUNK, size = c->key * c->columns;
    float *state = scratch(c->kr * c->vr + SEGMENT * c->vr + segment_floats(c) + query_floats(c));
    float *out = state + c->kr * c->vr;
    Segment s;
    Queries u;
    query_rows(&u, c, segment_rows(&s, c, out + SEGMENT * c->vr));
    zero_skipped(c, o, b, c->heads, h * group, group, c->value, c->bf16);
    zero_skipped(c, denominators, b, c->heads, h * group, group, 1, 0);
    if (initial) load_state(state, initial + (b * c->kv_heads + h) * size, c->key, c->columns, c->vr);
    for (i64 chunk = 0; chunk < chunks; chunk++) {
        i64 t = chunk * CHUNK, stop = MIN(c->time, t + CHUNK);
        if (kept)
            store_state(kept + ((b * c->kv_heads + h) * chunks + chunk) * size, state, c->key, c->columns, c->vr);
        while (t < stop) {
            t = load_segment(c, &s, b, h, t, stop);
            if (s.begins) memset(state, 0, (size_t)(c->kr * c->vr) * 4);
            forward_segment(c, &s, &u, state, out, o, denominators, b, h);
        }
    }
    store_state(final + (b * c->kv_heads + h) * size, state, c->key, c->columns, c->vr);
    free(state);
}

/* kept: (B, Hk, chunks, K, columns) states before each chunk, denominators: (B, T, H); both NULL without gradients. */
void gated_linear_attention_forward(const void *q, const void *k, const void *v, const float *g, const float *bonus,
                                    const float *initial, const uint8_t *codes, void *o, float *final, float *kept,
                                    float *denominators, i64 batch, i64 time, i64 heads, i64 kv_heads, i64 key,
                                    i64 value, i64 decay, i64 normalize, i64 threads, i64 bf16, float scale) {
    i64 columns = value + normalize;
    Call c = {q, k, v, g, bonus, codes, batch, time, heads, kv_heads, key, value, columns, PADDED(key), PADDED(columns),
              scale, (int)decay, (int)normalize, (int)bf16};
    i64 chunks = (time + CHUNK - 1) / CHUNK;
    huge_pages(o, batch * time * heads * value * (bf16 ? 2 : 4));
    if (kept) huge_pages(kept, batch * kv_heads * chunks * key * columns * 4);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 task = 0; task < batch * kv_heads; task++)
        forward_head(&c, initial, o, final, kept, denominators, task / kv_heads, task % kv_heads);
}

/* ---- backward ---- */

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

/* dg and dbonus come zeroed where they are double: sums over time, for each batch row. */
void gated_linear_attention_backward(const void *q, const void *k, const void *v, const float *g, const float *bonus,
                                     const uint8_t *codes, const float *kept, const float *denominators, const void *o,
                                     const void *dout, const float *dfinal, void *dq, void *dk, void *dv, void *dg,
                                     double *dbonus, float *dinitial, i64 batch, i64 time, i64 heads, i64 kv_heads,
                                     i64 key, i64 value, i64 decay, i64 normalize, i64 threads, i64 bf16, float scale) {
    i64 columns = value + normalize;
    Call c = {q, k, v, g, bonus, codes, batch, time, heads, kv_heads, key, value, columns, PADDED(key), PADDED(columns),
              scale, (int)decay, (int)normalize, (int)bf16};
    Gradients to = {dq, dk, dv, dg, dbonus, dinitial, o, dout, kept, denominators, dfinal};
    i64 steps = batch * time, bytes = bf16 ? 2 : 4;
    huge_pages(dq, steps * heads * key * bytes), huge_pages(dk, steps * kv_heads * key * bytes);
    huge_pages(dv, steps * kv_heads * value * bytes);
    if (decay == PER_CHANNEL) huge_pages(dg, steps * kv_heads * key * 4);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (i64 task = 0; task < batch * kv_heads; task++) backward_head(&c, &to, task / kv_heads, task % kv_heads);
}

/* ---- one step ---- */

typedef struct {
    float *state;
    const float *q, *k, *v, *factor; /* q: group x kr */
    float *out;                      /* group x vr */
} Step;

/* Columns c ... c + C * LANES of the state's rows: decayed, updated and read in one pass. One query head in registers. */
INLINE void step_block(const int C, const int alone, const Call *p, const Step *s, i64 group, i64 c) {
    int late = p->bonus != NULL;
    vf acc[4] = {{0}}, v[4];
    for (int j = 0; j < C; j++) v[j] = loadv(s->v + c + j * LANES);
    float *row = s->state + c;
    for (i64 k = 0; k < p->key; k++, row += p->columns) {
        vf factor = splat(s->factor[k]), key = splat(s->k[k]), read[4];
#pragma GCC unroll 4
        for (int j = 0; j < C; j++) {
            vf before = loadv(row + j * LANES), after = factor * before + key * v[j];
            storev(row + j * LANES, after);
            read[j] = late ? before : after;
        }
        if (alone) {
            vf q = splat(s->q[k]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) acc[j] += q * read[j];
        }
        for (i64 head = 0; !alone && head < group; head++) {
            float *out = s->out + head * p->vr + c;
            vf q = splat(s->q[head * p->kr + k]);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) storev(out + j * LANES, loadv(out + j * LANES) + q * read[j]);
        }
    }
    for (int j = 0; alone && j < C; j++) storev(s->out + c + j * LANES, acc[j]);
}

/* The last columns, which fill no vector. */
static void step_tail(const Call *p, const Step *s, i64 group, i64 c) {
    for (i64 k = 0; k < p->key; k++)
        for (i64 i = c; i < p->columns; i++) {
            float *x = s->state + k * p->columns + i, before = *x, after = s->factor[k] * before + s->k[k] * s->v[i];
            *x = after;
            for (i64 head = 0; head < group; head++)
                s->out[head * p->vr + i] += s->q[head * p->kr + k] * (p->bonus ? before : after);
        }
}

/* The bonus's share of o: (q u k) v. */
static void add_bonus(const Call *c, const Step *s, float *out, const float *q, i64 head) {
    float sum = 0;
    for (i64 k = 0; k < c->key; k++) sum += q[k] * c->bonus[head * c->key + k] * s->k[k];
    add_scaled(out, sum, s->v, c->vr);
}

static void step_head(const Call *c, float *state, void *o, i64 b, i64 h) {
    i64 kr = c->kr, vr = c->vr, group = c->heads / c->kv_heads, at = b * c->kv_heads + h, column = 0;
    float k[kr], v[vr], factor[kr], q[group * kr], out[group * vr];
    Step s = {state + at * c->key * c->columns, q, k, v, factor, out};
    Segment factors = {.factor = factor};
    load_factor(c, &factors, b, h, 0);
    memset(v, 0, sizeof v);
    memset(out, 0, sizeof out);
    load_row(k, c->k, at * c->key, c->key, c->bf16);
    load_row(v, c->v, at * c->value, c->value, c->bf16);
    if (c->normalize) v[c->value] = 1;
    for (i64 i = 0; i < group; i++) {
        load_row(q + i * kr, c->q, (b * c->heads + h * group + i) * c->key, c->key, c->bf16);
        for (i64 j = 0; j < kr; j += LANES) storev(q + i * kr + j, loadv(q + i * kr + j) * splat(c->scale));
    }
    for (; column + 4 * LANES <= c->columns; column += 4 * LANES) {
        if (group == 1) step_block(4, 1, c, &s, group, column);
        else step_block(4, 0, c, &s, group, column);
    }
    for (; column + LANES <= c->columns; column += LANES) step_block(1, 0, c, &s, group, column);
    step_tail(c, &s, group, column);
    for (i64 i = 0; i < group; i++) {
        if (c->bonus) add_bonus(c, &s, out + i * vr, q + i * kr, h * group + i);
        store_output(c, o, NULL, out + i * vr, b * c->heads + h * group + i);
    }
}

/* Tensors as in forward, without the time axis; the state (B, Hk, K, columns) is changed in place. */
void gated_linear_attention_step(const void *q, const void *k, const void *v, const float *g, const float *bonus,
                                 float *state, void *o, i64 batch, i64 heads, i64 kv_heads, i64 key, i64 value,
                                 i64 decay, i64 normalize, i64 threads, i64 bf16, float scale) {
    i64 columns = value + normalize, tasks = batch * kv_heads;
    Call c = {q, k, v, g, bonus, NULL, batch, 1, heads, kv_heads, key, value, columns, PADDED(key), PADDED(columns),
              scale, (int)decay, (int)normalize, (int)bf16};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && tasks * key * columns >= PARALLEL_STEP)
    for (i64 task = 0; task < tasks; task++) step_head(&c, state, o, task / kv_heads, task % kv_heads);
}
