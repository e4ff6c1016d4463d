"""What the custom operators of the fused backends have in common."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "contiguous", "differentiable", "needs_gradient", "unfit"]

NAMESPACE = "rnnzoo"
if __package__ != "rnnzoo.kernels":
    # A published model brings these modules along in a package of its own; torch has one table of operators a process.
    NAMESPACE += "_" + hashlib.sha256(str(__package__).encode()).hexdigest()[:16]


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may come, so that forward must keep what it needs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Each as its rows lie one after the other; None stays."""
    return [None if x is None else x.contiguous() for x in tensors]


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Tensor, ...]],
    empty_outputs: Callable[..., Any],
    empty_gradients: Callable[..., Any],
    results: str,
) -> Any:
    """`forward` as a custom operator of torch whose gradient is the operator `backward`.

    What backward is given follows from its arguments' names: an argument or a result of forward has the same name
    there, and `dh` is the gradient of the result h. A result without such an argument is not differentiable.

    Args:
        name: of the operator. forward: its first arguments are those that have gradients.
        backward: returns those gradients, in that order; for an argument that is None, anything.
        empty_outputs, empty_gradients: of the arguments of forward and backward, what these return, in shape and dtype.
        results: names of what forward returns, with blanks between them.
    """
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=())
    gradient = torch.library.custom_op(f"{NAMESPACE}::{name}_backward", backward, mutates_args=())
    operator.register_fake(empty_outputs)
    gradient.register_fake(empty_gradients)
    arguments, wanted = (list(inspect.signature(function).parameters) for function in (forward, backward))
    names = results.split()
    known = {name: place for place, name in reversed(list(enumerate(arguments + names)))}
    saved = [known[name] for name in wanted if name in known]
    slopes = [place for place, result in enumerate(names) if f"d{result}" in wanted]
    fixed = [place for place in range(len(names)) if place not in slopes]
    order = [name for name in wanted if name in known] + [f"d{names[place]}" for place in slopes]
    places = [order.index(name) for name in wanted]

    def remember(ctx, inputs, output) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        values = (*inputs, *outputs)
        ctx.values = [None if isinstance(values[place], Tensor) else values[place] for place in saved]
        ctx.save_for_backward(*[values[place] if isinstance(values[place], Tensor) else None for place in saved])
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        ctx.outputs = [(outputs[place].shape, outputs[place].dtype, outputs[place].device) for place in slopes]
        ctx.mark_non_differentiable(*[outputs[place] for place in fixed])
        ctx.set_materialize_grads(False)  # or zeros as large as the kept states would be made for nothing

    def differentiate(ctx, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [x if value is None else value for x, value in zip(ctx.saved_tensors, ctx.values, strict=True)]
        for place, (shape, dtype, device) in zip(slopes, ctx.outputs, strict=True):
            slope = upstream[place]
            given.append(torch.zeros(shape, dtype=dtype, device=device) if slope is None else slope)
        found = gradient(*[given[place] for place in places])
        present = [
            None if dtype is None else x if x.dtype == dtype else x.to(dtype)
            for x, dtype in zip(found, ctx.dtypes, strict=False)
        ]
        return *present, *[None] * (len(ctx.dtypes) - len(present))

    operator.register_autograd(differentiate, setup_context=remember)
    return operator


def unfit(call: dict[str, Any], on_device: Callable[[Tensor], bool], dtypes: Sequence[torch.dtype]) -> str | None:
    """Which of a call's arguments is not for a fused backend, and why; None where all are.

    Args:
        call: by name, and anything: what is no tensor, or a tuple of them, is passed over.
        on_device: whether the backend's device has this tensor. dtypes: of floating and complex tensors.
    """
    for name, tensor in _tensors(call):
        if not on_device(tensor):
            return f"{name} is on {tensor.device.type}"
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in dtypes:
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _tensors(call: dict[str, Any]) -> list[tuple[str, Tensor]]:
    named = []
    for name, value in call.items():
        if isinstance(value, Tensor):
            named.append((name, value))
        elif isinstance(value, tuple):
            named += _tensors({f"{name}[{index}]": part for index, part in enumerate(value)})
    return named
