"""Short causal convolution: each channel mixes its last W inputs.

    y_t[d] = act( bias[d] + sum_{i=0}^{W-1} weight[d, i] * x_{t-W+1+i}[d] )

B batch, T time, D channels, W taps. The state is the last W-1 inputs, oldest first.
Sources: H3 (Fu et al. 2023), Mamba (Gu and Dao 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import dispatch, register
from ..errors import RnnzooError, ShapeError

__all__ = ["short_conv"]


def _chunked():
    from .chunked import short_conv

    return short_conv


def _reference():
    from .reference import short_conv

    return short_conv


register("short_conv", "chunked", _chunked, priority=10)
register("short_conv", "reference", _reference, priority=0)


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
