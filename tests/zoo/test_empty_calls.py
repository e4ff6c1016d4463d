"""A batch without rows is an empty result, for every mixer; a call without tokens is refused in one sentence."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.kernels.errors import ShapeError
from rnnzoo.zoo.core.cache import CACHE_NAME

EMPTY = torch.zeros(0, 7, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_batch_without_rows_gives_logits_without_rows(stack, dtype, make_model):
    model = make_model(stack, dtype)
    for extra in ({}, {"attention_mask": EMPTY + 1}, {"seq_ids": EMPTY}):
        out = model(EMPTY, use_cache=True, **extra)
        assert out.logits.shape == (0, 7, 61)
        with torch.no_grad():
            for _ in range(3):
                out = model(EMPTY[:, :1], **{CACHE_NAME: out[CACHE_NAME]})
        assert out.logits.shape == (0, 1, 61)


def test_a_batch_without_rows_changes_no_gradient(stack, make_model):
    model = make_model(stack, torch.float32).train()
    model(EMPTY).logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_a_call_without_tokens_is_refused_and_the_cache_stays_as_it_was(stack, make_model):
    model = make_model(stack, torch.float32)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True)[CACHE_NAME]
        for given in ({}, {CACHE_NAME: cache}):
            with pytest.raises(ShapeError, match=r"\(2, 0\).*at least one token"):
                model(ids[:, :0], **given)
        found = model(ids[:, 3:], **{CACHE_NAME: cache}).logits
        assert torch.allclose(found, model(ids).logits[:, 3:], rtol=1e-3, atol=1e-3)


def test_generate_without_a_prompt_is_refused(make_model):
    with pytest.raises(ShapeError, match="a batch of 0 rows"):
        make_model(("lru", "lru")).generate(EMPTY, max_new_tokens=2)
