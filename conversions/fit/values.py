"""The values of a converted layer in closed form, where what its heads give is a sum of them over time.

    o_h = P_h W_v^T,   P_h = M_h x        M_h (T, T): what queries, keys and gates make of the text, not the values
    W_v <- argmin_W  sum_h sum_t w_t |P_ht W^T - t_ht|^2 + lambda |W - W_v|^2

for every kv head, over the query heads h that read it. o_h is what the layer's norm is given or, where it has none, its
output projection; t_h is what the teacher's heads give to theirs. P is made by the layer itself, with slices of the
identity for W_v: its recurrence runs over the channels of x, in time linear in T, and no M is ever there.

T tokens, D inputs of W_v (one more, always 1, where there is a bias), H query heads, Hk kv heads, V value width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ..precision import mixed_precision
from .least_squares import Gram, chosen_ridge
from .linear_layers import set_with_bias, with_bias

if TYPE_CHECKING:
    from ...zoo.core.model import RecurrentBlock

__all__ = ["Values"]


class Stream(Protocol):
    """What is asked of a row of text on its way through a model, such as `closed_form.Stream`."""

    hidden: Tensor

    def mixed(self, block: RecurrentBlock) -> Tensor: ...


ROUNDING = 1e-3  # relative, of float32 outputs; what is not linear in the values is off by far more


@dataclasses.dataclass
class Values:
    """The values of a block's mixer that is linear in them.

    Attributes:
        projection: W_v. reader: the module that is given the outputs of the heads. heads: H. width: V.
    """

    block: RecurrentBlock
    projection: nn.Linear
    reader: nn.Module
    heads: int
    width: int

    @classmethod
    def of(cls, block: RecurrentBlock, output: nn.Linear, heads: int, stream: Stream) -> Values | None:
        """None where the mixer is not `heads` heads that are linear in its values, which a row tells.

        Args:
            output: the mixer's last linear layer. stream: a row, before the block.
        """
        projection, reader = block.mixer.value_projection(), block.mixer.heads_reader()
        width = output.in_features // heads
        if (
            projection is None
            or reader is None
            or projection.out_features % width
            or heads * width % projection.out_features
        ):
            return None
        found = cls(block, projection, reader, heads, width)
        return found if found.linear_on(stream) else None

    @property
    def inputs(self) -> int:
        """D."""
        return self.projection.in_features + int(self.projection.bias is not None)

    @property
    def kv_heads(self) -> int:
        return self.projection.out_features // self.width

    def linear_on(self, stream: Stream) -> bool:
        """Whether the heads give P W^T on this row, for a random W."""
        p = self.summed(stream)
        if p is None:
            return False
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.projection.out_features, self.inputs, generator=generator).to(p)
        with self.replaced(weight):
            mixed = self.mixed_values(stream)
        with mixed_precision(p.device, False):
            expected = p.unflatten(1, (self.kv_heads, -1)) @ weight.unflatten(0, (self.kv_heads, -1)).mT
        return mixed is not None and bool((mixed - expected.flatten(1, 2)).norm() < ROUNDING * mixed.norm())

    def mixed_values(self, stream: Stream) -> Tensor | None:
        """What the heads give, (T, H, V), float32 or float64; None where what is read is of another shape."""
        seen: list[Tensor] = []
        hook = self.reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with mixed_precision(stream.hidden.device, False):
                stream.mixed(self.block)
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0][0].flatten(1).shape[1] != self.heads * self.width:
            return None
        return seen[0][0].reshape(-1, self.heads, self.width).to(torch.promote_types(seen[0].dtype, torch.float32))

    @contextlib.contextmanager
    def replaced(self, weight: Tensor) -> Iterator[None]:
        """Within the block the values come from this weight (Hk * V, D)."""
        before = with_bias(self.projection)
        set_with_bias(self.projection, weight)
        try:
            yield
        finally:
            set_with_bias(self.projection, before)

    def summed(self, stream: Stream) -> Tensor | None:
        """P, (T, H, D); None where `mixed_values` is."""
        parts = []
        identity = torch.eye(self.inputs, dtype=self.projection.weight.dtype, device=self.projection.weight.device)
        for part in identity.split(self.width):
            weight = nn.functional.pad(part, (0, 0, 0, self.width - len(part))).repeat(self.kv_heads, 1)
            with self.replaced(weight):
                mixed = self.mixed_values(stream)
            if mixed is None:
                return None
            parts.append(mixed[..., : len(part)])
        return torch.cat(parts, -1)

    def fitted(
        self, streams: list[Stream], taught: list[Tensor], weights: list[Tensor | None], ridge: float
    ) -> tuple[Tensor, list[Tensor]]:
        """W_v (Hk * V, D) fitted to the whole text, and to each of two halves of it.

        Args:
            taught: what the teacher's heads give, (T, H * V) a row. weights: (T,), None: 1.
            ridge: lambda over the mean diagonal of the sums; 0: chosen for every head.
        """
        sums = self.sums(streams, taught, weights)
        before = with_bias(self.projection).unflatten(0, (self.kv_heads, -1))
        found: list[list[Tensor]] = [[], [], []]
        for halves, weight in zip(sums, before, strict=True):
            level = ridge or chosen_ridge(halves, weight)
            for gram, into in zip((halves[0] + halves[1], *halves), found, strict=True):
                into.append(gram.refit(weight, level) if math.isfinite(level) else weight)
        both, *apart = (torch.cat(heads) for heads in found)
        return both, apart

    def sums(
        self, streams: list[Stream], taught: list[Tensor], weights: list[Tensor | None]
    ) -> list[tuple[Gram, Gram]]:
        """For every kv head those over two halves of the text, which is divided as in `Layer.sums`."""
        device = self.projection.weight.device
        found = [tuple(Gram(self.inputs, self.width, device) for _ in range(2)) for _ in range(self.kv_heads)]
        for i, stream in enumerate(streams):
            p = self.summed(stream)
            assert p is not None
            p = p.unflatten(1, (self.kv_heads, -1))
            target = taught[i].to(p).unflatten(-1, (*p.shape[1:3], self.width))
            weight = torch.ones(len(p), device=device) if weights[i] is None else weights[i]
            weight = weight[:, None].expand(p.shape[0], p.shape[2])
            for half, part in enumerate(torch.arange(len(p), device=device).chunk(2 if len(streams) == 1 else 1)):
                for head, halves in enumerate(found):
                    y, z = (x[part, head].flatten(0, 1) for x in (p, target))
                    halves[(i + half) % 2].add(y, z, weight[part].flatten())
        return found
