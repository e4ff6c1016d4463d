"""What a user could pick instead: the same mathematics from other packages, as far as they are installed.

Each peer gets the inputs of our case and returns its output; what it has to rearrange is done before the clock starts
where its own model would hold the tensors in that layout, else inside.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PEERS", "Peer"]

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """One implementation of somebody else's.

    Args:
        name: as the tables show it. case: which of ours it does. package: what has to be importable.
        build: () -> function of the inputs, which returns the output. devices: where it runs.
        sequential: a Python loop over time, measured at short lengths only.
    """

    name: str
    case: str
    package: str
    build: Callable[[], Callable[[Inputs], Tensor]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    sequential: bool = False

    def missing(self, device: str) -> str | None:
        """Why it cannot be measured here; None where it can."""
        if device not in self.devices:
            return f"does not run on {device}"
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


def _modeling(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _torch_only(function: Any) -> Any:
    """transformers' own code, where it would take another package's kernel for the function."""
    return inspect.unwrap(function)


def _mamba(mambapy: bool) -> Callable[[], Callable[[Inputs], Tensor]]:
    def build() -> Callable[[Inputs], Tensor]:
        scan = _torch_only(_modeling("mamba").mamba_selective_scan)

        def run(given: Inputs) -> Tensor:
            x, dt, b, c = (given[name].transpose(1, 2) for name in ("x", "dt", "b", "c"))
            return scan(x, dt, given["a"], b, c, given["d"], use_mambapy=mambapy)

        return run

    return build


def _mamba2() -> Callable[[Inputs], Tensor]:
    scan = _torch_only(_modeling("mamba2").mamba2_chunk_scan)

    def run(given: Inputs) -> Tensor:
        # Its decay is exp(A dt) and its input dt x: the same work; the numbers differ by the factor dt in v.
        dt = -given["g"][..., 0]
        a = -torch.ones(dt.shape[-1])
        return scan(given["v"], dt, a, given["k"], given["q"], chunk_size=256)

    return run


def _attention() -> Callable[[Inputs], Tensor]:
    def run(given: Inputs) -> Tensor:
        q, k, v = (given[name].transpose(1, 2) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def _gated_delta() -> Callable[[Inputs], Tensor]:
    scan = _torch_only(_modeling("qwen3_next").torch_chunk_gated_delta_rule)
    # beta and the key are apart there; k = beta * key with a key of length one.
    return lambda given: scan(given["q"], given["b"], given["v"], given["g"][..., 0], given["k"].norm(dim=-1))[0]


def _kimi_delta() -> Callable[[Inputs], Tensor]:
    scan = _torch_only(_modeling("kimi_linear").chunk_kimi_delta_attention)

    def run(given: Inputs) -> Tensor:
        g = given["g"].expand_as(given["b"])
        return scan(given["q"], given["b"], given["v"], g, given["k"].norm(dim=-1))[0]

    return run


def _rglru() -> Callable[[Inputs], Tensor]:
    scan = _modeling("recurrent_gemma").RecurrentGemmaRglru._rnn_scan

    def run(given: Inputs) -> Tensor:
        none = torch.zeros(*given["a"].shape[:2], 1, dtype=torch.bool, device=given["a"].device)
        return scan(None, given["x"], given["a"], none, None)[0]

    return run


def _rwkv() -> Callable[[Inputs], Tensor]:
    scan = _modeling("rwkv").rwkv_linear_attention_cpu

    def run(given: Inputs) -> Tensor:
        k, v = given["k"].flatten(2), given["v"].flatten(2)
        return scan((-given["decay"][0]).log(), given["bonus"][0], k, v)[0]

    return run


def _accelerated_scan() -> Callable[[Inputs], Tensor]:
    scan = importlib.import_module("accelerated_scan.ref").scan
    return lambda given: scan(given["a"].transpose(1, 2).contiguous(), given["x"].transpose(1, 2).contiguous())


def _mambapy_scan() -> Callable[[Inputs], Tensor]:
    scan = importlib.import_module("mambapy.pscan").pscan
    return lambda given: scan(given["a"][..., None], given["x"][..., None])


def _mlstm() -> Callable[[Inputs], Tensor]:
    scan = importlib.import_module("mlstm_kernels.torch.chunkwise.native").mlstm_chunkwise__native_autograd

    def run(given: Inputs) -> Tensor:
        q, k, v = (given[name].transpose(1, 2) for name in "qkv")
        gate = given["g"][..., 0].transpose(1, 2)
        return scan(q, k, v, torch.zeros_like(gate), gate)

    return run


def _fla(module: str, name: str, *order: str) -> Callable[[], Callable[[Inputs], Tensor]]:
    """A function of FLA on (batch, time, heads, width) tensors, in the order of its arguments."""

    def build() -> Callable[[Inputs], Tensor]:
        scan = getattr(importlib.import_module(f"fla.ops.{module}"), name)

        def run(given: Inputs) -> Tensor:
            values = {"g1": given["g"][..., 0], "beta": given["k"].norm(dim=-1)} if "g" in given else {}
            return scan(*((given | values)[name] for name in order))[0]

        return run

    return build


def _whole_logits(distil: bool) -> Callable[[], Callable[[Inputs], Tensor]]:
    """The losses as torch has them: all logits at once."""

    def run(given: Inputs) -> Tensor:
        logits = F.linear(given["hidden"][0], given["weight"])
        if not distil:
            return F.cross_entropy(logits, given["labels"][0])[None]
        with torch.no_grad():
            teacher = F.linear(given["teacher_hidden"][0], given["teacher_weight"]).log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")[None]

    return lambda: run


def _mamba_ssm() -> Callable[[Inputs], Tensor]:
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def run(given: Inputs) -> Tensor:
        x, dt, b, c = (given[name].transpose(1, 2).contiguous() for name in ("x", "dt", "b", "c"))
        return scan(x, dt, given["a"], b, c, given["d"])

    return run


PER_HEAD, PER_CHANNEL = "gated_linear_attention, per head", "gated_linear_attention, per channel"
DELTA = "delta_rule, decay per head"
PEERS = (
    Peer("transformers RecurrentGemma, loop", "linear_scan", "transformers", _rglru, sequential=True),
    Peer("accelerated-scan, torch", "linear_scan", "accelerated_scan", _accelerated_scan),
    Peer("mambapy scan", "linear_scan", "mambapy", _mambapy_scan),
    Peer("transformers Mamba-2", PER_HEAD, "transformers", _mamba2),
    Peer("SDPA causal attention", PER_HEAD, "torch", _attention),
    Peer("mlstm-kernels native", PER_HEAD, "mlstm_kernels", _mlstm),
    Peer("FLA simple_gla", PER_HEAD, "fla", _fla("simple_gla", "chunk_simple_gla", *"qkv", "g1"), devices=("cuda",)),
    Peer("FLA gla", PER_CHANNEL, "fla", _fla("gla", "chunk_gla", *"qkvg"), devices=("cuda",)),
    Peer("FLA gla naive", PER_CHANNEL, "fla", _fla("gla.naive", "naive_recurrent_gla", *"qkvg"), sequential=True),
    Peer("transformers Qwen3-Next", DELTA, "transformers", _gated_delta),
    Peer("transformers Kimi KDA", DELTA, "transformers", _kimi_delta),
    Peer(
        "FLA gated_delta_rule",
        DELTA,
        "fla",
        _fla("gated_delta_rule", "chunk_gated_delta_rule", "q", "b", "v", "g1", "beta"),
        devices=("cuda",),
    ),
    Peer("transformers Mamba, loop", "selective_scan", "transformers", _mamba(False), sequential=True),
    Peer("transformers Mamba with mambapy", "selective_scan", "mambapy", _mamba(True)),
    Peer("mamba-ssm", "selective_scan", "mamba_ssm", _mamba_ssm, devices=("cuda",)),
    Peer("torch, all logits", "linear_cross_entropy", "torch", _whole_logits(False)),
    Peer("torch, all logits", "linear_kl", "torch", _whole_logits(True)),
    Peer("transformers RWKV, loop", "softmax_scan, RWKV-4", "transformers", _rwkv, sequential=True),
)
