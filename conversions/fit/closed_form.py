"""Converted layers refitted in closed form, one after the other, each on what the layers before it really give.

Two streams of hidden states go through the blocks side by side: the teacher's h and the student's s, of all rows of
the calibration text at one layer at a time. Where a layer was converted:

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
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from ...zoo.core.mixer import Context, Mixer
from ...zoo.core.registry import ATTENTION_TYPES
from ..precision import mixed_precision
from .distances import Distances
from .least_squares import RIDGES, Gram, chosen_ridge, held_out
from .linear_layers import set_with_bias, with_bias
from .values import Values

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ...zoo.core.model import RecurrentBlock
    from ..data import PackedTokens

__all__ = ["ClosedForm", "fit_layers", "output_projection"]

Report = Callable[[int, int], None]


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
    def of(cls, model: RecurrentForCausalLM, row: dict[str, Tensor]) -> Stream:
        device = model.model.embed_tokens.weight.device
        ids, seq_ids = (row[name][None].to(device) for name in ("input_ids", "seq_ids"))
        seq_ids = None if bool((seq_ids == seq_ids[:, :1]).all()) else seq_ids
        ctx = model.model.make_context(*ids.shape, device, seq_ids=seq_ids)
        return cls(model.model.enter(model.model.embed_tokens(ids)), ctx)

    def mixed(self, block: RecurrentBlock) -> Tensor:
        """What the block's mixer gives, the stream staying where it is."""
        ctx = dataclasses.replace(self.ctx, carried=self.carried)
        return block.mixer(block.input_layernorm(self.hidden), None, ctx)[0]

    def advance(self, block: RecurrentBlock) -> None:
        self.hidden, _, self.carried = block(self.hidden, None, self.ctx, self.carried)


