"""The ladder: what a conversion measures of its student after each stage."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.stages.ladder import TOKENS, held_out_perplexity

from ..end_to_end.conftest import write_documents
from .tiny import tiny_model, tiny_teacher, tiny_tokenizer

TEXTS = ["The king went to the hill and it was on the way. " * 20] * 3


def test_every_stage_and_the_teacher_are_measured_on_the_same_tokens(tmp_path):
    data = [str(write_documents(tmp_path / "text.jsonl", 300))]
    options = {"data": data, "tokens": 2048, "seq_len": 128, "dtype": "float32"}
    results = convert(str(tiny_teacher("llama", tmp_path)), "supra", tmp_path / "out", **options)
    stages = results["conversion"]["stages"]
    assert [stage["name"] for stage in stages] == ["initialise", "uptrain"]
    tokens = results["conversion"]["teacher_perplexity"]["tokens"]
    assert all(stage["perplexity"] > 1 and stage["perplexity_tokens"] == tokens > 100 for stage in stages)
    text = json.loads((tmp_path / "out" / ".rnnzoo" / "evaluation_texts.json").read_text())
    whole = held_out_perplexity(tiny_model("llama"), tiny_tokenizer(), text, window=128, bf16=False)
    assert math.isclose(whole["value"], results["conversion"]["teacher_perplexity"]["value"], rel_tol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"is that of {tokens:,} held-out tokens; the teacher has" in card and "(plots/stages.png)" in card


def test_it_is_the_perplexity_of_the_models_own_loss():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = held_out_perplexity(model, tokenizer, TEXTS, window=64, bf16=False)
    ids = torch.tensor(tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"])[:TOKENS]
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    with torch.no_grad():
        loss = model(rows, labels=rows).loss.item()
    assert math.isclose(found["value"], math.exp(loss), rel_tol=1e-4) and found["tokens"] == rows[:, 1:].numel()


def test_a_broken_student_and_too_little_text_have_no_number():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert held_out_perplexity(model, tokenizer, [""], window=64, bf16=False) == {}
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert held_out_perplexity(model, tokenizer, TEXTS, window=64, bf16=False) == {}


@pytest.mark.parametrize("bf16", [False, True])
def test_measuring_leaves_the_model_as_it_was(bf16):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held_out_perplexity(model, tiny_tokenizer(), TEXTS, window=64, bf16=bf16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
