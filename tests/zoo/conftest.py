"""Tiny models of every registered mixer."""

from __future__ import annotations

import pytest
import torch

from rnnzoo.zoo.core.configuration import RecurrentConfig
from rnnzoo.zoo.core.heads import RecurrentForCausalLM
from rnnzoo.zoo.core.registry import known_mixers, mixer_class

# Sizes at which a mixer's machinery (windows, groups, limits) is at work within a dozen tokens. What is not named here
# takes its defaults, derived from the sizes below.
TINY: dict[str, dict] = {
    "sliding_attention": {"sliding_window": 4},
    "hedgehog": {
        "window_sizes": None,
        "window_size": 3,
        "num_sinks": 2,
        "feature_map": "prototype",
        "feature_width": 4,
    },
    "mamba2": {"ssm_state_size": 6, "ssm_num_heads": 4, "ssm_groups": 2, "ssm_conv_kernel": 3, "intermediate_size": 0},
}
# More of them, for architectures whose defaults do not do: a line each.
TINY |= {
    # Their matrices into the residual stream start at zero, which leaves the others without a gradient at first.
    **{f"rwkv{n}": {"channel_mixer": f"rwkv{n}", "norm_type": "layer", "rwkv_zero_init": False} for n in (4, 5, 6, 7)},
    "hgrn2": {"hgrn2_num_heads": 4, "hgrn2_kv_heads": 2, "hgrn2_key_dim": 3},
    "delta_net": {"delta_num_heads": 4, "delta_k_heads": 2, "delta_v_heads": 2, "delta_conv_kernel": 3}
    | {"delta_gate": True, "delta_negative_eigenvalues": True},
    "gated_delta_net": {"gdn_num_heads": 2, "gdn_key_dim": 5, "gdn_value_dim": 6, "gdn_v_heads": 4},
    "kda": {"kda_num_heads": 4, "kda_k_heads": 2, "kda_v_heads": 2, "kda_value_dim": 5, "kda_gate_bias": True},
    "mamba": {"mamba_state_size": 3, "ssm_conv_kernel": 3, "intermediate_size": 0},
}
TINY["tova"] = {"tova_states": 4}
TINY["salient"] = {"window_sizes": None, "window_size": 5, "recent_share": 0.4, "num_sinks": 1}
TINY["liger"] = {"liger_window": 3, "liger_gate_divisor": 2.0}
TINY["s4d"] = {"s4_state_size": 6, "s4d_init": "legs"}
TINY["s4"] = {"s4_state_size": 6}
TINY["lssl"] = {"s4_state_size": 5, "lssl_outputs": 2}
# A variant of a mixer is its name, a colon, and what is different. Keys and values in few bits:
TINY["hedgehog:rings"] = TINY["hedgehog"] | {"ring_bits": [8, 4]}
# Features in one layer, windows alone in the other:
TINY["hedgehog:widths"] = TINY["hedgehog"] | {"feature_widths": [0, 4], "ring_bits": [8, 4]}
TINY["salient:rings"] = TINY["salient"] | {"ring_bits": [8, 4]}
# As a student of attention, with norms of either kind:
TINY["mamba:groups"] = {"mamba_inner_size": 32, "mamba_state_size": 8, "mamba_groups": 4, "mamba_kv_groups": 2}
TINY["mamba:groups"] |= {"attention_bias": True, "qk_norm": True, "mamba_norm_eps": 1e-6}
TINY["s4:legt"] = {"s4_state_size": 8, "s4_init": "legt"}
TINY["s4d:bilinear"] = {"s4_state_size": 6, "s4d_init": "inv", "s4d_discretization": "bilinear"}
TINY["gated_delta_net.attention:partial"] = {"norm_type": "rms_offset"}
TINY["gated_delta_net.attention:partial"] |= {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}
TINY["kda.attention:latent"] = {"mla_rank": 7, "mla_shared_dim": 3, "mla_key_dim": 5, "mla_value_dim": 6}
HYBRID = ("mamba2", "full_attention", "supra", "sliding_attention")
BASED = ("based.convolution", "based", "sliding_attention")
STACKS = [(name, name) for name in (*known_mixers(), *(name for name in TINY if ":" in name))] + [HYBRID, BASED]


def tiny_config(stack: tuple[str, ...], heads: int = 4, kv_heads: int = 2, **overrides) -> RecurrentConfig:
    """A model whose layers are `stack`, head width 8."""
    fields = {"intermediate_size": 24, "sliding_window": 4}
    for name in stack:
        fields |= {k: v for k, v in TINY.get(name, {}).items() if k != "intermediate_size" or len(set(stack)) == 1}
    types = [name.split(":")[0] for name in stack]
    sizes = {"vocab_size": 61, "hidden_size": 8 * heads, "num_hidden_layers": len(stack), "layer_types": types}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    return RecurrentConfig(**(sizes | heads_of | {"initializer_range": 0.2} | fields | overrides))


def tiny_model(stack: tuple[str, ...], dtype: torch.dtype = torch.float64, seed: int = 0, **overrides):
    """A random causal language model, in eval mode."""
    torch.manual_seed(seed)
    model = RecurrentForCausalLM(tiny_config(stack, **overrides)).to(dtype).eval()
    for name, scores in model.named_buffers():
        if name.endswith("score_weight"):  # zero at first: all tokens alike
            torch.nn.init.normal_(scores)
    return model


@pytest.fixture(params=STACKS, ids=lambda stack: "+".join(dict.fromkeys(stack)))
def stack(request) -> tuple[str, ...]:
    return request.param


@pytest.fixture
def columns():
    """(model, ids) -> what its layers make use of besides the tokens: the first half of every row is a prefix."""

    def make(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        names = {column for kind in model.config.layer_types for column in mixer_class(kind).columns}
        return {name: (torch.arange(ids.shape[1]) < ids.shape[1] // 2).expand_as(ids) for name in names}

    return make


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def make_config():
    return tiny_config
