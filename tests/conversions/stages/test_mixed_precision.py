"""Closed forms in bfloat16 are those in float32: a layer's new weights are at work in the layers after it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.fit.closed_form import ClosedForm
from rnnzoo.conversions.layers import InMemoryLayers
from rnnzoo.conversions.precision import mixed_precision
from rnnzoo.conversions.stages.calibrate import fit_layers
from rnnzoo.conversions.student import zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher

from ..tiny import tiny_teacher
from .jobs import student_of

CLOSED_FORMS = [("decay",), ("values",), ("scale",), ("output",), ("decay", "values", "scale", "output")]
STUDENTS = [
    "gated_delta_net",
    "mamba2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gla", "retnet", "rwkv7")),
]


def text(rows: int, length: int, seed: int) -> torch.Tensor:
    """Tokens that mostly follow from the two before them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    for t in range(2, length):
        follows = torch.rand(rows, generator=generator) < 0.9
        ids[:, t] = torch.where(follows, (ids[:, t - 1] * 7 + ids[:, t - 2] * 3) % 37 + 3, ids[:, t])
    return ids


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher that has learned something, so that its layers matter to its loss."""
    folder = tiny_teacher("llama", tmp_path_factory.mktemp("t"), num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(60):
        ids = text(8, 48, step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    ref = resolve_teacher(str(folder))
    return ref, ref.load()


@pytest.mark.parametrize("parts", CLOSED_FORMS, ids="+".join)
@pytest.mark.parametrize("name", STUDENTS)
def test_every_closed_form_ends_at_the_same_fit_in_both_precisions(trained, name, parts):
    """Up to one rounding of bfloat16, 2^-8. The ridge is given: which one is best may turn on rounding."""
    ids = text(4, 48, 1000)
    data = PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test"))
    losses = []
    for bf16 in (False, True):
        student = student_of(trained, name)
        teacher_model = zoo_teacher(*trained, torch.bfloat16 if bf16 else torch.float32)
        losses.append(
            fit_layers(InMemoryLayers(teacher_model, student), data, ClosedForm(parts, 0.1), judge=data, bf16=bf16)
        )
    assert losses[1] == pytest.approx(losses[0], rel=2**-8)


def test_a_weight_that_changes_in_the_block_is_cast_again():
    layer, x = torch.nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    with torch.no_grad(), mixed_precision("cpu", True):
        before = layer(x)
        layer.weight.zero_()
        after = layer(x)
    assert before.dtype == torch.bfloat16 and bool((after == 0).all()) and not bool((before == 0).all())
