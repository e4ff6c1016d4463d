"""The two feature maps of a Hedgehog layer, whose equations are at the head of `modeling_hedgehog.py`.

What a conversion asks of them is here too: a start in closed form (`fitting_hedgehog.py`), and what a linear state of
some width would sum beside a window of some length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..core.configuration import RecurrentConfig
from ..core.mixer import Context, Mixer
from .configuration_hedgehog import HedgehogConfig
from .fitting_hedgehog import fit_head

# exp of it is the largest feature: keeps a sum over a million tokens inside float32.
LARGEST_LOGIT = 20.0


class FeatureMaps(Mixer):
    """phi of queries and of keys, the decay of what left the window, and the window's factor.

    B batch, T time, H query heads, Hk kv heads, d head_dim, F feature width.
    """

    def __init__(self, config: HedgehogConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.linear_off = False  # as if there were no features
        self.features = config.feature_widths[layer_idx] if config.feature_widths else config.feature_width
        self.prototypes = config.feature_map == "prototype"
        columns = self.features if self.prototypes else self.features // 2
        self.query_map = nn.Parameter(torch.empty(heads, width, columns))
        self.key_map = nn.Parameter(torch.empty(kv_heads, width, columns))
        self.log_decay = nn.Parameter(torch.empty(kv_heads))
        if self.prototypes:
            self.query_bias = nn.Parameter(torch.empty(heads, columns))
            self.log_scale = nn.Parameter(torch.empty(heads))
        else:
            self.log_factor = nn.Parameter(torch.empty(heads))

    def init_weights(self) -> None:
        if self.prototypes:
            # Small prototypes: the linear part starts as an average of what left the window.
            init.normal_(self.query_map, std=self.config.head_dim**-0.5)
            init.normal_(self.key_map, std=self.config.head_dim**-1.0)
            init.zeros_(self.query_bias)
            init.zeros_(self.log_scale)
        else:
            columns = self.query_map.shape[-1]
            identity = torch.eye(self.config.head_dim, columns)
            init.copy_(self.query_map, identity.expand_as(self.query_map))
            init.copy_(self.key_map, identity.expand_as(self.key_map))
            init.constant_(self.log_factor, math.log(self.config.window_factor))
        init.constant_(self.log_decay, self.config.initial_log_decay)

    @classmethod
    def state_widths(cls, config: RecurrentConfig) -> list[int]:
        return config.feature_widths or [config.feature_width] * config.num_hidden_layers

    @classmethod
    def fixed_widths_because(cls, options: Mapping[str, Any]) -> str | None:
        kind = options.get("feature_map", HedgehogConfig.feature_map)
        return None if kind == "prototype" else f"feature_map is {kind!r}; student_options must say `prototype`"

    @classmethod
    def sized(cls, config: RecurrentConfig, window: int, sinks: int, features: int) -> FeatureMaps:
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        fields = {"window_size": window, "num_sinks": sinks, "feature_map": "prototype", "feature_width": features}
        config = HedgehogConfig(num_hidden_layers=1, **{name: getattr(config, name) for name in names}, **fields)
        with torch.device("meta"):
            mixer = cls(config, 0)
        for name, parameter in list(mixer.named_parameters(recurse=False)):
            setattr(mixer, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
        return mixer

    @torch.no_grad()
    def fit_features(self, q: Tensor, k: Tensor, ctx: Context, rows: Tensor, seed: int) -> None:
        if not self.prototypes or not self.features:
            return
        turned_q, turned_k = (ctx.rotary.rotate(x[None], ctx.positions)[0] for x in (q, k))
        rotation = ctx.rotary.frequencies.get(ctx.positions)
        groups = q.shape[1] // k.shape[1]
        for head in range(k.shape[1]):
            queries = slice(head * groups, (head + 1) * groups)
            far = rows[rows >= self.lengths[head] + self.sinks]
            if len(far):
                fit_head(self, head, queries, (q, k, turned_q, turned_k), far, rotation, seed)

    def linear_weights(self, head: int, q: Tensor, k: Tensor, delay: Tensor) -> Tensor:
        groups = q.shape[1] // len(self.lengths)
        features_q = self._query_features(q[None])[0][:, head * groups : (head + 1) * groups].float()
        features_k = self._key_features_of(head, k).float()
        decay = torch.where(delay == -torch.inf, 0.0, (self.log_decay[head].clamp(max=0) * delay).exp())
        return torch.einsum("nhf,tf->hnt", features_q, features_k) * decay

    def _query_features(self, q: Tensor) -> Tensor:
        """(B, T, H, d) -> (B, T, H, F)."""
        logits = _accurate(torch.einsum("bthd,hdf->bthf", q, self.query_map.to(q.dtype)))
        if self.prototypes:
            features = (logits + self.query_bias).softmax(-1) * self.log_scale.exp()[:, None]
        else:
            features = self._features_of(logits)
        return features * 0 if self.linear_off else features

    def _key_features(self, k: Tensor) -> Tensor:
        """(B, T, Hk, d) -> (B, T, Hk, F)."""
        return torch.stack([self._key_features_of(head, k[:, :, head]) for head in range(k.shape[2])], 2)

    def _key_features_of(self, head: int, k: Tensor) -> Tensor:
        """Keys (B, n, d) of one kv head -> (B, n, F)."""
        return self._features_of(k @ self.key_map[head].to(k.dtype))

    def _features_of(self, logits: Tensor) -> Tensor:
        """Of keys times the key map."""
        logits = _accurate(logits)
        if not self.prototypes:
            return torch.cat([logits.softmax(-1), (-logits).softmax(-1)], -1)
        return logits.clamp(max=LARGEST_LOGIT).exp()


def _accurate(x: Tensor) -> Tensor:
    """At least float32: exponentials of it are features."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
