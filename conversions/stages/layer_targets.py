"""What an attention layer is to a converted one: matrices, outputs of heads, or outputs of the layer.

B batch, T time, D hidden_size, H query heads, E width of what the output projection is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from ...zoo.core.mixer import Mixer
from ...zoo.core.registry import mixer_class
from ..sharding import gathers

if TYPE_CHECKING:
    from ...zoo.core.configuration import RecurrentConfig
    from ...zoo.core.heads import RecurrentForCausalLM
    from ...zoo.core.mixer import Context

__all__ = ["LOSSES", "check_target", "mixer_inputs", "seen_alone", "seen_layers", "what_it_does"]


def _relative(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).sum() / target.pow(2).sum()


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean()


def _norm(output: Tensor, target: Tensor) -> Tensor:
    """Of vectors (B, T, E) the mean of ||.||_2 / sqrt(E), of matrices (B, H, T, T) the mean of ||.||_F."""
    difference = output - target
    if difference.dim() == 4:
        return torch.linalg.matrix_norm(difference).mean()
    return torch.linalg.vector_norm(difference, dim=-1).mean() * difference.shape[-1] ** -0.5


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"relative": _relative, "mse": _mean_square, "norm": _norm}
"""Loss of what a mixer does (B, ...) against what it should do, by the stage's setting `loss`."""


def what_it_does(mixer: Any, hidden: Tensor, ctx: Context, target: str) -> Tensor:
    """What the mixer makes of hidden (B, T, D), in float32.

    "outputs" (B, T, D), "heads" (B, T, E), or "matrices" (B, H, T, T).
    """
    if target == "matrices":
        return gathers(mixer, "mixing_matrix")(hidden, ctx).float()
    with _heads_of(mixer) if target == "heads" else contextlib.nullcontext([]) as heads:
        output, _ = mixer(hidden, None, ctx)
    return (heads[0] if target == "heads" else output).float()


@contextlib.contextmanager
def _heads_of(mixer: Any) -> Iterator[list[Tensor]]:
    """What the output projection is given within the block."""
    projection = mixer.output_projection()
    assert projection is not None
    seen: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def seen_alone(block: Any, hidden: Tensor, ctx: Context, target: str) -> tuple[Tensor, Tensor]:
    """As `seen_layers` has it, of a teacher's layer by itself, before which the hidden states (B, T, D) are."""
    given = block.input_layernorm(hidden)
    return given, what_it_does(block.mixer, given, ctx, target)


class _Enough(Exception):
    """The layers asked for have run."""


@torch.no_grad()
def mixer_inputs(
    model: RecurrentForCausalLM, ids: Tensor, seq_ids: Tensor | None, layers: list[int]
) -> dict[int, Tensor]:
    """What the mixers of `layers` are given, (B, T, D) each, of ids (B, T). Layers after them do not run."""
    return {i: given for i, (given, _) in seen_layers(model, ids, seq_ids, layers, None).items()}


@torch.no_grad()
def seen_layers(
    model: RecurrentForCausalLM, ids: Tensor, seq_ids: Tensor | None, layers: list[int], target: str | None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each of `layers` of a teacher: what its mixer is given, and what this makes of it, as `what_it_does` says.

    Args:
        ids, seq_ids: (B, T). target: None: anything.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    blocks = model.model.layers

    def watch(number: int) -> Any:
        mixer: Any = blocks[number].mixer

        def hook(_: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            made = output[0]
            if target == "matrices":
                made = mixer.mixing_matrix(args[0], args[2])
            elif target == "heads":
                made = heads[number].pop()
            seen[number] = args[0], made.float()
            if number == max(layers) < len(blocks) - 1:
                raise _Enough

        return hook

    with contextlib.ExitStack() as stack:
        heads = {i: stack.enter_context(_heads_of(blocks[i].mixer)) for i in layers if target == "heads"}
        for i in layers:
            stack.callback(blocks[i].mixer.register_forward_hook(watch(i)).remove)
        stack.enter_context(contextlib.suppress(_Enough))
        model.model(input_ids=ids, seq_ids=seq_ids, use_cache=False)
    return seen


def check_target(target: str, student: str, config: RecurrentConfig) -> None:
    """Refuses a target that a student's layers do not have.

    Args:
        config: of the student, with its `layer_types`.
    Raises:
        RnnzooError: says which the student has.
    """
    if target == "outputs":
        return
    cls = mixer_class(student)
    if target == "matrices":
        if cls.mixing_matrix is Mixer.mixing_matrix:
            raise RnnzooError(
                f"target: matrices needs layers with a mixing matrix, which '{student}' layers are not; use target: "
                "outputs or another student."
            )
        return
    with torch.device("meta"):
        projection = cls(config, config.layer_types.index(student)).output_projection()
    width = config.num_attention_heads * config.head_dim
    if projection is None or projection.in_features != width:
        has = "no output projection" if projection is None else f"heads of {projection.in_features} channels in all"
        raise RnnzooError(
            f"target: heads needs layers whose heads are as wide as the teacher's, {width} channels in all; "
            f"'{student}' layers have {has}; use target: outputs or another student."
        )
