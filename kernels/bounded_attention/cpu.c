/* Softmax attention to a bounded number of tokens: one token in place, and which tokens are kept until when.
 *
 * B batch, H query heads, Hk kv heads (each serves G = H / Hk query heads), D key width, V value width. Head h has rows[h]
 * rows, the first `sinks` of which are the document's first tokens; positions count from 1, 0 is a free row. Rows are cut
 * into parts of PART, fixed whatever the number of threads, and the parts are joined in order.
 */
#include "rows.h"

/* Of the rows [sinks, n), which the token at position `count` takes, when none is free: one beyond the reach, else the
 * least score, of those that are no recent ones; the oldest of equals. cost: what `place` and the scores come to. */
static i64 least_row(const float *cost, const i64 *place, i64 sinks, i64 n) {
    float least = INFINITY;
    for (i64 r = sinks; r < n; r++) least = MIN(least, cost[r]);
    i64 found = -1;
    for (i64 r = sinks; r < n; r++)
        if (cost[r] == least && (found < 0 || place[r] < place[found])) found = r;
    return found;
}

/* score (B, Hk, P + T), position (B, Hk, P), count (B); begins, tokens (B, T) bytes or NULL. until, positions (B, Hk, P + T),
 * held (B, Hk, P): as in chunked.py. */
void retention(const float *score, const i64 *position, const i64 *count, const uint8_t *begins, const uint8_t *tokens,
               const i64 *rows, const i64 *recents, i64 *until, i64 *held, i64 *positions, i64 batch, i64 heads,
               i64 most, i64 time, i64 sinks, i64 reach, i64 threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 task = 0; task < batch * heads; task++) {
        i64 b = task / heads, h = task % heads, n = rows[h], recent = recents[h], now = count[b], used = 0;
        const float *scores = score + task * (most + time);
        i64 *ends = until + task * (most + time), *own = held + task * most, *at = positions + task * (most + time);
        float *cost = malloc((size_t)most * sizeof(float));
        i64 *place = malloc((size_t)most * sizeof(i64));
        i64 *row_of = malloc((size_t)recent * sizeof(i64)); /* of the recent tokens, by position modulo their number */
        for (i64 i = 0; i < recent; i++) row_of[i] = -1;
        for (i64 r = 0; r < most; r++) {
            place[r] = at[r] = position[task * most + r];
            own[r] = place[r] > 0 ? r : -1;
            ends[r] = place[r] > 0 ? time : 0;
            used += place[r] > 0;
            cost[r] = place[r] > 0 && place[r] > sinks && now - place[r] >= recent ? scores[r] : INFINITY;
            if (place[r] > sinks && now - place[r] < recent) row_of[place[r] % recent] = r;
        }
        for (i64 t = 0; t < time; t++) {
            if (begins && begins[b * time + t]) {
                for (i64 r = 0; r < n; r++) {
                    if (own[r] >= 0) ends[own[r]] = MIN(ends[own[r]], t);
                    place[r] = 0, own[r] = -1, cost[r] = INFINITY;
                }
                for (i64 i = 0; i < recent; i++) row_of[i] = -1;
                used = now = 0;
            }
            if (tokens && !tokens[b * time + t]) {
                ends[most + t] = t, at[most + t] = now;
                continue;
            }
            now++;
            i64 leaving = row_of[now % recent]; /* this many tokens back */
            if (leaving >= 0) cost[leaving] = scores[own[leaving]];
            i64 row = used;
            if (used == n) {
                if (now > reach)
                    for (i64 r = sinks; r < n; r++)
                        if (now - place[r] >= reach) cost[r] = -3.4028234663852886e38f;
                row = least_row(cost, place, sinks, n);
                ends[own[row]] = t;
            } else used++;
            place[row] = at[most + t] = now;
            own[row] = most + t, ends[most + t] = time, cost[row] = INFINITY;
            row_of[now % recent] = now > sinks ? row : -1;
        }
        free(cost);
        free(place);
        free(row_of);
    }
}

/* Which of the n rows of a head the token at position `now` takes. */
static i64 row_for(const uint16_t *scores, const int32_t *places, i64 n, i64 now, i64 sinks, i64 recent, i64 reach) {
    if (now <= n && !places[now - 1]) return now - 1; /* rows are taken in order until all are */
    float least = INFINITY;
    i64 found = -1;
    for (i64 r = sinks; r < n; r++) {
        i64 age = now - places[r];
        if (age < recent) continue;
        float cost = age >= reach ? -3.4028234663852886e38f : from_bf16(scores[r]);
        if (found < 0 || cost < least || (cost == least && places[r] < places[found])) least = cost, found = r;
    }
    return found;
}