@torch.no_grad()
def fit_layers(
    student: RecurrentForCausalLM,
    twin: RecurrentForCausalLM,
    data: PackedTokens,
    how: ClosedForm,
    only: Container[int] | None = None,
    weights: Tensor | None = None,
    bf16: bool = False,
    report: Report = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Refits the converted layers (those in `only`; None: all) in place.

    Args:
        weights: (layers, N, T), of the tokens in each layer's least squares; None: all alike.
        bf16: run the layers in bfloat16 where autocast does; sums are float64 in any case.
    Returns:
        A dict for each layer that was refitted: layer, the relative squared errors of its output `before` and `after`,
        weighted as the fit is, and whether its `values` are among what is new.
    Raises:
        RnnzooError: a layer's outputs are not finite.
    """
    device = student.model.embed_tokens.weight.device
    found = []
    with mixed_precision(device, bf16):
        teachers, students = ([Stream.of(model, data[i]) for i in range(len(data))] for model in (twin, student))
        for number, (theirs, ours) in enumerate(zip(twin.model.layers, student.model.layers, strict=True)):
            converted = student.config.layer_types[number] not in ATTENTION_TYPES
            output = output_projection(ours.mixer)
            if not converted or output is None or not (only is None or number in only):
                for stream in teachers:
                    stream.advance(theirs)
            else:
                layer = Layer(theirs, ours, output, how, None if weights is None else weights[number])
                layer.teach(teachers)
                before, after = layer.fit(students)
                if not math.isfinite(after):
                    raise RnnzooError(
                        f"The outputs of the student's layer {number} are not finite on the calibration text; leave "
                        "the calibrate stage out, or choose another student."
                    )
                found.append({"layer": number, "before": before, "after": after, "values": layer.values_refitted})
            for stream in students:
                stream.advance(ours)
            report(number + 1, len(student.model.layers))
    return found


class Layer:
    """A converted layer, and what its teacher said of the calibration text.

    Args:
        theirs, ours: the blocks of the two. output: the last linear layer of ours. weights: (N, T), or None.
    """

    def __init__(
        self, theirs: RecurrentBlock, ours: RecurrentBlock, output: nn.Linear, how: ClosedForm, weights: Tensor | None
    ):
        self.theirs, self.ours, self.output, self.how, self.gradients = theirs, ours, output, how, weights
        self.heads: list[Tensor] = []  # (T, H * d) each, before the teacher's W_o
        self.wanted: list[Tensor] = []  # (T, D): attention(h) + correct h
        self.streams: list[Tensor] = []  # (T, D): h behind the layer
        self.weights: list[Tensor | None] = []  # (T,): of the tokens in the least squares
        self.values_refitted = False
        self.fits_heads = theirs.mixer.proj.o_proj.in_features == output.in_features

    def teach(self, streams: list[Stream]) -> None:
        """Moves the teacher's streams on, keeps what its attention said, and sets our decay."""
        mixer = self.theirs.mixer
        distances = Distances(mixer) if "decay" in self.how.parts and has_decay(type(self.ours.mixer)) else None
        for stream in streams:
            hidden = stream.hidden
            with caught(mixer) as layer, caught(mixer.proj.o_proj) as projection:
                stream.advance(self.theirs)
            self.heads.append(projection.given[0])
            self.wanted.append(layer.output[0].float() + self.how.correct * hidden[0].float())
            self.streams.append(hidden[0] + layer.output[0])
            if distances is not None:
                distances.add(layer.given, stream.ctx)
        if distances is not None:
            self.ours.mixer.set_decay(-math.log(2) / distances.mean().to(self.output.weight.device))

    def weight_of(self, row: int, said: Tensor) -> Tensor | None:
        """Of the tokens of a row in the least squares, (T,); said (T, D) is the student's stream behind the layer."""
        if self.how.weighting == "norm":
            # Relative and robust (Cauchy's): squares of the few tokens that are far off would else hide all others.
            h = self.streams[row].float()
            size, off = h.square().mean(-1).clamp(min=1e-12), (said.float() - h).square().mean(-1)
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
        heads = self.theirs.mixer.proj.num_heads
        values = Values.of(self.ours, self.output, heads, streams[0])
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
        """Over the inputs of our W_o, and <t_h, o_h> and <o_h, o_h> (2, H) where our heads are as wide as theirs.

        The two halves are every other row, or the two ends of the only one.
        """
        size = with_bias(self.output).shape[1], self.output.out_features, self.output.weight.device
        halves = Gram(*size), Gram(*size)
        heads = self.theirs.mixer.proj.num_heads
        dots = torch.zeros(2, heads, dtype=torch.float64, device=size[2]) if self.fits_heads else None
        for i, stream in enumerate(streams):
            with caught(self.output) as seen:
                mixed = stream.mixed(self.ours)
            if i == len(self.weights):  # of what the layer said first
                self.weights.append(self.weight_of(i, stream.hidden[0] + mixed[0]))
            weight = self.weights[i]
            y = seen.given[0].to(torch.promote_types(self.output.weight.dtype, torch.float32))
            wanted = self.wanted[i].to(y) - self.how.correct * stream.hidden[0].to(y)
            if dots is not None:
                said, taught = (x.double().unflatten(-1, (heads, -1)) for x in (y, self.heads[i]))
                share = 1.0 if weight is None else weight.double()[:, None, None]
                dots += torch.stack([(x * said * share).sum((0, 2)) for x in (taught, said)])
            if self.output.bias is not None:
                y = nn.functional.pad(y, (0, 1), value=1.0)
            for half, part in enumerate(torch.arange(len(y), device=y.device).chunk(2 if len(streams) == 1 else 1)):
                halves[(i + half) % 2].add(y[part], wanted[part], None if weight is None else weight[part])
        return halves, dots


def output_projection(mixer: Mixer) -> nn.Linear | None:
    """The linear layer that writes a mixer's output into the residual stream; None: it has none that we know."""
    return mixer.output_projection()


def has_decay(mixer: type[Mixer]) -> bool:
    return mixer.has_decay()


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
