"""The teacher cut to a window: the teacher itself where the window covers all, else a plain masked softmax."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.conversions.evaluation.scoring import Stream
from rnnzoo.conversions.evaluation.window_baseline import kv_bytes_per_token, window_attention, window_for_bytes
from rnnzoo.kernels.errors import RnnzooError

from ..tiny import TINY_FAMILIES, tiny_model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def slow_reference(model, ids, window, sinks):
    """The teacher's own eager attention under a dense additive mask: shares no code with the baseline."""
    n = ids.shape[1]
    mask = torch.full((n, n), float("-inf"))
    for i in range(n):
        for j in range(i + 1):
            if i - j < window or j < sinks:
                mask[i, j] = 0.0
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        mask = mask.clamp(min=torch.finfo(torch.float32).min)[None, None].expand(ids.shape[0], 1, n, n)
        keys = ("full_attention", "sliding_attention")
        needs_mapping = model.config.model_type in ("qwen2", "qwen3")
        return model(ids, attention_mask=dict.fromkeys(keys, mask) if needs_mapping else mask).logits
    finally:
        model.config._attn_implementation = before


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.no_grad()
def test_a_window_as_long_as_the_text_changes_nothing(family):
    model, ids = tiny_model(family).eval(), tokens(2, 40)
    expected = model(ids).logits
    with window_attention(model, 40):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(ids).logits, expected)  # and the teacher is itself again


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (7, 4), (20, 2)])
@torch.no_grad()
def test_a_cut_window_equals_a_dense_masked_softmax(family, window, sinks):
    model, ids = tiny_model(family).eval(), tokens(1, 70)
    expected = slow_reference(model, ids, window, sinks)
    with window_attention(model, window, sinks):
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_blocks_of_queries_meet_without_a_seam():
    model, ids = tiny_model("llama", max_position_embeddings=1024).eval(), tokens(1, 600)
    expected = slow_reference(model, ids, 50, 4)
    with window_attention(model, 50, 4):
        torch.testing.assert_close(model(ids).logits, expected, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral"])
@torch.no_grad()
def test_chunks_with_a_trimmed_cache_equal_one_pass_even_beyond_the_trained_length(family):
    model = tiny_model(family, max_position_embeddings=64).eval()
    ids = tokens(1, 150)
    with window_attention(model, 20, 4) as spec:
        assert spec.max_context(64) is None
        whole = model.base_model(ids, use_cache=False).last_hidden_state
        stream = Stream(model)
        parts = [stream.advance(part) for part in ids.split([30, 1, 50, 69], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-3)
    assert stream.cache.get_seq_length() == 23  # 4 sinks and what the next token's window still reaches


@torch.no_grad()
def test_sinks_beyond_the_trained_length_keep_the_furthest_trained_distance():
    """Window of one, one layer: a far query sees itself, and the sinks as from the last trained place."""
    model = tiny_model("llama", num_hidden_layers=1, max_position_embeddings=32).eval()
    head = tokens(1, 4)
    last = tokens(1, 1, seed=5)

    def after(fill: int) -> torch.Tensor:
        ids = torch.cat([head, torch.full((1, fill), 7), last], 1)
        return model.base_model(ids, use_cache=False).last_hidden_state[:, -1]

    with window_attention(model, 1, 4):
        torch.testing.assert_close(after(27), after(90), atol=1e-4, rtol=1e-3)  # places 31 and 94
        assert not torch.allclose(after(10), after(27), atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side):
    model, ids = tiny_model("llama").eval(), tokens(1, 30)
    pad = torch.zeros(1, 9, dtype=torch.long)
    order = (lambda a, b: [a, b]) if side == "left" else (lambda a, b: [b, a])
    padded = torch.cat(order(pad, ids), 1)
    mask = torch.cat(order(torch.zeros_like(pad), torch.ones_like(ids)), 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with window_attention(model, 8, 4):
        expected = model(ids).logits
        found = model(padded, attention_mask=mask, position_ids=positions).logits[mask.bool()][None]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_window_takes_the_bytes_it_is_given():
    config = tiny_model("llama").config  # 2 layers, 2 kv heads of 8
    assert kv_bytes_per_token(config, torch.bfloat16) == 2 * 2 * 2 * 8 * 2
    assert window_for_bytes(config, 128 * 20) == 16
    assert window_for_bytes(config, 128 * 21 - 1) == 16
    with pytest.raises(RnnzooError, match="too few"):
        window_for_bytes(config, 128 * 4)


def test_the_teachers_own_sliding_window_stays_in_force():
    model, ids = tiny_model("mistral", sliding_window=6).eval(), tokens(1, 40)
    with torch.no_grad():
        expected = model(ids).logits
        with window_attention(model, 30, 4):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-3)
