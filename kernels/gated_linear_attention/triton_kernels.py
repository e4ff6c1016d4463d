"""The Triton kernels of gated linear attention; `triton_.py` calls them, `cpu.c` gives the formulas.

One program is a batch row, a key/value head and a block of value columns; it walks through time in chunks of CHUNK
steps with the state in registers. No weight is a quotient: the decay between two steps is summed up from their own log
factors, so that it can neither overflow nor lose its digits beside a stronger decay.

In the kernels t and j are steps of a chunk (t reads, j writes), L = CHUNK, and K and V are the blocks of channels and
of value columns. LATE: the state is read before the step's own factor, and pairs have j < t; else j <= t.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 16
KEPT = 4  # chunks from one kept state to the next
LOWEST = tl.constexpr(-1e30)  # in place of a log factor of -inf: exp is 0 all the same, and no sum is nan


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_rows(tensor, b, t, valid, time, heads, head, first, width, N: tl.constexpr):
    """(L, N) float32 from column `first` of rows t of a (B, T, heads, width) tensor; 0 where not valid."""
    column = first + tl.arange(0, N)
    row = (b.to(tl.int64) * time + t) * heads + head
    inside = valid[:, None] & (column < width)[None, :]
    return tl.load(tensor + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(tensor, value, b, t, time, heads, head, first, width, N: tl.constexpr):
    column = first + tl.arange(0, N)
    row = (b.to(tl.int64) * time + t) * heads + head
    inside = (t < time)[:, None] & (column < width)[None, :]
    tl.store(tensor + row[:, None] * width + column[None, :], value.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _state_at(number, width, columns, first, K: tl.constexpr, V: tl.constexpr):
    """Offsets (K, V) of state `number` from column `first`, and which of them are inside."""
    channel, column = tl.arange(0, K), first + tl.arange(0, V)
    offsets = number.to(tl.int64) * width * columns + channel[:, None] * columns + column[None, :]
    return offsets, (channel < width)[:, None] & (column < columns)[None, :]


@triton.jit
def _load_steps(codes, b, t, time, HAS_CODES: tl.constexpr, L: tl.constexpr):
    """Of steps t: which are valid, documents begun so far in the chunk, valid steps so far, both with t itself."""
    i = tl.arange(0, L)
    code = tl.where(t < time, 0, 2)
    if HAS_CODES:
        code = tl.load(codes + b.to(tl.int64) * time + t, mask=t < time, other=2).to(tl.int32)
    until = i[None, :] <= i[:, None]
    document = tl.sum(tl.where(until & (code == 1)[None, :], 1, 0), axis=1)
    rank = tl.sum(tl.where(until & (code != 2)[None, :], 1, 0), axis=1)
    return code != 2, document, rank


@triton.jit
def _load_decays(
    g, b, t, valid, h, width, g_batch, g_time, g_head, g_width,
    HAS_G: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(L, K) log factors, 0 where a step is not valid, and (L,) those of the first channel."""
    if HAS_G:
        channel = tl.arange(0, K)
        at = b.to(tl.int64) * g_batch + t.to(tl.int64) * g_time + h * g_head
        inside = valid[:, None] & (channel < width)[None, :]
        each = tl.load(g + at[:, None] + channel[None, :] * g_width, mask=inside, other=0.0)
        first = tl.load(g + at, mask=valid, other=0.0)
        return tl.maximum(each.to(tl.float32), LOWEST), tl.maximum(first.to(tl.float32), LOWEST)
    return tl.zeros([L, K], dtype=tl.float32), tl.zeros([L], dtype=tl.float32)


@triton.jit
def _state_factors(decays, document, LATE: tl.constexpr, L: tl.constexpr):
    """Factors of the state: (L, K) of the one before the chunk in what step t reads, (L, K) of what step j writes in
    the one after the chunk, (K,) of the first in the second. 0 across the begin of a document."""
    i = tl.arange(0, L)
    until = i[None, :] <= i[:, None]
    if LATE:
        until = i[None, :] < i[:, None]
    last = tl.max(document, axis=0)
    before = _dot(tl.where(until, 1.0, 0.0), decays)
    after = _dot(tl.where(i[None, :] > i[:, None], 1.0, 0.0), decays)
    before = tl.where((document == 0)[:, None], tl.exp(before), 0.0)
    after = tl.where((document == last)[:, None], tl.exp(after), 0.0)
    total = tl.where(last == 0, tl.exp(tl.sum(decays, axis=0)), 0.0)
    return before, after, total