/* far: queries against the sinks, or NULL. kinds: of keys and of values, as in rows.h. */
void bounded_step(const float *near, const float *far, const float *new_k, const float *new_v, const float *new_score,
                  void *k, int8_t *k_exponents, void *v, int8_t *v_exponents, uint16_t *scores, int32_t *places,
                  i64 *count, const i64 *rows, const i64 *recents, float *o, i64 batch, i64 heads, i64 kv_heads,
                  i64 key_width, i64 value_width, i64 sinks, i64 reach, i64 k_kind, i64 v_kind, float scale, i64 threads) {
    i64 all = 0, parts = 0, group = heads / kv_heads, keys = PADDED(key_width), stride = PADDED(value_width) + LANES;
    i64 first_row[kv_heads], first_part[kv_heads + 1];
    for (i64 h = 0; h < kv_heads; h++) {
        first_row[h] = all, first_part[h] = parts;
        all += rows[h];
        parts += 1 + (rows[h] - sinks + PART - 1) / PART; /* the first one is the sinks */
    }
    first_part[kv_heads] = parts;
    Rows kept_k = rows_of(k, k_exponents, key_width, k_kind), kept_v = rows_of(v, v_exponents, value_width, v_kind);
    i64 room_size = group * (keys + PART) + LANES * MAX(keys, stride);
    float *largest = scratch(batch * parts * group * (1 + stride)), *sums = largest + batch * parts * group;
    float *rooms = scratch(threads * room_size);
    for (i64 b = 0; b < batch; b++) {
        i64 now = ++count[b];
        for (i64 h = 0; h < kv_heads; h++) {
            i64 first = b * all + first_row[h];
            i64 row = first + row_for(scores + first, places + first, rows[h], now, sinks, recents[h], reach);
            load_row(rooms, new_k, (b * kv_heads + h) * key_width, key_width, 0);
            write_row(&kept_k, row, rooms);
            load_row(rooms, new_v, (b * kv_heads + h) * value_width, value_width, 0);
            write_row(&kept_v, row, rooms);
            scores[row] = to_bf16(new_score[b * kv_heads + h]);
            places[row] = (int32_t)now;
        }
    }
#pragma omp parallel num_threads(threads)
    {
        i64 me = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        me = omp_get_thread_num();
#endif
        float *queries = rooms + me * room_size, *room = queries + group * keys;
        uint8_t inside[PART];
#pragma omp for schedule(dynamic, 1)
        for (i64 task = 0; task < batch * parts; task++) {
            i64 b = task / parts, part = task % parts, h = kv_heads - 1;
            while (first_part[h] > part) h--;
            i64 number = part - first_part[h]; /* 0: the sinks */
            const float *from = number == 0 && far ? far : near;
            for (i64 g = 0; g < group; g++)
                load_row(queries + g * keys, from, (b * heads + h * group + g) * key_width, key_width, 0);
            i64 first = number ? sinks + (number - 1) * PART : 0;
            i64 n = number ? MIN(PART, rows[h] - first) : sinks, at = b * all + first_row[h] + first;
            for (i64 r = 0; r < n; r++) inside[r] = places[at + r] && (!number || count[b] - places[at + r] < reach);
            sum_part(group, scale, queries, &kept_k, &kept_v, at, n, inside, largest + task * group,
                     sums + task * group * stride, room);
        }
#pragma omp for schedule(static)
        for (i64 task = 0; task < batch * heads; task++) {
            i64 b = task / heads, h = task % heads / group, g = task % group;
            float most = -INFINITY, total[stride];
            memset(total, 0, sizeof total);
            for (i64 p = first_part[h]; p < first_part[h + 1]; p++)
                most = MAX(most, largest[(b * parts + p) * group + g]);
            for (i64 p = first_part[h]; p < first_part[h + 1]; p++) {
                float part = largest[(b * parts + p) * group + g];
                if (part == -INFINITY) continue;
                const float *own = sums + ((b * parts + p) * group + g) * stride;
                for (i64 i = 0; i <= stride - LANES; i++) total[i] += expf(part - most) * own[i];
            }
            for (i64 i = 0; i < value_width; i++) o[task * value_width + i] = total[i] / total[stride - LANES];
        }
    }
    free(largest);
    free(rooms);
}
