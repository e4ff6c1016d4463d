"""What defines a correct mixer: the same tokens give the same numbers, however they arrive. Every registered mixer."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rnnzoo.zoo.core.cache import CACHE_NAME

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# RNNZOO_EXAMPLES=50 searches longer: the same examples and more.
EXAMPLES = int(os.environ.get("RNNZOO_EXAMPLES", "4"))
SETTINGS = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=list(TOLERANCE), ids=["float64", "float32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def models(stack, dtype, make_model):
    """Model by (heads, kv heads); built once per test, not once per example."""
    if dtype == torch.float32 and "hedgehog:rings" in stack:
        pytest.skip("rounding to a coarse grid makes a step of the grid of a difference in the last bit")
    return functools.cache(lambda heads, kv_heads: make_model(stack, dtype, heads=heads, kv_heads=kv_heads).model)


heads = st.sampled_from([(4, 2), (4, 4), (4, 1)])
lengths = st.integers(1, 17)
seeds = st.integers(0, 2**16)


def tokens(seed: int, batch: int, time: int) -> torch.Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def in_pieces(model, ids, pieces, **columns):
    """Runs columns of `ids` piece by piece through one cache; `columns` are cut along with them."""
    cache, outputs, start = None, [], 0
    for length in pieces:
        cut = slice(start, start + length)
        extra = {name: value[:, cut] for name, value in columns.items() if value is not None}
        out = model(ids[:, cut], cache=cache, use_cache=True, **extra)
        cache, start = out[CACHE_NAME], start + length
        outputs.append(out.last_hidden_state)
    return torch.cat(outputs, 1), cache


def pieces_of(time: int, cuts: list[int]) -> list[int]:
    edges = sorted({0, time, *(c % time for c in cuts)})
    return [b - a for a, b in zip(edges, edges[1:], strict=False)]


@given(heads, lengths, st.lists(st.integers(0, 16), max_size=4), seeds)
@SETTINGS
@torch.no_grad()
def test_whole_equals_chunks_equals_token_by_token(models, sizes, time, cuts, seed):
    model, ids = models(*sizes), tokens(seed, 2, time)
    whole = model(ids).last_hidden_state
    close(in_pieces(model, ids, pieces_of(time, cuts))[0], whole)
    close(in_pieces(model, ids, [1] * time)[0], whole)


@given(
    heads,
    st.lists(st.integers(1, 7), min_size=2, max_size=4),
    st.lists(st.integers(1, 27), min_size=1, max_size=3),
    seeds,
)
@SETTINGS
@torch.no_grad()
def test_packed_equals_separate(models, sizes, documents, cuts, seed):
    model, time = models(*sizes), sum(documents)
    ids = tokens(seed, 2, time)
    separate = torch.cat([model(part).last_hidden_state for part in ids.split(documents, 1)], 1)
    seq_ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(2, -1)
    close(model(ids, seq_ids=seq_ids).last_hidden_state, separate)
    close(model(ids, seq_idx=seq_ids.int() + 5).last_hidden_state, separate)
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    close(model(ids, position_ids=positions).last_hidden_state, separate)
    edges = torch.tensor([0, *documents]).cumsum(0)
    close(model(ids[:1], cu_seq_lens_q=edges).last_hidden_state, separate[:1])
    # A document that ends where a chunk ends is noticed too.
    close(in_pieces(model, ids, documents, seq_ids=seq_ids)[0], separate)
    close(in_pieces(model, ids, [1] * time, seq_ids=seq_ids)[0], separate)
    close(in_pieces(model, ids, pieces_of(time, cuts), seq_ids=seq_ids)[0], separate)


@given(
    heads, st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(0, 6), st.lists(st.integers(0, 14)), seeds
)
@SETTINGS
@torch.no_grad()
def test_padding_anywhere_changes_nothing(models, sizes, counts, spare, cuts, seed):
    model, width = models(*sizes), max(counts) + spare
    generator = torch.Generator().manual_seed(seed)
    ids, mask = tokens(seed, len(counts), width), torch.zeros(len(counts), width, dtype=torch.long)
    for row, n in zip(mask, counts, strict=True):
        row[torch.randperm(width, generator=generator)[:n]] = 1
    padded = model(ids, attention_mask=mask).last_hidden_state
    pieces = pieces_of(width, cuts)
    chunked, cache = in_pieces(model, ids, pieces, attention_mask=mask)
    more = tokens(seed + 1, len(counts), 3)
    after = _continue(model, cache, more)
    for i, row in enumerate(mask.bool()):
        alone = model(torch.cat([ids[i][row], more[i]])[None]).last_hidden_state[0]
        close(padded[i][row], alone[: counts[i]])
        close(chunked[i][row], alone[: counts[i]])
        close(after[i], alone[counts[i] :])


def _continue(model, cache, more):
    return torch.cat([model(part, cache=cache).last_hidden_state for part in more.split([1, 2], 1)], 1)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_one_side_changes_nothing(models, side):
    model, ids = models(4, 2), tokens(3, 2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    rows = mask.bool()
    out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0) * mask).last_hidden_state
    for i in range(2):
        close(out[i][rows[i]], model(ids[i][rows[i]][None]).last_hidden_state[0])


@given(heads, st.lists(st.integers(1, 11), max_size=3), seeds)
@SETTINGS
@torch.no_grad()
def test_padding_inside_packed_documents_changes_nothing(models, sizes, cuts, seed):
    model, time, generator = models(*sizes), 12, torch.Generator().manual_seed(seed)
    ids, mask = tokens(seed, 1, time), torch.rand(1, time, generator=generator) < 0.6
    mask[0, int(torch.randint(0, time, (1,), generator=generator))] = True
    seq_ids = (torch.rand(1, time, generator=generator) < 0.2).long().cumsum(1)
    expected = model(ids[mask][None], seq_ids=seq_ids[mask][None]).last_hidden_state[0]
    scrambled = seq_ids.masked_fill(~mask, -1)  # the ids of padding mean nothing
    close(model(ids, attention_mask=mask, seq_ids=scrambled).last_hidden_state[mask], expected)
    for pieces in ([1] * time, pieces_of(time, cuts)):
        chunked, _ = in_pieces(model, ids, pieces, attention_mask=mask, seq_ids=scrambled)
        close(chunked[mask], expected)


@given(heads, st.integers(1, 9), st.lists(st.integers(0, 2), min_size=1, max_size=5), seeds)
@SETTINGS
@torch.no_grad()
def test_beams_reordered_equal_recomputed(models, sizes, time, order, seed):
    model, ids, order = models(*sizes), tokens(seed, 3, time), torch.tensor(order)
    mask = torch.ones(3, time, dtype=torch.long)
    mask[1, : time // 2] = 0
    cache = model(ids, attention_mask=mask, use_cache=True)[CACHE_NAME]
    cache.reorder_cache(order)
    more = tokens(seed + 1, len(order), 2)
    recomputed = model(
        torch.cat([ids[order], more], 1), attention_mask=torch.cat([mask[order], torch.ones_like(more)], 1)
    ).last_hidden_state
    close(model(more, cache=cache).last_hidden_state, recomputed[:, time:])


@given(heads, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 24), st.booleans(), seeds)
@SETTINGS
@torch.no_grad()
def test_tokens_taken_back_equal_tokens_never_seen(models, sizes, pieces, removed, padded, seed):
    model, start, time = models(*sizes), 3, sum(pieces)
    removed %= time + 1
    ids, mask = tokens(seed, 2, start + time), None
    if padded:
        mask = torch.rand(2, start + time, generator=torch.Generator().manual_seed(seed)) < 0.7
        mask[:, 0] = mask[:, -1] = True
    _, cache = in_pieces(model, ids[:, :start], [start], attention_mask=None if mask is None else mask[:, :start])
    cache.activate_past_recording()
    kept = start + time - removed
    for length in pieces:
        done = cache.get_seq_length()
        columns = None if mask is None else mask[:, : done + length]
        model(ids[:, done : done + length], attention_mask=columns, cache=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == kept
    more = tokens(seed + 1, 2, 3)
    whole = torch.cat([ids[:, :kept], more], 1)
    columns = None if mask is None else torch.cat([mask[:, :kept], torch.ones_like(more).bool()], 1)
    close(
        model(more, attention_mask=columns, cache=cache).last_hidden_state,
        model(whole, attention_mask=columns).last_hidden_state[:, kept:],
    )