@triton.jit
def _pairs(document, LATE: tl.constexpr, L: tl.constexpr):
    """(L, L) which steps t read what steps j write."""
    i = tl.arange(0, L)
    seen = document[:, None] == document[None, :]
    if LATE:
        return seen & (i[None, :] < i[:, None])
    return seen & (i[None, :] <= i[:, None])


@triton.jit
def _pair_factors(first, document, LATE: tl.constexpr, L: tl.constexpr):
    """(L, L) factor of what step j writes in what step t reads, where all channels decay alike."""
    i = tl.arange(0, L)
    until = i[None, :] <= i[:, None]
    if LATE:
        until = i[None, :] < i[:, None]
    since = tl.where(i[:, None] > i[None, :], first[:, None], 0.0)
    return tl.where(_pairs(document, LATE, L), tl.exp(_dot(tl.where(until, 1.0, 0.0), since)), 0.0)


@triton.jit
def _row(x, j, L: tl.constexpr):
    """Row j of (L, N)."""
    return tl.sum(tl.where((tl.arange(0, L) == j)[:, None], x, 0.0), axis=0)


@triton.jit
def _add_step(sums, decays, j, LATE: tl.constexpr, L: tl.constexpr):
    """(L, K) decay from step j to each t, from that of step j + 1."""
    t = tl.arange(0, L)
    from_step = j + 1
    if LATE:
        from_step = j + 2
    return sums + tl.where((t >= from_step)[:, None], _row(decays, j + 1, L)[None, :], 0.0)


@triton.jit
def _channel_scores(q, k, decays, LATE: tl.constexpr, L: tl.constexpr):
    """(L, L) products of q_t and the k_j that has decayed channel by channel; only j <= t or j < t have a meaning."""
    i = tl.arange(0, L)
    scores = tl.zeros([L, L], dtype=tl.float32)
    sums = tl.zeros_like(decays)
    for back in range(L):
        j = L - 1 - back
        sums = _add_step(sums, decays, j, LATE, L)
        column = tl.sum(q * _row(k, j, L)[None, :] * tl.exp(sums), axis=1)
        scores += tl.where((i == j)[None, :], column[:, None], 0.0)
    return scores


