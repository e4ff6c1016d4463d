"""Short convolution in C (`cpu.c`), forward and backward, as custom operators that autograd and torch.compile know."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native import function, pointer
from ..operators import differentiable, needs_gradient
from ..steps import step_codes

LANES = 16  # as in cpu.c


def short_conv(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.short_conv`."""
    plain = type(x) is Tensor and not torch.compiler.is_compiling()
    tensors = (x, weight, bias, initial_state)
    needed = needs_gradient(*tensors)
    batch, time, channels = x.shape
    if time == 1 and mask is None and plain and not needed:
        state = (
            x.new_zeros(batch, channels, weight.shape[1] - 1) if initial_state is None else initial_state.to(x.dtype)
        )
        state = state.clone(memory_format=torch.contiguous_format)
        y = short_conv_step(x=x[:, 0], weight=weight, bias=bias, state=state, activation=activation)
        return y[:, None], state
    if channels < LANES:  # the C code goes LANES channels at a time
        extra = LANES - channels
        x, weight = F.pad(x, (0, extra)), F.pad(weight, (0, 0, 0, extra))
        bias = None if bias is None else F.pad(bias, (0, extra))
        initial_state = None if initial_state is None else F.pad(initial_state, (0, 0, 0, extra))
    inputs = (x, weight, bias, initial_state, step_codes(seq_ids, mask), activation == "silu")
    # Without autograd the operator around the C function would only cost its microseconds.
    y, state = _forward(*inputs) if plain and not needed else forward(*inputs)
    return (y, state) if channels == x.shape[2] else (y[..., :channels], state[:, :channels])


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, codes: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    y, state = _empty_outputs(x, weight, bias, initial, codes, silu)
    tensors = (*_ready(x, weight, bias, initial), codes, y, state)  # kept alive until the call returns
    function("short_conv", "short_conv_forward", "ppppppp" + "iiiiiii")(
        *map(pointer, tensors), *_numbers(x, weight, silu)
    )
    return y, state


def _empty_outputs(x, weight, bias, initial, codes, silu):
    batch, _, channels = x.shape
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(batch, channels, weight.shape[1] - 1)


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    codes: Tensor | None,
    silu: bool,
    dy: Tensor,
    dstate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weight, the bias (also where there is none) and the initial state."""
    gradients = _empty_gradients(x, weight, bias, initial, codes, silu, dy, dstate)
    tensors = (*_ready(x, weight, bias, initial), codes, dy.contiguous(), dstate.contiguous(), *gradients)
    function("short_conv", "short_conv_backward", "ppppppppppp" + "iiiiiii")(
        *map(pointer, tensors), *_numbers(x, weight, silu)
    )
    return gradients


def _empty_gradients(x, weight, bias, initial, codes, silu, dy, dstate):
    channels, taps = weight.shape
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(channels, taps, dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
        torch.empty_like(dstate, memory_format=torch.contiguous_format),
    )


def _ready(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the C code reads them: contiguous, weight and bias in float32, the state in x's dtype."""
    return (
        x.contiguous(),
        weight.to(torch.float32).contiguous(),
        None if bias is None else bias.to(torch.float32).contiguous(),
        None if initial is None else initial.to(x.dtype).contiguous(),
    )


def _numbers(x: Tensor, weight: Tensor, silu: bool) -> tuple[int, ...]:
    return (*x.shape, weight.shape[1], silu, torch.get_num_threads(), x.dtype == torch.bfloat16)


forward = differentiable("short_conv_cpu", _forward, _backward, _empty_outputs, _empty_gradients, "y state")


def short_conv_step(*, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None) -> Tensor:
    """See `kernels.short_conv.short_conv_step`."""
    x, weight = x.contiguous(), weight.contiguous()
    if bias is not None:
        bias = bias.to(weight.dtype).contiguous()
    y = torch.empty_like(x)
    channels, taps = weight.shape
    _step()(
        _PACK_STEP(
            *(x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), state.data_ptr(), y.data_ptr()),
            *(len(x), channels, taps, activation == "silu", x.dtype == torch.bfloat16),
            *(weight.dtype == torch.bfloat16, torch.get_num_threads()),
        )
    )
    return y


_PACK_STEP = struct.Struct("12q").pack  # the structure Step of cpu.c


@functools.cache
def _step() -> Callable[..., None]:
    return function("short_conv", "short_conv_step", "p")
