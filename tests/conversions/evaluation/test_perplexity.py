"""Perplexity by windows, by stride and by position equals what the plain logits say."""

from __future__ import annotations

import math

import pytest
import torch

from rnnzoo.conversions.evaluation.perplexity import by_position, perplexity
from rnnzoo.conversions.evaluation.scoring import encode
from rnnzoo.conversions.evaluation.window_baseline import window_attention
from rnnzoo.kernels.errors import RnnzooError

from ..tiny import tiny_model, tiny_tokenizer

TEXT = "The café on the corner was closed — naïve of them, in the end; 東京 was far. " * 12


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=2048).eval()


def losses(model, ids):
    """(N - 1,) loss of every token but the first, from the model's own logits."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").double()


def test_windows_side_by_side_equal_a_direct_computation(model, tokenizer):
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    windows = [ids[i : i + 100] for i in range(0, len(ids) - 99, 100)]
    each = torch.stack([losses(model, window) for window in windows])
    found = perplexity(model, tokenizer, TEXT, window=100)
    assert found.value == pytest.approx(each.mean().exp().item(), rel=1e-5)
    assert found.n_windows == len(windows) and found.n_tokens == 99 * len(windows)
    spread = each.mean(1).std().item() / math.sqrt(len(windows))
    assert found.stderr == pytest.approx(found.value * spread, rel=1e-4)


def test_bits_per_byte_count_the_bytes_of_the_scored_tokens(model, tokenizer):
    ids, sizes = encode(tokenizer, TEXT)
    assert int(sizes.sum()) == len(TEXT.encode())
    found = perplexity(model, tokenizer, TEXT, window=len(ids))
    total = losses(model, ids).sum().item()
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / int(sizes[1:].sum()), rel=1e-5)
    assert found.stderr is None


def test_stride_scores_every_token_once_with_the_context_it_promises(model, tokenizer):
    ids = encode(tokenizer, TEXT)[0]
    window, stride = 64, 24
    expected = []
    for place in range(1, len(ids)):
        starts = [s for s in range(0, len(ids), stride) if s + window > place and s < place]
        start = min(starts)  # the first window that reaches it
        expected.append(losses(model, ids[start : start + window])[place - start - 1])
    found = perplexity(model, tokenizer, TEXT, window=window, stride=stride)
    assert found.n_tokens == len(ids) - 1
    assert found.value == pytest.approx(torch.stack(expected).mean().exp().item(), rel=1e-5)


def test_stride_and_windows_agree_where_one_window_holds_the_text(model, tokenizer):
    n = len(encode(tokenizer, TEXT)[0])
    strided = perplexity(model, tokenizer, TEXT, window=n, stride=50)
    assert strided.value == pytest.approx(perplexity(model, tokenizer, TEXT, window=n).value, rel=1e-7)


def test_positions_read_in_chunks_equal_one_pass(model, tokenizer):
    ids = encode(tokenizer, TEXT)[0][:500]
    whole = losses(model, ids)
    edges = (0, 100, 250, 500, 900)
    found = by_position(model, tokenizer, TEXT, max_tokens=500, edges=edges, chunk=64)
    assert [(b.start, b.end, b.n_tokens) for b in found] == [(0, 100, 99), (100, 250, 150), (250, 500, 250)]
    for bucket, part in zip(found, (whole[:99], whole[99:249], whole[249:]), strict=True):
        assert bucket.perplexity == pytest.approx(part.mean().exp().item(), rel=1e-4)


def test_positions_under_a_window_equal_one_pass_under_it(model, tokenizer):
    ids = encode(tokenizer, TEXT)[0][:400]
    with window_attention(model, 30):
        whole = losses(model, ids)
        found = by_position(model, tokenizer, TEXT, max_tokens=400, edges=(0, 200, 400), chunk=96)
    assert found[1].perplexity == pytest.approx(whole[199:].mean().exp().item(), rel=1e-4)


def test_bfloat16_runs_on_the_cpu(tokenizer):
    model = tiny_model("qwen2").to(torch.bfloat16).eval()
    assert math.isfinite(perplexity(model, tokenizer, TEXT, window=128, max_tokens=256).value)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 8, "stride": 8}, {"window": 8, "stride": 0}])
def test_impossible_windows_are_refused(model, tokenizer, options):
    with pytest.raises(RnnzooError, match="window must be"):
        perplexity(model, tokenizer, TEXT, **options)


def test_a_text_of_one_token_is_refused(model, tokenizer):
    with pytest.raises(RnnzooError, match="at least 2"):
        perplexity(model, tokenizer, "a")
