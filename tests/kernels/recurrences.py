"""What the tests that all recurrences share need to know of each, and how they call it.

A recurrence describes itself in `cases_<folder>.py` by a list RECURRENCES, which `recurrences()` collects.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rnnzoo.kernels.dispatch import backends

EXACT = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.float64: torch.float64}


@dataclass(frozen=True)
class Shape:
    """Sizes of a call. Recurrences without heads take heads * width channels."""

    batch: int
    time: int
    heads: int
    width: int


@dataclass(frozen=True)
class Recurrence:
    """One operation.

    Args:
        name: of the operation, as its folder registers it. function: the public function.
        make: (shape, variant) -> floating inputs by argument name, in float64 (complex128), random by torch's global
            generator, of a size that keeps the recurrence stable; with "initial_state" (a tensor or a tuple of them).
        timed: which of them have time as their second axis; they are cut, joined and masked along it.
        variants: of the arguments, e.g. "per head" and "per channel" decay. options: variant -> arguments that are no
            tensors.
        decayed: (inputs, log) -> inputs whose decay is exp(log) at every step; None for operations without a decay.
        spread: (inputs, shape) -> the same call with numbers that hold for all steps written for every one, where the
            gradient of such a number is a sum over all; None where each such input has many of them.
        keeps_state_dtype: the state has the inputs' dtype (a state of past inputs), else it is float32.
        small: the widest width and most heads that slow backends (Triton's interpreter) are tested with.
    """

    name: str
    function: Callable[..., Any]
    make: Callable[[Shape, str], dict[str, Any]]
    timed: frozenset[str]
    variants: tuple[str, ...] = ("",)
    options: Callable[[str], dict[str, Any]] = field(default=lambda variant: {})
    decayed: Callable[[dict[str, Any], float], dict[str, Any]] | None = None
    spread: Callable[[dict[str, Any], Shape], dict[str, Any]] | None = None
    keeps_state_dtype: bool = False
    small: tuple[int, int] = (60, 2)

    def backends(self) -> list[str]:
        """Every backend of the operation but the loop, fastest first."""
        return [status.backend for status in backends(self.name) if status.backend != "reference"]


def recurrences() -> list[Recurrence]:
    """All that tests/kernels/cases_*.py describe."""
    here = pathlib.Path(__file__).parent
    modules = [importlib.import_module(f".{path.stem}", __package__) for path in sorted(here.glob("cases_*.py"))]
    return [recurrence for module in modules for recurrence in module.RECURRENCES]


def inputs_of(recurrence: Recurrence, shape: Shape, variant: str, seed: int, state: bool = True) -> dict[str, Any]:
    """Random float64 inputs."""
    torch.manual_seed(seed)
    inputs = recurrence.make(shape, variant)
    if not state:
        inputs.pop("initial_state")
    return inputs


def cast(recurrence: Recurrence, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same in another dtype; a state stays in float32 at least."""

    def to(x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.is_complex():
            return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
        return x.to(dtype)

    state = dtype if dtype == torch.float64 or recurrence.keeps_state_dtype else torch.float32
    return {
        name: pytree.tree_map(lambda x, name=name: to(x, state if name == "initial_state" else dtype), value)
        for name, value in inputs.items()
    }


def rounded(recurrence: Recurrence, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """In float64, but with the numbers that `dtype` can hold."""
    return cast(recurrence, cast(recurrence, inputs, dtype), torch.float64)


def run(
    recurrence: Recurrence,
    inputs: dict[str, Any],
    variant: str,
    backend: str | None,
    *,
    gradients: bool = True,
    **steps: Tensor | None,
) -> dict[str, Tensor]:
    """Output, final state and the gradients of a fixed random function of both, by name.

    Args:
        steps: seq_ids and mask.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    leaves = [x.detach().requires_grad_(gradients) for x in leaves]
    call = pytree.tree_unflatten(leaves, spec)
    output, state = recurrence.function(**call, **recurrence.options(variant), **steps, backend=backend)
    results = {"output": output} | {f"state {i}": x for i, x in enumerate(pytree.tree_leaves(state))}
    if not gradients:
        return results
    loss = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    for x in results.values():
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        # Weights that bfloat16 holds: every dtype gets the same gradients to start from.
        weighted = x.to(torch.complex128 if x.is_complex() else torch.float64) * weights.bfloat16().double()
        loss = loss + (weighted.real.sum() + 0.5 * weighted.imag.sum() if x.is_complex() else weighted.sum())
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(inputs)[0]]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return {name: x.detach() for name, x in results.items()} | {
        f"gradient of {name}": torch.zeros_like(x) if gradient is None else gradient
        for name, x, gradient in zip(names, leaves, found, strict=True)
    }


def gradient_sizes(
    recurrence: Recurrence, inputs: dict[str, Any], shape: Shape, variant: str, **steps: Tensor | None
) -> dict[str, float]:
    """What errors are relative to where a gradient is one number, a sum over all steps and channels that may cancel.

    The norm over steps of what each adds, channels by their absolute value.
    """
    if recurrence.spread is None:
        return {}
    spread = recurrence.spread(inputs, shape)
    found = run(recurrence, spread, variant, "reference", **steps)
    names = [f"gradient of ['{name}']" for name, x in spread.items() if x is not inputs[name]]
    return {name: float(found[name].abs().sum(-1).norm()) for name in names}


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, sizes: dict[str, float] | None = None
) -> None:
    """Relative error in the norm, tensor by tensor; `sizes` has norms to take instead of the expected tensor's."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        wide = torch.complex128 if right.is_complex() else torch.float64
        left, right = found[name].to(wide), right.to(wide)
        assert left.shape == right.shape, name
        assert left.isfinite().all() == right.isfinite().all(), name
        alike = left == right  # also -inf of an empty state
        error = torch.where(alike, 0.0, left - right).norm()
        size = (sizes or {}).get(name, torch.where(right.isfinite(), right, 0.0).norm())
        assert error <= tolerance * size + 1e-30, f"{name}: relative error {float(error / (size + 1e-300)):.2e}"


def random_steps(batch: int, time: int, packed: float, masked: float) -> dict[str, Tensor | None]:
    """seq_ids whose documents end with probability `packed` a step, a mask with a share `masked` of False."""
    ids = (torch.rand(batch, time) < packed).cumsum(1) if packed else None
    mask = torch.rand(batch, time) >= masked if masked else None
    return {"seq_ids": ids, "mask": mask}


def cut(recurrence: Recurrence, inputs: dict[str, Any], part: slice) -> dict[str, Any]:
    """Steps `part` of all timed inputs."""
    return {name: x[:, part] if name in recurrence.timed else x for name, x in inputs.items()}


def cases() -> Iterator[tuple[Recurrence, str, str]]:
    """Every recurrence with each of its backends and variants."""
    for recurrence in recurrences():
        for backend in recurrence.backends():
            for variant in recurrence.variants:
                yield recurrence, backend, variant
