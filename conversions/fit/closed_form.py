"""A converted layer refitted in closed form, on what the layers before it really give.

Two streams of hidden states go through the blocks side by side: the teacher's h and the student's s, of all rows of
the calibration text at one layer at a time (`stages/calibrate.py`). Where a layer was converted:

decay     its heads start to forget at the pace at which the teacher's heads look back (`distances`).
values    W_v of mixers that are linear in their values (`values`), where the layer's error on text that neither W_v nor
          W_o was fitted to is less with it.
scale     o_h <- o_h <t_h, o_h> / <o_h, o_h> for the heads' outputs o_h and the teacher's t_h, in W_o's columns.
output    W_o <- argmin_W  sum_t w_t |y_t W^T - target_t|^2 + lambda |W - W_o|^2, y_t what W_o is given, gates and norms
          included; target_t = attention(h)_t + correct (h_t - s_t), so that a layer mends in part what those before it
          left; lambda is relative to the mean diagonal of sum_t w_t y_t^T y_t, or chosen; w_t in `weight_of`.

W is drawn to the weight that it replaces, not to zero: little text changes little, and the error cannot grow.
Decay and scale after Taylor-Calibrate (2026); layer by layer on the student's own inputs, as GPTQ (Frantar et al. 2022)
quantises.

N rows of T tokens, D hidden_size, I inputs of W_o, H query heads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...zoo.core.mixer import Context
from .distances import Distances
from .least_squares import RIDGES, Gram, chosen_ridge, held_out
from .linear_layers import set_with_bias, with_bias
from .values import Values

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ...zoo.core.model import RecurrentBlock

__all__ = ["ClosedForm", "Layer", "Stream", "context_of", "fit_layer"]


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """What to fit and how; the words are those of this module's docstring.

    Attributes:
        ridge: lambda over the mean of the diagonal; 0: chosen for each layer, see `least_squares.py`.
    """

    parts: Sequence[str] = ("decay", "scale", "output")
    ridge: float = 0.0
    correct: float = 0.5
    weighting: str = "norm"


@dataclasses.dataclass
class Stream:
    """One row of text on its way through a model: hidden (1, T, D), and what a layer hands on to the later ones."""

    hidden: Tensor
    ctx: Context
    carried: Tensor | None = None

    @classmethod
    def of(cls, model: RecurrentForCausalLM, row: dict[str, Tensor], dtype: torch.dtype | None = None) -> Stream:
        """Before the first layer; dtype: of the hidden states, None for that of the embeddings."""
        device = model.model.embed_tokens.weight.device
        embedded = model.model.embed_tokens(row["input_ids"][None].to(device))
        return cls(model.model.enter(embedded.to(dtype or embedded.dtype)), context_of(model, row, device))

    def mixed(self, block: RecurrentBlock) -> Tensor:
        """What the block's mixer gives, the stream staying where it is."""
        ctx = dataclasses.replace(self.ctx, carried=self.carried)
        return block.mixer(block.input_layernorm(self.hidden), None, ctx)[0]

    def advance(self, block: RecurrentBlock) -> None:
        self.hidden, _, self.carried = block(self.hidden, None, self.ctx, self.carried)


def context_of(model: RecurrentForCausalLM, row: dict[str, Tensor], device: torch.device) -> Context:
    """Of a row by itself: (1, T), and its documents where there are several."""
    seq_ids = row["seq_ids"][None].to(device)
    plain = bool((seq_ids == seq_ids[:, :1]).all())
    return model.model.make_context(*seq_ids.shape, device, seq_ids=None if plain else seq_ids)


def fit_layer(
    teacher_block: RecurrentBlock,
    student_block: RecurrentBlock,
    how: ClosedForm,
    teachers: list[Stream],
    students: list[Stream],
    weights: Tensor | None,
) -> dict[str, Any] | None:
    """Refits our block's mixer in place, and moves the teacher's streams on where it does.

    Args:
        teacher_block, student_block: the blocks of the two. teachers, students: the same rows of text before them.
        weights: (N, T), of the tokens in the least squares; None: all alike.
    Returns:
        The relative squared errors of the layer's output `before` and `after`, weighted as the fit is, and whether its
        `values` are among what is new. None: the mixer has no output projection, and all is as it was.
    """
    output = student_block.mixer.output_projection()
    if output is None:
        return None
    layer = Layer(teacher_block, student_block, output, how, weights)
    layer.teach(teachers)
    before, after = layer.fit(students)
    return {"before": before, "after": after, "values": layer.values_refitted}


