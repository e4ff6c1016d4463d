"""Configuration of every model of the zoo."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import configuration_utils
from transformers.configuration_utils import PreTrainedConfig

from .registry import CONFIGS, config_class, has_mixer, known_mixers
from .transformers_changes import allow_layer_types

__all__ = ["RecurrentConfig"]

allow_layer_types(configuration_utils)  # also where the Auto classes are left alone


@strict
class RecurrentConfig(PreTrainedConfig):
    """Fields that all architectures share; the names are Llama's where Llama has them.

    `vocab_size`, `hidden_size` and `num_hidden_layers` suffice: what is left None is derived. `layer_types` names the
    mixer of every layer, so every architecture is also a hybrid, and a mixer's own fields may stand in the
    configuration of any other architecture. A field that several architectures have (`ssm_*`, `rwkv_*`, `s4_*`, ...)
    has one value for all of them.

    Args:
        intermediate_size: width of the MLP; 0 for blocks without one; None for 8/3 of `hidden_size`.
        num_attention_heads: None for heads of about 64 channels.
        num_key_value_heads: None for `num_attention_heads`.
        head_dim: None for `hidden_size // num_attention_heads`, made even.
        norm_type: "rms", "rms_offset" (Gemma's, 1 + weight), or "layer" (LayerNorm with bias).
        rms_norm_eps: epsilon of either.
        channel_mixer: second half of every block: "mlp", or the name of an architecture that has one of its own.
        embedding_norm: norm the embeddings. embedding_scale: factor on them.
        logit_cap: c in c * tanh(logits / c); None: no bound.
        mlp_type: "gated" (down(act(gate(x)) * up(x))) or "plain" (down(act(up(x)))).
        attention_bias: biases on q, k, v. attention_output_bias: on o. mlp_bias: on every matrix of the MLP.
        qk_norm: RMSNorm over each head of q and k.
        parallel_residual: x + mixer(norm(x)) + mlp(norm'(x)), as GPT-NeoX.
        rope_parameters: as in transformers, `partial_rotary_factor` included.
        layer_types: the mixer of every layer, by name; None for the architecture's own in all of them.
        sliding_window: tokens that a "sliding_attention" layer sees, the current one included.
        fused_loss: in training, compute the loss chunk by chunk and return no logits.
    """

    model_type = "rnnzoo"
    mixer: ClassVar[str] = "full_attention"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {}  # configurations of the paper, by name, as keyword arguments
    base_model_tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    norm_type: str = "rms"
    channel_mixer: str = "mlp"
    embedding_norm: bool = False
    embedding_scale: float | None = None
    logit_cap: float | None = None
    mlp_type: str = "gated"
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    rope_parameters: dict | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    fused_loss: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    # TRL computes losses from hidden states and head itself, and looks for the bound of the logits under this name.
    attribute_map = {"final_logit_softcapping": "logit_cap"}

    def __init_subclass__(cls, *args: Any, **kwargs: Any):
        super().__init_subclass__(*args, **kwargs)
        _resolve_types(cls)
        if "mixer" in cls.__dict__:
            CONFIGS[cls.mixer] = cls

    def __post_init__(self, **kwargs: Any):
        if self.num_attention_heads is None:
            self.num_attention_heads = _derived_heads(self.hidden_size, self.head_dim)
        if self.head_dim is None:
            # Rotation needs pairs of channels; heads need not fill hidden_size.
            self.head_dim = max(2, (self.hidden_size // self.num_attention_heads + 1) // 2 * 2)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 32)) * 32
        if self.layer_types is None:
            self.layer_types = [self.mixer] * self.num_hidden_layers
        # Copied: transformers fills the dictionary in place, and the caller may share it with a teacher's config.
        self.rope_parameters = dict(self.rope_parameters) if self.rope_parameters else None
        kwargs = self._adopt_fields(kwargs)
        layer_types = self.layer_types
        super().__post_init__(**kwargs)
        self.layer_types = layer_types  # transformers has renamed "mamba" to "linear_attention"

    def _adopt_fields(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Gives this configuration the fields of the other architectures that it names, then derives."""
        known = {f.name for f in fields(self)}
        for name in dict.fromkeys([self.mixer, *self.layer_types, self.channel_mixer]):
            cls = config_class(name)
            if cls is None:
                continue
            for field in fields(cls):
                if field.name not in known:
                    known.add(field.name)  # architectures that share a field declare the same default
                    default = field.default if field.default is not MISSING else field.default_factory()
                    setattr(self, field.name, kwargs.pop(field.name, default))
            cls.derive(self)
        return kwargs

    @staticmethod
    def derive(config: RecurrentConfig) -> None:
        """Fills those fields of an architecture that are None. `config` may be another architecture's (a hybrid)."""

    @staticmethod
    def student_fields(num_heads: int, num_kv_heads: int, head_dim: int) -> dict:
        """Fields of this architecture that a layer needs to be started from an attention layer of these sizes."""
        return {}

    def validate_layer_type(self) -> None:
        """Raises ValueError for unknown layer types and for a list of the wrong length."""
        unknown = sorted(name for name in set(self.layer_types) if not has_mixer(name))
        if unknown:
            raise ValueError(f"layer_types names {unknown}; known are {', '.join(known_mixers())}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, but num_hidden_layers is {self.num_hidden_layers}."
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError("A 'sliding_attention' layer needs sliding_window, the number of tokens that it sees.")

    def validate_architecture(self) -> None:
        """Raises ValueError for sizes that do not fit together and for unknown choices."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        for field, allowed in (("norm_type", ("rms", "rms_offset", "layer")), ("mlp_type", ("gated", "plain"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, got {getattr(self, field)!r}.")


def _resolve_types(cls: type) -> None:
    """Turns postponed annotations of the fields into types; @strict checks values against types, not against text."""
    own = inspect.get_annotations(cls, eval_str=True)
    for field in fields(cls):
        field.type = own.get(field.name, field.type)


_resolve_types(RecurrentConfig)


def check_exact_tokens(config: RecurrentConfig) -> None:
    """Of layers that keep a number of tokens exactly: their `window_sizes` and `ring_bits`.

    Raises:
        ValueError: a number for every layer is missing, is below 1, or the bits are none that there are.
    """
    if (bits := config.ring_bits) is not None and (len(bits) != 2 or not set(bits) <= {4, 8} or config.head_dim % 2):
        raise ValueError(
            "ring_bits must be two numbers of 4 or 8, of keys and of values, and head_dim even; got "
            f"ring_bits={bits}, head_dim={config.head_dim}."
        )
    check_of_every_layer(config, "window_sizes")


def check_of_every_layer(config: RecurrentConfig, name: str) -> None:
    """Raises a ValueError where a field that has an entry for every layer has another number of them."""
    per_layer = getattr(config, name)
    if per_layer is not None and len(per_layer) != config.num_hidden_layers:
        raise ValueError(f"{name} has {len(per_layer)} entries, but num_hidden_layers is {config.num_hidden_layers}.")


def _derived_heads(hidden_size: int, head_dim: int | None) -> int:
    """Head count for heads of `head_dim`, or of about 64 channels."""
    if head_dim is not None:
        return max(1, hidden_size // head_dim)
    wanted = max(1, hidden_size // 64)
    return next((h for h in range(wanted, 0, -1) if hidden_size % (2 * h) == 0), 1)
