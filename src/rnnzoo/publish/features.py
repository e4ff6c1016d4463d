"""What of the zoo a configuration does not use, and its code can therefore do without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig

from .folding import Facts

if TYPE_CHECKING:
    from ..zoo.core.configuration import RecurrentConfig

__all__ = ["Features", "complete", "known_features", "unused_features"]

STATEFUL = """\
    # generate() refuses assisted decoding, which needs a cache that rolls back: rnnzoo has one.
    _is_stateful = True
"""
# Rollback, which assisted decoding needs, keeps the inputs of every layer and runs them again; replayed decoding needs
# tapes. Both are rnnzoo's.
RECORDING = frozenset({"begin_recording", "record", "end_recording"})
CROPPING = frozenset({"activate_past_recording", "crop", "_expect_whole_prefixes", "_replay"})
ROLLBACK = {
    "zoo.core.cache": Facts(
        values={"self._checkpoint": None, "self._calls": (), "self.recording": False},
        members=frozenset(f"RecurrentCache.{name}" for name in RECORDING | CROPPING),
        targets=frozenset(
            {"self.recording", "self._checkpoint", "self._calls", "self._run_again", "self._checkpoint, self._calls"}
        ),
    ),
    "zoo.core.model": Facts(
        values={"cache.recording": False, "replayed": False},
        members=frozenset({"RecurrentModel.replay", "RecurrentModel.decoding", "RecurrentBlock.advance"}),
        targets=frozenset({"replayed"}),
        rewritten={"RecurrentPreTrainedModel._is_stateful": STATEFUL},
        calls=RECORDING,
    ),
    "zoo.core.generation": Facts(
        values={"generation_config.is_assistant": False}, members=frozenset({"RecurrentGenerationMixin.generate"})
    ),
}
LINEAR = tuple("kernels.gated_linear_attention" + part for part in ("", ".chunked", ".linear_part"))
WINDOW = {"kernels.gated_linear_attention": Facts(values={"window": None})}
WINDOW["kernels.gated_linear_attention.chunked"] = WINDOW["kernels.gated_linear_attention"]
BONUS = {module: Facts(values={"bonus": None}) for module in ("zoo.core.recurrences", *LINEAR)}
NORMALIZE = {module: Facts(values={"normalize": False}) for module in BONUS}
NORMALIZE["zoo.core.linear"] = Facts(
    {"normalize": False, "self.normalize": False}, targets=frozenset({"self.normalize"})
)
ROTARY = {
    "zoo.core.model": Facts(values={"rotary": None}, targets=frozenset({"rotary", "self.rotary"})),
    "zoo.core.mixer": Facts(rewritten={"Context.rotary": "    rotary: None\n"}),
}
PLAIN_ROTARY = {
    "zoo.core.rotary": Facts(
        values={"rope_type in LENGTH_DEPENDENT": False, "rope_type == 'default'": True},
        targets=frozenset({"rope_type"}),
    )
}
PREFIX = {
    "zoo.core.model": Facts(values={"prefix_mask": None, "prefix": None}, targets=frozenset({"prefix"})),
    "zoo.core.heads": Facts(values={"prefix_mask": None}),
    "zoo.core.generation": Facts(members=frozenset({"RecurrentGenerationMixin.prepare_inputs_for_generation"})),
    "zoo.core.mixer": Facts(members=frozenset({"Mixer.columns", "MixerState.reorder"})),
}


# config.json holds what a configuration derives, and has been checked. (layer_types: transformers makes defaults, too.)
DERIVED = ("num_attention_heads", "head_dim", "num_key_value_heads", "intermediate_size")


def complete(config: RecurrentConfig) -> dict[str, Facts]:
    """That config.json gives every size, so that nothing is to be derived or checked; and no views of the state."""
    from ..zoo.core.registry import CONFIGS

    core = Facts(
        values={f"self.{name} is None": False for name in DERIVED},
        members=frozenset({"RecurrentConfig.derive", "RecurrentConfig.validate_architecture"}),
        calls=frozenset({"derive"}),
    )
    views = frozenset(f"RecurrentCache.{name}" for name in ("__repr__", "detach", "seen"))
    known = {"zoo.core.configuration": core, "zoo.core.cache": Facts(members=views)}
    known["zoo.core.layers"] = Facts(members=frozenset({"RMSNorm.extra_repr"}))
    for cls in CONFIGS.values():
        own = frozenset(f"{cls.__name__}.{name}" for name in ("derive", "validate_architecture"))
        known[cls.__module__.partition(".")[2]] = Facts(members=own)
    return known


# Fields that a user may change after loading.
FREE = {"use_cache", "fused_loss", "tie_word_embeddings", "hidden_act", "pad_token_id", "bos_token_id", "eos_token_id"}


@dataclass(frozen=True)
class Features:
    """What is known of every module under a configuration.

    Args:
        fields: names of fields and what they are. modules: more that is known of single modules.
    """

    fields: Mapping[str, Any]
    modules: Mapping[str, Facts]

    def of(self, module: str) -> Facts:
        facts = self.modules.get(module, Facts())
        if not module.startswith("zoo.") or "configuration" in module:
            return facts
        values = {f"{owner}.{name}": value for name, value in self.fields.items() for owner in OWNERS}
        return Facts(values) | facts

    def without(self, modules: Mapping[str, Facts]) -> Features:
        """The same with more known."""
        known = dict(self.modules)
        for module, facts in modules.items():
            known[module] = known.get(module, Facts()) | facts
        return Features(self.fields, known)


OWNERS = ("config", "self.config")


def known_features(config: RecurrentConfig) -> Features:
    """What a configuration does not use, as far as it says so itself."""
    from ..zoo.core.configuration import RecurrentConfig
    from ..zoo.core.registry import config_class

    classes = [RecurrentConfig, *map(config_class, [*_kinds(config), config.channel_mixer, config.mixer])]
    names = {field.name for cls in classes if cls is not None for field in fields(cls)} - FREE
    names -= {field.name for field in fields(PreTrainedConfig)} - {"channel_mixer"}
    values = {name: getattr(config, name) for name in sorted(names)}
    choices = {name: value for name, value in values.items() if value is None or isinstance(value, (bool, str))}
    features = Features(choices, {}).without(ROLLBACK)
    if config.rope_parameters is None or config.rope_parameters.get("rope_type", "default") == "default":
        features = features.without(PLAIN_ROTARY)
    features = features.without({"zoo.core.model": _block(config), "zoo.core.layers": _norm(config)})
    if "hedgehog" in _kinds(config):
        hedgehog = _hedgehog(config)
        own = {f"zoo.hedgehog.{file}_hedgehog": hedgehog for file in ("modeling", "features")}
        return features.without(own)
    return features if "liger" in _kinds(config) else features.without(WINDOW)


def _kinds(config: RecurrentConfig) -> list[str]:
    return list(dict.fromkeys(config.layer_types or []))


def unused_features(code: str) -> dict[str, Facts]:
    """What code of mixers makes no use of."""
    modules: dict[str, Facts] = {}
    for words, facts in UNUSED:
        if not any(word in code for word in words):
            for module, more in facts.items():
                modules[module] = modules.get(module, Facts()) | more
    return modules


UNUSED = (
    (("prefix_mask", "ctx.prefix"), PREFIX),
    (("bonus=", "Window("), BONUS),
    (("normalize=True",), NORMALIZE),
    (("ctx.rotary",), ROTARY),
    ((".unrotate(",), {"zoo.core.rotary": Facts(members=frozenset({"Rotary.unrotate"}))}),
)


def _block(config: RecurrentConfig) -> Facts:
    """Options of a block and of the model around it."""
    facts = Facts(
        values={"self.parallel_residual": config.parallel_residual}, targets=frozenset({"self.parallel_residual"})
    )
    if config.channel_mixer == "mlp" or config.intermediate_size == 0:
        values = {"self.has_states": False, "isinstance(state, BlockState)": False}
        facts |= Facts(values=values, targets=frozenset({"self.has_states"}))
    if config.intermediate_size == 0:
        facts |= Facts(values={"has_mlp": False, "self.mlp": None}, targets=frozenset({"has_mlp"}))
        facts |= Facts(targets=frozenset({"self.post_attention_layernorm", "self.mlp"}))
    if getattr(config, "temporal_perspectives", 1) == 1:
        facts |= Facts(values={"self.perspectives": None}, targets=frozenset({"self.perspectives", "count"}))
    if not config.embedding_norm:
        facts |= Facts(values={"self.embedding_norm": None}, targets=frozenset({"self.embedding_norm"}))
    return facts


def _norm(config: RecurrentConfig) -> Facts:
    name = {"rms": "RMSNorm", "rms_offset": "OffsetRMSNorm", "layer": "nn.LayerNorm"}[config.norm_type]
    return Facts(rewritten={".NORMS": f'NORMS = {{"{config.norm_type}": {name}}}\n'})


def _hedgehog(config: RecurrentConfig) -> Facts:
    """A map of features, and rings that are plain or in few bits."""
    prototypes = config.feature_map == "prototype"
    facts = Facts(values={"self.prototypes": prototypes}, targets=frozenset({"self.prototypes"}))
    if config.ring_bits is None:
        return facts | Facts(values={"self.bits": None}, targets=frozenset({"self.bits"}))
    packed = {"self.bits is None": False, "self.bits is not None": True, "isinstance(after, HedgehogState)": False}
    return facts | Facts(values={**packed, "isinstance(ring, Tensor)": False})
