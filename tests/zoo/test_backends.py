"""Every architecture generates on every backend of the kernels, with the same logits."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from rnnzoo.kernels.dispatch import use_backend
from rnnzoo.kernels.errors import RnnzooError

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
PROMPT = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def generated(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits of each of them."""
    found = model.generate(PROMPT, output_logits=True, return_dict_in_generate=True, **GREEDY)
    return found.sequences, torch.stack(found.logits, 1)


def test_generate_gives_the_same_on_every_backend(stack, make_model):
    model = make_model(stack, torch.float32)
    # A step of a grid of few bits is as large as what rounds to it; float64 never lies between two.
    exact = "hedgehog:rings" in stack or "hedgehog:widths" in stack
    model = model.double() if exact else model
    tokens, logits = generated(model)
    for name in ("reference", "chunked", "cpu"):
        with use_backend(name):
            found, scores = generated(model)
        torch.testing.assert_close(scores, logits, rtol=1e-3, atol=1e-3)
        assert torch.equal(found, tokens), name


@pytest.mark.parametrize("name", ["reference", "chunked", "cpu", "triton"])
def test_the_environment_s_choice_serves_too(make_model, monkeypatch, name):
    model = make_model(("mamba2", "gla", "s4d"), torch.float32)
    expected = model.generate(PROMPT, **GREEDY)
    monkeypatch.setenv("RNNZOO_BACKEND", name)
    assert torch.equal(model.generate(PROMPT, **GREEDY), expected)


def test_a_name_that_no_operation_has_is_an_error_of_generate(make_model, monkeypatch):
    monkeypatch.setenv("RNNZOO_BACKEND", "refrence")
    with pytest.raises(RnnzooError, match="RNNZOO_BACKEND=refrence: no operation has .* known are .*reference"):
        make_model(("mamba2",), torch.float32).generate(PROMPT, **GREEDY)


def test_what_serves_instead_is_logged_once_and_not_at_every_token(make_model, caplog):
    model = make_model(("s4d", "s4d"), torch.float32)
    with caplog.at_level(logging.WARNING, logger="rnnzoo.kernels"), use_backend("cpu"):
        model.generate(PROMPT, **GREEDY)
        model.generate(PROMPT, **GREEDY)
    said = [record.message for record in caplog.records if "long_conv " in record.message]
    assert len(said) <= 1 and all("long_conv has no backend cpu" in line for line in said)


def test_names_are_known_before_an_operation_is_imported():
    code = """
import sys
from rnnzoo.kernels.dispatch import use_backend
for name in ("reference", "chunked", "cpu", "triton", None):
    with use_backend(name):
        pass
assert not any("gated_linear_attention" in name for name in sys.modules)
try:
    with use_backend("warp"):
        pass
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("known are chunked, cpu, reference, triton.")
