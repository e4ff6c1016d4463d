"""Short causal convolution: each channel mixes its last W inputs.

    y_t[d] = act( bias[d] + sum_{i=0}^{W-1} weight[d, i] * x_{t-W+1+i}[d] )

B batch, T time, D channels, W taps. The state is the last W-1 inputs, oldest first.
Sources: H3 (Fu et al. 2023), Mamba (Gu and Dao 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import expect_axes
from ..dispatch import dispatch, dispatch_alike
from ..errors import RnnzooError, ShapeError
from ..registration import register_backends
from . import chunked, cpu, reference

__all__ = ["short_conv", "short_conv_step"]


def _triton():
    from . import triton_

    return triton_


def _cpu_supports(**call) -> str | None:
    return _too_many_taps(call["weight"]) or native.supports("short_conv", call)


def _cpu_step_supports(*, x, weight, bias, state, activation) -> str | None:
    call = {"x": x, "weight": weight}
    return _too_many_taps(weight) or native.supports_step("short_conv", call, state, dtypes=(x.dtype,))


def _too_many_taps(weight: Tensor) -> str | None:
    return f"weight has {weight.shape[1]} taps, more than 16" if weight.shape[1] > 16 else None


register_backends("short_conv", "short_conv", reference, chunked, cpu, _triton, cpu_supports=_cpu_supports)
register_backends("short_conv", "short_conv_step", reference, chunked, cpu, cpu_supports=_cpu_step_supports)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_ids: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolves each document of x on its own; inputs before its first token are zero.

    Args:
        x: (B, T, D). weight: (D, W), its last column for the current input. bias: (D,).
        activation: None or "silu", applied after the bias.
        initial_state: (B, D, W-1) the inputs before this call, oldest first; None: zeros.
        seq_ids: (B, T) integers; the state is zeroed where the id differs from the valid step before. The first step
            continues `initial_state`.
        mask: (B, T) booleans; False: the step is as if it were not there, and its output is zero.
        backend: which implementation; None chooses the fastest (`kernels/dispatch.py`).
    Returns:
        y: (B, T, D) in x's dtype, and the state after the last step, (B, D, W-1) in x's dtype.
    Raises:
        ShapeError: names the argument, its shape and the expected one. RnnzooError: unknown activation.
    """
    if x.ndim != 3 or x.shape[1] == 0:
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, time, channels) with at least one step.")
    batch, time, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}; expected ({channels}, taps).")
    taps = weight.shape[1]
    expected = {
        "bias": (bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, taps - 1)),
        "seq_ids": (seq_ids, (batch, time)),
        "mask": (mask, (batch, time)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(f"mask has dtype {mask.dtype}; expected torch.bool (True: a real token).")
    if activation not in (None, "silu"):
        raise RnnzooError(f"activation is {activation!r}; expected None or 'silu'.")
    call = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "activation": activation,
        "initial_state": initial_state,
        "seq_ids": seq_ids,
        "mask": mask,
    }
    return dispatch("short_conv", call, backend)


def short_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of decoding: y (B, D). `state` (B, D, W-1), of x's dtype, takes in x **in place**. Without gradients.

    Args:
        x: (B, D). weight: (D, W). bias: (D,). activation: None or "silu".
    Raises:
        ShapeError: where the shapes do not fit together.
    """
    expect_axes("weight", weight, 2, "(channels, taps)")
    channels, taps = weight.shape
    if state.shape != (*x.shape, taps - 1) or x.shape[-1] != channels:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and state {tuple(state.shape)}"
        raise ShapeError(f"{shapes} do not fit; expected (batch, D), (D, W) and (batch, D, W-1).")
    if bias is not None and bias.shape != (channels,):
        raise ShapeError(f"bias has shape {tuple(bias.shape)}; expected ({channels},).")
    call = {"x": x, "weight": weight, "bias": bias, "state": state, "activation": activation}
    alike = (x.dtype, weight.dtype, state.dtype, state.device, state.is_contiguous(), taps, activation)
    return dispatch_alike("short_conv_step", call, alike, backend)