@triton.jit
def forward_kernel(
    q, k, v, g, initial, codes, o, final, kept, scale, time, heads, kv_heads, width, columns,
    g_batch, g_time, g_head, g_width,
    HAS_G: tl.constexpr, CHANNELS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_CODES: tl.constexpr,
    LATE: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """o, the final state, and every EVERY-th chunk's first state. Grid: batch * kv_heads, blocks of columns."""
    number = tl.program_id(0)
    b, h, first = number // kv_heads, number % kv_heads, tl.program_id(1) * V
    chunks = (time + L - 1) // L
    offsets, inside = _state_at(number, width, columns, first, K, V)
    state = tl.zeros([K, V], dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + offsets, mask=inside, other=0.0).to(tl.float32)
    for chunk in range(chunks):
        if KEEP and chunk % EVERY == 0:
            slot = number.to(tl.int64) * ((chunks + EVERY - 1) // EVERY) + chunk // EVERY
            at, there = _state_at(slot, width, columns, first, K, V)
            tl.store(kept + at, state, mask=there)
        t = chunk * L + tl.arange(0, L)
        valid, document, _ = _load_steps(codes, b, t, time, HAS_CODES, L)
        decays, alike = _load_decays(g, b, t, valid, h, width, g_batch, g_time, g_head, g_width, HAS_G, K, L)
        before, after, total = _state_factors(decays, document, LATE, L)
        keys = _load_rows(k, b, t, valid, time, kv_heads, h, 0, width, K)
        values = _load_rows(v, b, t, valid, time, kv_heads, h, first, columns, V)
        for i in range(GROUP):
            head = h * GROUP + i
            queries = scale * _load_rows(q, b, t, valid, time, heads, head, 0, width, K)
            if CHANNELS:
                scores = _channel_scores(queries, keys, decays, LATE, L)
                scores = tl.where(_pairs(document, LATE, L), scores, 0.0)
            else:
                scores = _dot(queries, tl.trans(keys)) * _pair_factors(alike, document, LATE, L)
            out = _dot(queries * before, state) + _dot(scores, values)
            _store_rows(o, out, b, t, time, heads, head, first, columns, V)
        state = total[:, None] * state + _dot(tl.trans(keys * after), values)
    tl.store(final + offsets, state, mask=inside)


@triton.jit
def _state_before(
    state, k, v, g, codes, b, h, begin, end, time, kv_heads, width, columns, first,
    g_batch, g_time, g_head, g_width,
    HAS_G: tl.constexpr, HAS_CODES: tl.constexpr, L: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The state before chunk `end`, from the one before chunk `begin`."""
    for chunk in range(begin, end):
        t = chunk * L + tl.arange(0, L)
        valid, document, _ = _load_steps(codes, b, t, time, HAS_CODES, L)
        decays, _ = _load_decays(g, b, t, valid, h, width, g_batch, g_time, g_head, g_width, HAS_G, K, L)
        _, after, total = _state_factors(decays, document, False, L)
        keys = _load_rows(k, b, t, valid, time, kv_heads, h, 0, width, K)
        values = _load_rows(v, b, t, valid, time, kv_heads, h, first, columns, V)
        state = total[:, None] * state + _dot(tl.trans(keys * after), values)
    return state


@triton.jit
def _channel_gradients(
    q, k, d_scores, decays, document, rank, LATE: tl.constexpr, L: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Scores, and what pairs that a decay divides give dq and dk (L, K), where each channel decays by itself."""
    i = tl.arange(0, L)
    scores = tl.zeros([L, L], dtype=tl.float32)
    dq, dk, sums = tl.zeros([L, K], tl.float32), tl.zeros([L, K], tl.float32), tl.zeros([L, K], tl.float32)
    pairs = _pairs(document, LATE, L)
    far = tl.where(pairs & (rank[:, None] - rank[None, :] > LATE), d_scores, 0.0)
    for back in range(L):
        j = L - 1 - back
        sums = _add_step(sums, decays, j, LATE, L)
        own = _row(k, j, L)
        weights = tl.exp(sums)
        scores += tl.where((i == j)[None, :], tl.sum(q * own[None, :] * weights, axis=1)[:, None], 0.0)
        column = tl.sum(tl.where((i == j)[None, :], far, 0.0), axis=1)[:, None]
        dq += column * weights * own[None, :]
        dk += tl.where((i == j)[:, None], tl.sum(column * weights * q, axis=0)[None, :], 0.0)
    return tl.where(pairs, scores, 0.0), dq, dk


@triton.jit
def backward_kernel(
    q, k, v, g, codes, kept, do, dfinal, dq, dk, dv, dg, dinitial, scale, batch, time, heads, kv_heads, width, columns,
    g_batch, g_time, g_head, g_width,
    HAS_G: tl.constexpr, CHANNELS: tl.constexpr, HAS_CODES: tl.constexpr, LATE: tl.constexpr, GROUP: tl.constexpr,
    L: tl.constexpr, K: tl.constexpr, V: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Gradients. dq, dk and dg are float32 and have one part (B, T, ...) for each block of columns, to be added up."""
    number, block = tl.program_id(0), tl.program_id(1)
    b, h, first = number // kv_heads, number % kv_heads, block * V
    part = (block * batch + b).to(tl.int64)  # dq and its like: (blocks * B, T, ...)
    chunks = (time + L - 1) // L
    i = tl.arange(0, L)
    offsets, inside = _state_at(number, width, columns, first, K, V)
    d_state = tl.load(dfinal + offsets, mask=inside, other=0.0).to(tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        begin = chunk // EVERY * EVERY
        slot = number.to(tl.int64) * ((chunks + EVERY - 1) // EVERY) + chunk // EVERY
        at, there = _state_at(slot, width, columns, first, K, V)
        state = _state_before(
            tl.load(kept + at, mask=there, other=0.0), k, v, g, codes, b, h, begin, chunk, time, kv_heads, width,
            columns, first, g_batch, g_time, g_head, g_width, HAS_G, HAS_CODES, L, K, V,
        )  # fmt: skip
        t = chunk * L + i
        valid, document, rank = _load_steps(codes, b, t, time, HAS_CODES, L)
        decays, alike = _load_decays(g, b, t, valid, h, width, g_batch, g_time, g_head, g_width, HAS_G, K, L)
        before, after, total = _state_factors(decays, document, LATE, L)
        keys = _load_rows(k, b, t, valid, time, kv_heads, h, 0, width, K)
        values = _load_rows(v, b, t, valid, time, kv_heads, h, first, columns, V)
        pairs = _pairs(document, LATE, L)
        factors = _pair_factors(alike, document, LATE, L)
        # Pairs (and reads of the state) that no factor divides are left out of the decays' gradient.
        near = pairs & (rank[:, None] - rank[None, :] == LATE)
        divided = rank > LATE

        d_values = _dot(keys * after, d_state)
        from_end = after * _dot(values, tl.trans(d_state))
        crossing = total * tl.sum(state * d_state, axis=1)
        d_state = total[:, None] * d_state
        d_keys, near_keys = tl.zeros([L, K], dtype=tl.float32), tl.zeros([L, K], dtype=tl.float32)
        ending = tl.zeros([L, K], dtype=tl.float32)
        for member in range(GROUP):
            head = h * GROUP + member
            queries = _load_rows(q, b, t, valid, time, heads, head, 0, width, K)
            d_out = scale * _load_rows(do, b, t, valid, time, heads, head, first, columns, V)
            d_scores = _dot(d_out, tl.trans(values))
            if CHANNELS:
                scores, d_queries, more = _channel_gradients(
                    queries, keys, d_scores, decays, document, rank, LATE, L, K
                )
                d_keys += more
            else:
                scores = _dot(queries, tl.trans(keys)) * factors
                far = tl.where(near, 0.0, d_scores * factors)
                d_queries = _dot(far, keys)
                d_keys += _dot(tl.trans(far), queries)
            d_values += _dot(tl.trans(scores), d_out)
            from_state = before * _dot(d_out, tl.trans(state))
            d_queries += from_state
            read = queries * from_state
            crossing += tl.sum(tl.where(divided[:, None], read, 0.0), axis=0)
            ending += queries * d_queries
            close = tl.where(near, d_scores, 0.0)
            near_keys += _dot(tl.trans(close), queries)
            _store_rows(dq, d_queries + _dot(close, keys), part, t, time, heads, head, 0, width, K)
            d_state += _dot(tl.trans(queries * before), d_out)

        d_keys += from_end
        _store_rows(dk, d_keys + near_keys, part, t, time, kv_heads, h, 0, width, K)
        _store_rows(dv, d_values, b, t, time, kv_heads, h, first, columns, V)
        if HAS_G:
            # What crosses step t: all that comes from the state, less what ended before t, plus what began before t.
            same = document[:, None] == document[None, :]
            past = tl.where(same & (i[None, :] < i[:, None]), 1.0, 0.0)
            ended = past
            if LATE:
                ended = tl.where(same & (i[None, :] <= i[:, None]) & divided[None, :], 1.0, 0.0)
            d_decays = _dot(past, keys * d_keys) - _dot(ended, ending)
            d_decays += tl.where((document == 0)[:, None], crossing[None, :], 0.0)
            d_decays = tl.where(valid[:, None], d_decays, 0.0)
            if CHANNELS:
                _store_rows(dg, d_decays, part, t, time, kv_heads, h, 0, width, K)
            else:
                to = dg + (part * time + t) * kv_heads + h
                tl.store(to, tl.sum(d_decays, axis=1), mask=t < time)
    tl.store(dinitial + offsets, d_state, mask=inside)
