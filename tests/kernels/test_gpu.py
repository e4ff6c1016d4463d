"""Block sizes: by rule without a GPU; measured once, kept on disk and never measured again with one."""

from __future__ import annotations

import json

import pytest
import torch

from rnnzoo.kernels import gpu

RULE, CANDIDATES = {"BLOCK": 64}, [{"BLOCK": 32}, {"BLOCK": 128}]


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """A GPU on which a block takes as long as it is large; the list of what was timed."""
    timed: list[int] = []
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(gpu, "_known", {})
    monkeypatch.setattr(gpu, "_milliseconds", lambda run, sizes: timed.append(sizes["BLOCK"]) or sizes["BLOCK"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU 9000")
    monkeypatch.setenv("RNNZOO_CACHE", str(tmp_path))
    return timed


def choose() -> dict[str, int]:
    return gpu.tuned("scan", (64, "torch.float32"), RULE, CANDIDATES, lambda sizes: None)


def test_the_best_size_is_measured_once_and_kept_for_other_processes(pretended_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("RNNZOO_AUTOTUNE", "1")
    assert choose() == {"BLOCK": 32} and pretended_gpu == [64, 32, 128]
    assert choose() == {"BLOCK": 32} and len(pretended_gpu) == 3
    file = tmp_path / "kernels" / "tuning-Pretended-GPU-9000.json"
    assert json.loads(file.read_text()) == {"scan 64 torch.float32": {"BLOCK": 32}}
    assert list(file.parent.iterdir()) == [file]
    monkeypatch.setattr(gpu, "_known", {})  # as in another process
    monkeypatch.delenv("RNNZOO_AUTOTUNE")
    assert choose() == {"BLOCK": 32} and len(pretended_gpu) == 3


def test_nothing_is_measured_unless_asked_for(pretended_gpu, monkeypatch):
    monkeypatch.delenv("RNNZOO_AUTOTUNE", raising=False)
    assert choose() == RULE and not pretended_gpu


def test_a_damaged_file_is_measured_again(pretended_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("RNNZOO_AUTOTUNE", "1")
    file = tmp_path / "kernels" / "tuning-Pretended-GPU-9000.json"
    file.parent.mkdir()
    file.write_text("{half")
    assert choose() == {"BLOCK": 32} and json.loads(file.read_text())


def test_without_a_gpu_the_rule_holds(monkeypatch):
    monkeypatch.setenv("RNNZOO_AUTOTUNE", "1")
    if not torch.cuda.is_available():
        assert choose() == RULE