class Layer:
    """A converted layer, and what its teacher gives for the calibration text.

    Args:
        teacher_block, student_block: of the two models. output: the last linear layer. weights: (N, T), or None.
    """

    def __init__(
        self,
        teacher_block: RecurrentBlock,
        student_block: RecurrentBlock,
        output: nn.Linear,
        how: ClosedForm,
        weights: Tensor | None,
    ):
        self.teacher_block, self.student_block, self.output, self.how, self.gradients = (
            teacher_block,
            student_block,
            output,
            how,
            weights,
        )
        self.heads: list[Tensor] = []  # (T, H * d) each, before the teacher's W_o
        self.targets: list[Tensor] = []  # (T, D): attention(h) + correct h
        self.streams: list[Tensor] = []  # (T, D): h behind the layer
        self.weights: list[Tensor | None] = []  # (T,): of the tokens in the least squares
        self.values_refitted = False
        self.fits_heads = teacher_block.mixer.proj.o_proj.in_features == output.in_features

    def teach(self, streams: list[Stream]) -> None:
        """Moves the teacher's streams on, keeps what its attention gives, and sets our decay."""
        mixer = self.teacher_block.mixer
        distances = Distances(mixer) if "decay" in self.how.parts and self.student_block.mixer.has_decay() else None
        for stream in streams:
            hidden = stream.hidden
            with caught(mixer) as layer, caught(mixer.proj.o_proj) as projection:
                stream.advance(self.teacher_block)
            self.heads.append(projection.given[0])
            self.targets.append(layer.output[0].float() + self.how.correct * hidden[0].float())
            self.streams.append(hidden[0] + layer.output[0])
            if distances is not None:
                distances.add(layer.given, stream.ctx)
        if distances is not None:
            self.student_block.mixer.set_decay(-math.log(2) / distances.mean().to(self.output.weight.device))

    def weight_of(self, row: int, output: Tensor) -> Tensor | None:
        """Of the tokens of a row in the least squares, (T,); output (T, D) is the student's stream behind the layer."""
        if self.how.weighting == "norm":
            # Relative and robust (Cauchy's): squares of the few tokens that are far off would else hide all others.
            h = self.streams[row].float()
            size, off = h.square().mean(-1).clamp(min=1e-12), (output.float() - h).square().mean(-1)
            return 1 / ((off / size).median().clamp(min=1e-6) * size + off)
        return None if self.gradients is None else self.gradients[row]

    def fit(self, streams: list[Stream]) -> tuple[float, float]:
        """Values, scale and output; the layer's weighted relative errors before and after."""
        halves, dots = self.sums(streams)
        gram = halves[0] + halves[1]
        if not gram.finite():
            return math.nan, math.nan
        weight = with_bias(self.output)
        before = gram.error(weight)
        self.values_refitted = "values" in self.how.parts and self.fits_heads and self.fit_values(streams, halves)
        if self.values_refitted:
            halves, dots = self.sums(streams)
            gram = halves[0] + halves[1]
        if dots is not None and "scale" in self.how.parts:
            factors = dots[0] / dots[1].clamp(min=torch.finfo(torch.float64).tiny)
            columns = factors.repeat_interleave(self.output.in_features // len(factors))
            weight = gram.scaled(weight, nn.functional.pad(columns, (0, weight.shape[1] - len(columns)), value=1.0))
        if "output" in self.how.parts:
            ridge = self.how.ridge or chosen_ridge(halves, weight)
            weight = gram.refit(weight, ridge) if math.isfinite(ridge) else weight
        set_with_bias(self.output, weight)
        return before, gram.error(weight)

    def fit_values(self, streams: list[Stream], halves: tuple[Gram, Gram]) -> bool:
        """Whether the values are refitted now; halves: the sums of `sums` with the values as they were."""
        heads = self.teacher_block.mixer.proj.num_heads
        values = Values.of(self.student_block, self.output, heads, streams[0])
        if values is None:
            return False
        both, apart = values.fitted(streams, self.heads, self.weights, self.how.ridge)
        sums = []
        for weight in apart:
            with values.replaced(weight):
                sums.append(self.sums(streams)[0])
        output, ridges = with_bias(self.output), RIDGES if "output" in self.how.parts else ()
        before = min(held_out(halves, halves[::-1], output, ridges))
        after = min(held_out((sums[0][0], sums[1][1]), (sums[0][1], sums[1][0]), output, ridges))
        if not after < before:
            return False
        set_with_bias(values.projection, both)
        return True

    def sums(self, streams: list[Stream]) -> tuple[tuple[Gram, Gram], Tensor | None]:
        """Over the inputs of W_o, and <t_h, o_h> and <o_h, o_h> (2, H) where heads are as wide as the teacher's.

        The two halves are every other row, or the two ends of the only one.
        """
        size = with_bias(self.output).shape[1], self.output.out_features, self.output.weight.device
        halves = Gram(*size), Gram(*size)
        heads = self.teacher_block.mixer.proj.num_heads
        dots = torch.zeros(2, heads, dtype=torch.float64, device=size[2]) if self.fits_heads else None
        for i, stream in enumerate(streams):
            with caught(self.output) as seen:
                mixed = stream.mixed(self.student_block)
            if i == len(self.weights):  # of what the layer gave first
                self.weights.append(self.weight_of(i, stream.hidden[0] + mixed[0]))
            weight = self.weights[i]
            y = seen.given[0].to(torch.promote_types(self.output.weight.dtype, torch.float32))
            target = self.targets[i].to(y) - self.how.correct * stream.hidden[0].to(y)
            if dots is not None:
                student_heads, teacher_heads = (x.double().unflatten(-1, (heads, -1)) for x in (y, self.heads[i]))
                share = 1.0 if weight is None else weight.double()[:, None, None]
                dots += torch.stack([(x * student_heads * share).sum((0, 2)) for x in (teacher_heads, student_heads)])
            if self.output.bias is not None:
                y = nn.functional.pad(y, (0, 1), value=1.0)
            for half, part in enumerate(torch.arange(len(y), device=y.device).chunk(2 if len(streams) == 1 else 1)):
                halves[(i + half) % 2].add(y[part], target[part], None if weight is None else weight[part])
        return halves, dots


@dataclasses.dataclass
class Caught:
    """The first argument and the output (of a tuple the first) of a module's last call."""

    given: Tensor = dataclasses.field(init=False)
    output: Tensor = dataclasses.field(init=False)


@contextlib.contextmanager
def caught(module: nn.Module) -> Iterator[Caught]:
    found = Caught()

    def keep(_: Any, args: tuple, output: Any) -> None:
        found.given, found.output = args[0], output[0] if isinstance(output, tuple) else output

    hook = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()
