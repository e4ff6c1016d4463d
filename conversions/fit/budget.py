"""A state budget becomes a configuration: bytes go where they remove most of the error that was measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.errors import RnnzooError
from ...zoo.core.configuration import RecurrentConfig
from ...zoo.core.registry import ATTENTION_TYPES, mixer_class
from ...zoo.core.sizes import layer_state_bytes, state_bytes
from .allocation import Allocation, Costs, allocate
from .scored_errors import measure_scored
from .state_errors import Measured, Progress, measure_states

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM
    from ..data import PackedTokens

__all__ = ["StateBudget"]


@dataclass(frozen=True)
class StateBudget:
    """Bytes for one sequence, and what they may be spent on.

    Attributes:
        make_config: (layer types, fields by name) -> the student's configuration.
        attention: the teacher's own type of each layer.
        size: bytes. dtype: of the model that will be saved.
        widths: candidates for the width of a layer's linear state; none: the student's own in all layers.
        context: tokens for which a layer of full attention is paid, which then is a candidate too; 0: none is.
    """

    make_config: Callable[..., RecurrentConfig]
    attention: Sequence[str]
    size: int
    dtype: torch.dtype
    widths: Sequence[int] = ()
    context: int = 0

    def costs(self, types: Sequence[str]) -> Costs:
        """Of each thing in a student with mixers `types`, read off the states themselves."""
        config, count = self.make_config(types), len(_converted(types))
        kv_heads = config.num_key_value_heads

        def size(window: int, width: int) -> int:
            fields: dict[str, Any] = {"window_sizes": [[window] * kv_heads] * len(types)}
            fields |= {"feature_widths": [width] * len(types)} if self.widths else {}
            return state_bytes(self.make_config(types, **fields), self.dtype) // count

        least = size(1, 0)
        token, feature = (size(2, 0) - least) // kv_heads, (size(1, 2) - least) // kv_heads // 2
        attention = self.context * 2 * kv_heads * config.head_dim * self.dtype.itemsize if self.context else None
        return Costs(least - token * kv_heads, token, feature, attention)

    def check(self, types: Sequence[str]) -> None:
        """Refuses a budget that does not buy a window of one token for every kv head.

        Raises:
            RnnzooError: with the least that does.
        """
        costs = self.costs(types)
        least = len(_converted(types)) * (costs.layer + self.make_config(types).num_key_value_heads * costs.token)
        if self.size < least:
            raise RnnzooError(
                f"A state budget of {self.size:,} bytes is too small: with windows of one token, this student takes "
                f"{least:,} for one sequence."
            )

    def spend(
        self,
        teacher_model: RecurrentForCausalLM,
        types: Sequence[str],
        data: PackedTokens,
        seed: int,
        fixed_widths: Mapping[int, int] | None = None,
        trained: Collection[int] = (),
        progress: Progress | None = None,
    ) -> tuple[RecurrentConfig, dict[str, Any]]:
        """The student's configuration with what the budget buys, and a record of it.

        Args:
            teacher_model: the teacher, every layer attention. types: mixer of each layer.
            fixed_widths: of layers that must keep theirs. trained: layers that cannot be attention again.
        Raises:
            RnnzooError: the budget is too small.
        """
        mixer = mixer_class(types[_converted(types)[0]])
        widths = [*self.widths, *(fixed_widths or {}).values()]
        config = self.make_config(types)
        if mixer.keeps_by_score:
            measured = measure_scored(teacher_model, data, config, mixer, seed, progress)
        else:
            measured = measure_states(teacher_model, data, config.num_sinks, seed, widths, mixer, progress)
        return self.divide(types, measured, fixed_widths, trained)

    def divide(
        self,
        types: Sequence[str],
        measured: Measured,
        fixed_widths: Mapping[int, int] | None = None,
        trained: Collection[int] = (),
    ) -> tuple[RecurrentConfig, dict[str, Any]]:
        """The same by errors that have been measured."""
        costs, converted = self.costs(types), _converted(types)
        may_keep = [i for i in converted if self.attention[i] == "full_attention" and i not in trained]
        found = allocate(measured, converted, self.size, costs, fixed_widths if self.widths else None, may_keep)
        types = [self.attention[i] if i in found.attention else kind for i, kind in enumerate(types)]
        fields: dict[str, Any] = {"window_sizes": found.window_sizes}
        fields |= {"feature_widths": found.feature_widths} if self.widths else {}
        config = self.make_config(types, **fields)
        if (size := state_bytes(config, self.dtype)) != found.state_bytes:
            raise RnnzooError(
                f"The state was planned with {found.state_bytes:,} bytes, but has {size:,}; please report "
                "this with the recipe and the teacher."
            )
        return config, self._record(config, found)

    def divide_again(self, config: RecurrentConfig, measured: Measured) -> tuple[RecurrentConfig, dict[str, Any]]:
        """The configuration of a student with other windows in as many bytes, and a record of it.

        Args:
            config: of the student; its feature widths stay. measured: errors of windows beside them.
        """
        types, before = config.layer_types, config.window_sizes
        converted = _converted(types)
        widths = mixer_class(types[converted[0]]).state_widths(config)
        fixed = {i: widths[i] for i in converted}
        every = tuple(sorted(set(fixed.values())))
        errors = Measured(measured.errors.expand(-1, -1, len(every), -1), measured.windows, every)
        same = replace(self, size=state_bytes(config, self.dtype), widths=every, context=0)
        changed, record = same.divide(types, errors, fixed)
        lost = sum(
            float(measured.errors[i, head, 0, measured.windows.index(window)])
            for i in converted
            for head, window in enumerate(before[i])
        )
        pairs = (pair for i in converted for pair in zip(before[i], changed.window_sizes[i], strict=True))
        return changed, record | {"error_before": lost, "tokens_moved": sum(abs(a - b) for a, b in pairs) // 2}

    def _record(self, config: RecurrentConfig, found: Allocation) -> dict[str, Any]:
        """What results.json and `plan` tell of an allocation."""
        kind = next((kind for kind in config.layer_types if kind not in ATTENTION_TYPES), None)
        widths = [0] * len(config.layer_types) if kind is None else mixer_class(kind).state_widths(config)
        sizes = layer_state_bytes(config, self.dtype)
        layers = [
            {"layer": i, "windows": windows, "feature_width": widths[i], "bytes": sizes[i]}
            for i, windows in enumerate(found.window_sizes)
            if windows
        ]
        record = {"state_bytes": found.state_bytes, "error": found.error, "layers": layers}
        if self.context:
            record |= {"attention": found.attention, "attention_bytes": found.attention_bytes}
        return record


def _converted(types: Sequence[str]) -> list[int]:
    return [i for i, kind in enumerate(types) if kind not in ATTENTION_TYPES]
