"""What a user could pick instead: the same mathematics from other packages, as far as they are installed.

Each peer gets the inputs of our case and returns its output; what it has to rearrange is done before the clock starts
where its own model would hold the tensors in that layout, else inside.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
        name: as the tables show it. case: which of ours it does.
        source: the function, "module:name". call: (the function, our inputs) -> output. devices: where it runs.
        sequential: a Python loop over time, measured at short lengths only.
        needs: what has to be importable; "" for the source's package.
    """

    name: str
    case: str
    source: str
    call: Callable[[Any, Inputs], Tensor]
    devices: tuple[str, ...] = ("cpu", "cuda")
    sequential: bool = False
    needs: str = ""

    def missing(self, device: str) -> str | None:
        """Why it cannot be measured here; None where it can."""
        if device not in self.devices:
            return f"does not run on {device}"
        package = self.needs or self.source.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return None

    def build(self) -> Callable[[Inputs], Tensor]:
        """Function of the inputs, which returns the output."""
        function = pkgutil.resolve_name(self.source)
        if self.source.startswith("transformers."):
            function = inspect.unwrap(function)  # its own code, where it would take another package's kernel
        return lambda given: self.call(function, given)


def _modeling(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


def _mamba(scan: Any, given: Inputs, **options: Any) -> Tensor:
    x, dt, b, c = (given[name].transpose(1, 2) for name in ("x", "dt", "b", "c"))
    return scan(x, dt, given["a"], b, c, given["d"], **options)


def _mamba_ssm(scan: Any, given: Inputs) -> Tensor:
    x, dt, b, c = (given[name].transpose(1, 2).contiguous() for name in ("x", "dt", "b", "c"))
    return scan(x, dt, given["a"], b, c, given["d"])


def _mamba2(scan: Any, given: Inputs) -> Tensor:
    # Its decay is exp(A dt) and its input dt x: the same work; the numbers differ by the factor dt in v.
    dt = -given["g"][..., 0]
    a = -torch.ones(dt.shape[-1])
    return scan(given["v"], dt, a, given["k"], given["q"], chunk_size=256)


def _attention(attend: Any, given: Inputs) -> Tensor:
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    return attend(q, k, v, is_causal=True)


def _gated_delta(scan: Any, given: Inputs) -> Tensor:
    # beta and the key are apart there; k = beta * key with a key of length one.
    return scan(given["q"], given["b"], given["v"], given["g"][..., 0], given["k"].norm(dim=-1))[0]


def _kimi_delta(scan: Any, given: Inputs) -> Tensor:
    g = given["g"].expand_as(given["b"])
    return scan(given["q"], given["b"], given["v"], g, given["k"].norm(dim=-1))[0]


def _rglru(scan: Any, given: Inputs) -> Tensor:
    none = torch.zeros(*given["a"].shape[:2], 1, dtype=torch.bool, device=given["a"].device)
    return scan(None, given["x"], given["a"], none, None)[0]


def _rwkv(scan: Any, given: Inputs) -> Tensor:
    k, v = given["k"].flatten(2), given["v"].flatten(2)
    return scan((-given["decay"][0]).log(), given["bonus"][0], k, v)[0]


def _accelerated_scan(scan: Any, given: Inputs) -> Tensor:
    return scan(given["a"].transpose(1, 2).contiguous(), given["x"].transpose(1, 2).contiguous())


def _mambapy_scan(scan: Any, given: Inputs) -> Tensor:
    return scan(given["a"][..., None], given["x"][..., None])


def _mlstm(scan: Any, given: Inputs) -> Tensor:
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    gate = given["g"][..., 0].transpose(1, 2)
    return scan(q, k, v, torch.zeros_like(gate), gate)


def _fla(*order: str) -> Callable[[Any, Inputs], Tensor]:
    """A function of FLA on (batch, time, heads, width) tensors, in the order of its arguments."""

    def call(scan: Any, given: Inputs) -> Tensor:
        values = {"g1": given["g"][..., 0], "beta": given["k"].norm(dim=-1)} if "g" in given else {}
        return scan(*((given | values)[name] for name in order))[0]

    return call


def _cross_entropy(loss: Any, given: Inputs) -> Tensor:
    return loss(F.linear(given["hidden"][0], given["weight"]), given["labels"][0])[None]


def _kl(loss: Any, given: Inputs) -> Tensor:
    logits = F.linear(given["hidden"][0], given["weight"])
    with torch.no_grad():
        teacher = F.linear(given["teacher_hidden"][0], given["teacher_weight"]).log_softmax(-1)
    return loss(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")[None]


PER_HEAD, PER_CHANNEL = "gated_linear_attention, per head", "gated_linear_attention, per channel"
DELTA = "delta_rule, decay per head"
GPU = ("cuda",)
MAMBA = f"{_modeling('mamba')}:mamba_selective_scan"
RGLRU = f"{_modeling('recurrent_gemma')}:RecurrentGemmaRglru._rnn_scan"
WKV = f"{_modeling('rwkv')}:rwkv_linear_attention_cpu"
FLA_DELTA = "fla.ops.gated_delta_rule:chunk_gated_delta_rule", _fla("q", "b", "v", "g1", "beta")
PEERS = (
    Peer("transformers RecurrentGemma, loop", "linear_scan", RGLRU, _rglru, sequential=True),
    Peer("accelerated-scan, torch", "linear_scan", "accelerated_scan.ref:scan", _accelerated_scan),
    Peer("mambapy scan", "linear_scan", "mambapy.pscan:pscan", _mambapy_scan),
    Peer("transformers Mamba-2", PER_HEAD, f"{_modeling('mamba2')}:mamba2_chunk_scan", _mamba2),
    Peer("SDPA causal attention", PER_HEAD, "torch.nn.functional:scaled_dot_product_attention", _attention),
    Peer(
        "mlstm-kernels native",
        PER_HEAD,
        "mlstm_kernels.torch.chunkwise.native:mlstm_chunkwise__native_autograd",
        _mlstm,
    ),
    Peer("FLA simple_gla", PER_HEAD, "fla.ops.simple_gla:chunk_simple_gla", _fla(*"qkv", "g1"), GPU),
    Peer("FLA gla", PER_CHANNEL, "fla.ops.gla:chunk_gla", _fla(*"qkvg"), GPU),
    Peer("FLA gla naive", PER_CHANNEL, "fla.ops.gla.naive:naive_recurrent_gla", _fla(*"qkvg"), sequential=True),
    Peer("transformers Qwen3-Next", DELTA, f"{_modeling('qwen3_next')}:torch_chunk_gated_delta_rule", _gated_delta),
    Peer("transformers Kimi KDA", DELTA, f"{_modeling('kimi_linear')}:chunk_kimi_delta_attention", _kimi_delta),
    Peer("FLA gated_delta_rule", DELTA, *FLA_DELTA, GPU),
    Peer("transformers Mamba, loop", "selective_scan", MAMBA, partial(_mamba, use_mambapy=False), sequential=True),
    Peer(
        "transformers Mamba with mambapy", "selective_scan", MAMBA, partial(_mamba, use_mambapy=True), needs="mambapy"
    ),
    Peer("mamba-ssm", "selective_scan", "mamba_ssm.ops.selective_scan_interface:selective_scan_fn", _mamba_ssm, GPU),
    Peer("torch, all logits", "linear_cross_entropy", "torch.nn.functional:cross_entropy", _cross_entropy),
    Peer("torch, all logits", "linear_kl", "torch.nn.functional:kl_div", _kl),
    Peer("transformers RWKV, loop", "softmax_scan, RWKV-4", WKV, _rwkv, sequential=True),
)
