"""What is saved in bfloat16 is computed in float32 where the CPU has no bfloat16 products."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from rnnzoo.conversions import precision
from rnnzoo.conversions.context import StageContext
from rnnzoo.conversions.data import PackedTokens, TextHashes
from rnnzoo.conversions.mapped_layers import HiddenRows, MappedLayers


def torch_reports(monkeypatch, fast: bool) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: fast))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("fast", [False, True])
def test_the_dtype_to_compute_in_is_what_torch_reports_of_the_cpu(monkeypatch, fast):
    torch_reports(monkeypatch, fast)
    assert precision.compute_dtype(torch.bfloat16) == (torch.bfloat16 if fast else torch.float32)
    assert precision.compute_dtype(torch.float32) == torch.float32
    assert precision.compute_dtype(torch.bfloat16, "cuda") == torch.bfloat16


@pytest.mark.parametrize(("slowdown", "fast"), [(30.0, False), (1.2, True)])
def test_without_onednn_one_product_is_timed(monkeypatch, slowdown, fast):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(precision, "_slowdown", lambda: slowdown)
    assert precision.fast_bfloat16("cpu") is fast


def test_the_timed_products_take_time():
    assert precision._slowdown.__wrapped__() > 0


@pytest.mark.parametrize("fast", [False, True])
def test_a_conversion_saves_the_dtype_asked_for(monkeypatch, tmp_path, fast):
    torch_reports(monkeypatch, fast)
    context = StageContext(tmp_path, SimpleNamespace(), SimpleNamespace(), dtype=torch.bfloat16)
    assert context.dtype == torch.bfloat16 and context.bf16 is fast


def test_it_is_said_once(monkeypatch, caplog):
    torch_reports(monkeypatch, False)
    precision._say_float32.cache_clear()
    with caplog.at_level(logging.WARNING, "rnnzoo"):
        for _ in range(2):
            precision.compute_dtype(torch.bfloat16)
    assert sum("no bfloat16 products" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16])
def test_hidden_states_of_a_machine_with_another_dtype_are_read(tmp_path, there, here):
    """A run with its layers on disk, killed on one machine, goes on on another."""
    hidden, ids = torch.arange(24.0).view(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    path = tmp_path / "hidden-1.bin"
    MappedLayers._map(SimpleNamespace(dtype=there), path, (2, 3, 4)).copy_(hidden)
    mapped = MappedLayers._map(SimpleNamespace(dtype=here), path, (2, 3, 4))
    row = HiddenRows(PackedTokens(ids, ids, "test", TextHashes("test")), mapped, here)[1]["hidden"]
    assert row.dtype == here and torch.equal(row, hidden[1].to(here))
