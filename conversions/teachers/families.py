"""Teacher families: where each Hugging Face decoder keeps its attention, norms and MLP, told in one vocabulary.

A `Family` says how a teacher's config becomes a student's, and under which of the student's names each tensor goes.
Llama, Mistral, Qwen2 and Qwen3 share tensor names and differ in biases and norms; GPT-NeoX fuses q, k, v per head,
turns only part of each head, adds attention and MLP to the same residual and has biases everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from ...zoo.core.mixer import AttentionWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "Family", "family_of"]


class Family:
    """Llama-like decoders: the names that most families share. Others override what differs.

    Attributes:
        model_type: transformers' name of the architecture.
        config_name, model_name: classes of transformers.
        qk_norm: q and k pass through an RMS norm over head_dim before the rotation.
        attention_name: of a block's attention.
        renames: (teacher's part of a tensor's name, the student's).
    """

    model_type: str
    config_name: str
    model_name: str
    qk_norm = False
    attention_name = "self_attn"
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        import transformers

        return getattr(transformers, self.config_name)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        import transformers

        return getattr(transformers, self.model_name)

    def biases(self, config: PreTrainedConfig) -> tuple[bool, bool, bool]:
        """Whether q/k/v, o and the MLP have biases."""
        attention = bool(getattr(config, "attention_bias", False))
        return attention, attention, bool(getattr(config, "mlp_bias", False))

    def student_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Keyword arguments for a `RecurrentConfig` of the teacher's shape; `layer_types` is the caller's choice.

        Args:
            config: the teacher's. rope_parameters are copied whole: base, scaling, partial rotation.
        """
        qkv_bias, output_bias, mlp_bias = self.biases(config)
        return dict(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=self.head_dim(config),
            hidden_act=config.hidden_act,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=self.norm_eps(config),
            norm_type="rms",
            mlp_type="gated",
            attention_bias=qkv_bias,
            attention_output_bias=output_bias,
            mlp_bias=mlp_bias,
            qk_norm=self.qk_norm,
            parallel_residual=False,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            rope_parameters=dict(config.rope_parameters or {}),
            sliding_window=getattr(config, "sliding_window", None),
            initializer_range=config.initializer_range,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )

    def head_dim(self, config: PreTrainedConfig) -> int:
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def norm_eps(self, config: PreTrainedConfig) -> float:
        return config.rms_norm_eps

    def attention_types(self, config: PreTrainedConfig) -> list[str]:
        """The teacher's own layer types, "full_attention" or "sliding_attention": what a kept layer must be."""
        if types := getattr(config, "layer_types", None):
            return list(types)
        windowed = getattr(config, "sliding_window", None) is not None
        return ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers

    def layers(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder blocks, first to last."""
        return list(model.base_model.layers)

    def attention_module(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """The attention of a block: called with hidden states, returns (output (B, T, D), weights)."""
        return getattr(self.layers(model)[layer], self.attention_name)

    def attention_weights(self, model: PreTrainedModel, layer: int) -> AttentionWeights:
        """The tensors of one attention layer, detached, in the teacher's dtype."""
        attention = self.attention_module(model, layer)
        parts: dict[str, Tensor | None] = {}
        for name in "qkvo":
            projection = getattr(attention, f"{name}_proj")
            parts[name] = projection.weight.detach()
            parts[f"{name}_bias"] = None if projection.bias is None else projection.bias.detach()
        for name in ("q_norm", "k_norm"):
            parts[name] = getattr(attention, name).weight.detach() if self.qk_norm else None
        return AttentionWeights(**parts, **self._head_counts(model.config))

    def shared_tensors(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Student name -> teacher tensor, for everything that is not a mixer. A tied lm_head is left out."""
        shared = {}
        for name, tensor in model.state_dict().items():
            tied_head = name == "lm_head.weight" and model.config.tie_word_embeddings
            if f".{self.attention_name}." in name or tied_head:
                continue
            for old, new in self.renames:
                name = name.replace(old, new)
            shared[name] = tensor
        return shared

    def _head_counts(self, config: PreTrainedConfig) -> dict[str, int]:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return dict(num_heads=heads, num_kv_heads=kv_heads, head_dim=self.head_dim(config))


class Llama(Family):
    model_type, config_name, model_name = "llama", "LlamaConfig", "LlamaForCausalLM"


class Mistral(Family):
    model_type, config_name, model_name = "mistral", "MistralConfig", "MistralForCausalLM"

    def biases(self, config: PreTrainedConfig) -> tuple[bool, bool, bool]:
        return False, False, False


class Qwen2(Family):
    model_type, config_name, model_name = "qwen2", "Qwen2Config", "Qwen2ForCausalLM"

    def biases(self, config: PreTrainedConfig) -> tuple[bool, bool, bool]:
        return True, False, False


class Qwen3(Family):
    model_type, config_name, model_name = "qwen3", "Qwen3Config", "Qwen3ForCausalLM"
    qk_norm = True

    def biases(self, config: PreTrainedConfig) -> tuple[bool, bool, bool]:
        attention = bool(config.attention_bias)
        return attention, attention, False


class GPTNeoX(Family):
    """GPT-NeoX and Pythia (Black et al. 2022): query_key_value rows are [q | k | v] of head 0, then of head 1, ..."""

    model_type, config_name, model_name = "gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM"
    attention_name = "attention"
    renames = (
        ("gpt_neox.embed_in.", "model.embed_tokens."),
        ("gpt_neox.final_layer_norm.", "model.norm."),
        ("gpt_neox.layers.", "model.layers."),
        (".mlp.dense_h_to_4h.", ".mlp.up_proj."),
        (".mlp.dense_4h_to_h.", ".mlp.down_proj."),
    )

    def biases(self, config: PreTrainedConfig) -> tuple[bool, bool, bool]:
        attention = bool(config.attention_bias)
        return attention, attention, True

    def student_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        parallel = bool(config.use_parallel_residual)
        return super().student_config(config) | dict(norm_type="layer", mlp_type="plain", parallel_residual=parallel)

    def norm_eps(self, config: PreTrainedConfig) -> float:
        return config.layer_norm_eps

    def attention_weights(self, model: PreTrainedModel, layer: int) -> AttentionWeights:
        attention = self.attention_module(model, layer)
        counts = self._head_counts(model.config)
        parts: dict[str, Tensor | None] = {"q_norm": None, "k_norm": None, "o": attention.dense.weight.detach()}
        parts.update(split_heads(attention.query_key_value.weight.detach(), counts["num_heads"], ""))
        bias = attention.query_key_value.bias
        if bias is None:
            parts.update(q_bias=None, k_bias=None, v_bias=None, o_bias=None)
        else:
            parts.update(split_heads(bias.detach(), counts["num_heads"], "_bias"))
            parts["o_bias"] = attention.dense.bias.detach()
        return AttentionWeights(**parts, **counts)


def split_heads(fused: Tensor, heads: int, suffix: str) -> dict[str, Tensor]:
    """(heads * 3 * head_dim, ...) rows [q | k | v] per head -> q, k, v of (heads * head_dim, ...), names + suffix."""
    parts = fused.unflatten(0, (heads, 3, -1))
    return {f"{name}{suffix}": parts[:, i].flatten(0, 1).contiguous() for i, name in enumerate("qkv")}


FAMILIES: dict[str, Family] = {f.model_type: f for f in (Llama(), Mistral(), Qwen2(), Qwen3(), GPTNeoX())}


def family_of(raw_config: dict[str, Any], source: str) -> Family:
    """The adapter for a raw config.json.

    Raises:
        RnnzooError: an encoder, an encoder-decoder, one of our own students, a quantised or an unknown architecture.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    model_type = raw_config.get("model_type")
    if not isinstance(model_type, str):
        raise RnnzooError(f"{source}: config.json has no model_type, so it is not a transformers model.")
    if family := FAMILIES.get(model_type):
        if method := (raw_config.get("quantization_config") or {}).get("quant_method"):
            raise RnnzooError(
                f"{source} is quantised with {method}, and its weights cannot be converted; "
                "bring the unquantised model or a GGUF file."
            )
        return family
    known = f"a causal decoder of one of the families {', '.join(FAMILIES)}"
    if model_type.startswith("rnnzoo-"):
        raise RnnzooError(f"{source} is already recurrent ({model_type}); a teacher must be {known}.")
    if raw_config.get("is_encoder_decoder") or model_type in ("t5", "bart", "mt5", "pegasus", "marian", "whisper"):
        raise RnnzooError(f"{source} is an encoder-decoder model ({model_type}); a teacher must be {known}.")
    if model_type in MASKED:
        raise RnnzooError(f"{source} is an encoder-only model ({model_type}); a teacher must be {known}.")
    raise RnnzooError(f"{source} has the unsupported architecture {model_type!r}; a teacher must be {known}.")


def count_parameters(family: Family, config: PreTrainedConfig) -> int:
    """Parameters of a teacher of this config, tied ones once, without allocating them."""
    with torch.device("meta"):
        return family.model_class(config).num_parameters()
