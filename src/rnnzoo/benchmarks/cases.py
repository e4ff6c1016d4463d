"""The calls that are measured: each recurrence at the sizes of a small language model's layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.delta_rule import delta_rule, delta_rule_step
from ..kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from ..kernels.linear_scan import linear_scan, linear_scan_step
from ..kernels.losses import linear_cross_entropy, linear_kl
from ..kernels.selective_scan import selective_scan, selective_scan_step
from ..kernels.short_conv import short_conv, short_conv_step
from ..kernels.softmax_scan import SoftmaxState, softmax_scan, softmax_scan_step

__all__ = ["CASES", "STEP_CASES", "Case", "scan"]

Inputs = dict[str, Any]  # tensors by argument name


@dataclass(frozen=True)
class Case:
    """One recurrence at one size.

    Args:
        name: as the tables show it. operation: as `dispatch` knows it. size: in words.
        make: time -> inputs on the CPU, in float32 where they are no indices.
        call: (inputs, backend) -> output, without the state.
        flops: of the recurrence itself, forward, a step; backward is counted as twice that.
        step: (state, inputs of one step, backend) -> output; the state is changed in place. None: it has no steps.
        state: -> an empty state of one layer.
    """

    name: str
    operation: str
    size: str
    make: Callable[[int], Inputs]
    call: Callable[[Inputs, str | None], Tensor]
    flops: float
    state: Callable[[], Any] = lambda: None
    step: Callable[[Any, Inputs, str | None], Any] | None = None

    def moved(self, time: int, backward: bool) -> int:
        """Bytes that have to be read and written: inputs and output, with `backward` again, and the gradients."""
        inputs = self.make(2)

        def size(tensors: Iterable[Tensor]) -> int:
            return sum(x.nbytes * time // 2 if x.ndim >= 2 and x.shape[1] == 2 else x.nbytes for x in tensors)

        forward = size(inputs.values()) + self.call(inputs, "reference").nbytes * time // 2
        gradients = size(x for x in inputs.values() if x.is_floating_point())
        return 2 * forward + gradients if backward else forward


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _recurrence(
    scan: Callable[..., Any],
    step: Callable[..., Any],
    size: str,
    make: Callable[[int], Inputs],
    flops: float,
    state: Callable[[], Any],
    kind: str = "",
    **settings: Any,
) -> Case:
    """The case of an operation and its step, which take inputs and settings by the same names."""
    return Case(
        scan.__name__ + kind,
        scan.__name__,
        size,
        make,
        lambda inputs, backend: scan(**inputs, **settings, backend=backend)[0],
        flops,
        state,
        lambda state, inputs, backend: step(**inputs, **settings, state=state, backend=backend),
    )


def scan(batch: int = 1, channels: int = 1024) -> Case:
    def make(time: int) -> Inputs:
        return {"a": torch.rand(batch, time, channels), "x": _normal(batch, time, channels)}

    size, flops = f"B{batch} D{channels}", 2 * batch * channels
    return _recurrence(linear_scan, linear_scan_step, size, make, flops, lambda: torch.zeros(batch, channels))


def _attention(kind: str, heads: int = 9, width: int = 64) -> Case:
    def make(time: int) -> Inputs:
        shape = (1, time, heads)
        decay = {"per head": (*shape, 1), "per channel": (*shape, width)}[kind]
        qkv = {name: _normal(*shape, width) for name in "qkv"}
        return qkv | {"g": F.logsigmoid(_normal(*decay) + 3)}

    operation = gated_linear_attention, gated_linear_attention_step
    size, flops = f"B1 H{heads} D{width}", 5 * heads * width * width
    return _recurrence(*operation, size, make, flops, lambda: torch.zeros(1, heads, width, width), f", {kind}")


def _delta(heads: int = 8, width: int = 64) -> Case:
    def make(time: int) -> Inputs:
        shape = (1, time, heads)
        key = F.normalize(_normal(*shape, width), dim=-1)
        beta, g = torch.rand(*shape, 1), F.logsigmoid(_normal(*shape, 1) + 3)
        given = {"q": F.normalize(_normal(*shape, width), dim=-1), "k": beta * key, "v": _normal(*shape, width)}
        return given | {"a": -beta * g.exp() * key, "b": key, "g": g}

    operation, size, flops = (delta_rule, delta_rule_step), f"B1 H{heads} D{width}", 9 * heads * width * width
    return _recurrence(*operation, size, make, flops, lambda: torch.zeros(1, heads, width, width), ", decay per head")


def _selective(channels: int = 512, width: int = 16) -> Case:
    def make(time: int) -> Inputs:
        return {
            "x": _normal(1, time, channels),
            "dt": F.softplus(_normal(1, time, channels) - 4),
            "a": -torch.arange(1.0, width + 1).repeat(channels, 1),
            "b": _normal(1, time, width),
            "c": _normal(1, time, width),
            "d": torch.ones(channels),
        }

    operation, size = (selective_scan, selective_scan_step), f"B1 D{channels} N{width}"
    return _recurrence(*operation, size, make, 7 * channels * width, lambda: torch.zeros(1, channels, width))


def _softmax(channels: int = 1024) -> Case:
    def make(time: int) -> Inputs:
        given = {"k": _normal(1, time, 1, channels), "v": _normal(1, time, 1, channels)}
        return given | {"decay": -torch.rand(1, channels), "bonus": _normal(1, channels)}

    def state() -> SoftmaxState:
        empty = (1, 1, channels)
        return SoftmaxState(torch.full(empty, float("-inf")), torch.zeros(empty), torch.zeros(empty))

    return _recurrence(softmax_scan, softmax_scan_step, f"B1 D{channels}", make, 12 * channels, state, ", RWKV-4")


def _conv(channels: int = 1024, taps: int = 4) -> Case:
    def make(time: int) -> Inputs:
        return {"x": _normal(1, time, channels), "weight": _normal(channels, taps), "bias": _normal(channels)}

    operation, size, flops = (short_conv, short_conv_step), f"B1 D{channels} W{taps}", 2 * taps * channels
    return _recurrence(
        *operation, size, make, flops, lambda: torch.zeros(1, channels, taps - 1), ", silu", activation="silu"
    )


def _head(distil: bool, width: int = 576, vocabulary: int = 16_384) -> Case:
    """A language-model head and its loss: cross-entropy, or the divergence from a teacher's."""

    def make(time: int) -> Inputs:
        student = {"hidden": _normal(1, time, width), "weight": _normal(vocabulary, width) * width**-0.5}
        if distil:
            return student | {"teacher_hidden": _normal(1, time, width), "teacher_weight": student["weight"].clone()}
        return student | {"labels": torch.randint(vocabulary, (1, time))}

    def call(inputs: Inputs, backend: str | None) -> Tensor:
        if not distil:
            rows = inputs["hidden"][0], inputs["weight"], inputs["labels"][0]
            return linear_cross_entropy(*rows, backend=backend)[None]
        rows = inputs["hidden"][0], inputs["weight"], inputs["teacher_hidden"][0], inputs["teacher_weight"]
        return linear_kl(*rows, backend=backend)[None]

    name = "linear_kl" if distil else "linear_cross_entropy"
    flops = 2 * width * vocabulary * (2 if distil else 1)
    return Case(name, name, f"D{width} V{vocabulary}", make, call, flops)


CASES: tuple[Callable[..., Case], ...] = (
    scan,
    lambda: _attention("per head"),
    lambda: _attention("per channel"),
    _delta,
    _selective,
    _softmax,
    _conv,
    lambda: _head(False),
    lambda: _head(True),
)

STEP_CASES: tuple[Callable[..., Case], ...] = (
    lambda: scan(channels=36_864),
    lambda: _attention("per head"),
    lambda: _attention("per channel"),
    lambda: _delta(heads=9),
    lambda: _selective(channels=2304),
    lambda: _softmax(channels=12_288),
    lambda: _conv(channels=12_288),
)
"""The first of them for decoding: as many numbers in the state of a layer as 9 heads of 64 x 64 have."""
