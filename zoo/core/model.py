"""The generic model without a head: embedding, blocks (norm, mixer, norm, MLP), final norm.

B batch, T tokens of the call, D hidden_size.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import weakref
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from ...kernels.errors import RnnzooError, ShapeError
from . import attention as _attention  # noqa: F401  registers the layer types of hybrids
from .cache import CACHE_NAME, RecurrentCache
from .configuration import RecurrentConfig
from .documents import (
    Layout,
    documents_from_lengths,
    documents_from_mask,
    documents_from_positions,
    lay_out,
    padding_mask,
    prefix_tokens,
)
from .keywords import check_keywords
from .layers import MLP, make_norm
from .mixer import BlockState, Context, MixerState, SelfInitialised
from .perspectives import Perspectives
from .registry import channel_mixer_class, mixer_class
from .rotary import Rotary, RotaryFrequencies

__all__ = ["RecurrentBlock", "RecurrentModel", "RecurrentPreTrainedModel", "StepRunner", "first_given"]


class RecurrentBlock(GradientCheckpointingLayer):
    """norm, mixer, residual; norm, channel mixer, residual (no second half where intermediate_size is 0)."""

    def __init__(self, config: RecurrentConfig, layer_idx: int):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = make_norm(config)
        self.mixer = mixer_class(config.layer_types[layer_idx])(config, layer_idx)
        has_mlp = config.intermediate_size > 0
        self.post_attention_layernorm = make_norm(config) if has_mlp else None
        self.has_states = has_mlp and config.channel_mixer != "mlp"
        self.mlp = None
        if has_mlp:
            self.mlp = channel_mixer_class(config.channel_mixer)(config, layer_idx) if self.has_states else MLP(config)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """The state before the first token."""
        state = self.mixer.init_state(batch, device, dtype)
        return BlockState(state, self.mlp.init_state(batch, device, dtype)) if self.has_states else state

    def forward(
        self, hidden: Tensor, state: MixerState | None, ctx: Context, carried: Tensor | None = None
    ) -> tuple[Tensor, MixerState | None, Tensor | None]:
        """The block's output, its state, and what it hands on: `carried`, if its mixer did not set `ctx.carried`.

        That goes through arguments and not through `ctx` alone, so that checkpointing finds its gradient.
        """
        ctx = dataclasses.replace(ctx, carried=carried)
        own, channel = (state.mixer, state.channel_mixer) if isinstance(state, BlockState) else (state, None)
        mixed, own = self.mixer(self.input_layernorm(hidden), own, ctx)
        if self.mlp is None:
            return hidden + mixed, own, ctx.carried
        residual = hidden if self.parallel_residual else hidden + mixed
        given = self.post_attention_layernorm(residual)
        if self.has_states:
            given, channel = self.mlp(given, channel, ctx)
            own = None if own is None else BlockState(own, channel)
        else:
            given = self.mlp(given)
        hidden = given + mixed + hidden if self.parallel_residual else residual + given
        return hidden, own, ctx.carried

    def advance(
        self, hidden: Tensor, state: MixerState, ctx: Context, carried: Tensor | None = None
    ) -> tuple[MixerState | None, Tensor | None]:
        """The state after `hidden` and what is handed on, at the cost of these alone."""
        if self.has_states:
            return self(hidden, state, ctx, carried)[1:]
        ctx = dataclasses.replace(ctx, carried=carried)
        return self.mixer(self.input_layernorm(hidden), state, ctx)[1], ctx.carried


class RecurrentPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: RecurrentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values", "cache_params"]
    _supports_sdpa = True
    # Read by generate() only to refuse assisted decoding, which our cache can do: it rolls back.
    _is_stateful = False

    def post_init(self) -> None:
        super().post_init()
        # The plans of class and configuration are for all models; of one, for the modules that it has.
        names = {re.sub(r"\d+", "*", name) for name, _ in self.named_modules()}
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if name in names}

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers passes over modules without parameters of their own, for custom code that initialises what a
        # checkpoint has filled. Ours does not, and a mixer initialises its children.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SelfInitialised):
            module.init_weights()


class StepRunner(Protocol):
    """Runs the layers and the final norm of one-token calls in place of the model's own loop."""

    def serves(self, cache: RecurrentCache | None, hidden: Tensor, ctx: Context) -> bool:
        """Whether a call is to be made by `__call__`."""
        ...

    def __call__(self, model: RecurrentModel, cache: RecurrentCache, hidden: Tensor, ctx: Context) -> Tensor:
        """The normed output for one token (B, 1, D); the cache's states are updated."""
        ...


class RecurrentModel(RecurrentPreTrainedModel):
    """The decoder without a head."""

    decoding: StepRunner | None = None  # set by `decoding.replaying` for a while

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        shared = {kind: mixer_class(kind).shared(config) for kind in dict.fromkeys(config.layer_types)}
        self.shared = nn.ModuleDict({kind: module for kind, module in shared.items() if module is not None})
        self.layers = nn.ModuleList([RecurrentBlock(config, i) for i in range(config.num_hidden_layers)])
        self._expect_rotation_where_it_is_scaled()
        self.norm = make_norm(config)
        count = getattr(config, "temporal_perspectives", 1)
        self.perspectives = Perspectives(config.hidden_size, count) if count > 1 else None
        self.rotary = RotaryFrequencies(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _expect_rotation_where_it_is_scaled(self) -> None:
        # A file's configuration and a student's, which has its teacher's settings, have named the class of their model.
        given = self.config.architectures is None and self.config.transformers_version is None
        kind = (self.config.rope_parameters or {}).get("rope_type", "default")
        if given and kind != "default" and not any(layer.mixer.rotates for layer in self.layers):
            raise RnnzooError(
                f"rope_parameters has rope_type={kind!r}, but no layer of this model rotates queries and keys "
                f"({', '.join(dict.fromkeys(self.config.layer_types))}); leave rope_parameters out."
            )

    def context(self, mask: Tensor | None, layout: Layout, prefix: Tensor | None = None) -> Context:
        """What the mixers are told about a call."""
        rotary = Rotary(self.rotary, layout.positions)
        return Context(mask, layout.seq_ids, layout.positions, rotary, self.shared, prefix)

    def make_context(
        self, batch: int, time: int, device: torch.device, mask: Tensor | None = None, seq_ids: Tensor | None = None
    ) -> Context:
        """The context of a call without a cache, for running single layers (alignment, tests)."""
        return self.context(mask, lay_out(None, mask, seq_ids, False, (batch, time), device))

    def enter(self, embedded: Tensor) -> Tensor:
        """What the first block is given of embedded tokens (B, T, D), in a model without temporal perspectives."""
        hidden = embedded if self.embedding_norm is None else self.embedding_norm(embedded)
        if self.config.embedding_scale is not None:
            hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=hidden.dtype, device=hidden.device)
        return hidden

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        cache_params: RecurrentCache | None = None,
        output_hidden_states: bool | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a call.

        Args:
            input_ids: (B, T), or inputs_embeds (B, T, D).
            attention_mask: (B, T) or (B, past + T), 0 or False for padding, which may stand anywhere. Of (B, T) also
                integers that number the documents of a row from 1.
            position_ids: (B, T); used only to find packed documents, whose positions start again at 0. The model counts
                positions itself, padding excluded.
            cache: continued, and updated in place. `past_key_values` and `cache_params` are older names for it.
            use_cache: return a cache; by default `config.use_cache`, and off in training.
            seq_ids: (B, T) integers, packed documents; `seq_idx` and, for one row, `cu_seq_lens_q` or `cu_seqlens` say
                the same. With a cache, a first id that differs from the last call's starts a new document.
            output_hidden_states: return the input of every block and the final, normed, hidden state.
            prefix_mask: (B, T) bool, tokens that all tokens of their document see whole, in layers that can (JRT); the
                document has to begin in this call.

        Raises:
            ShapeError, RnnzooError: arguments that do not fit.
        """
        check_keywords(kwargs, PARAMETERS)
        if (input_ids is None) == (inputs_embeds is None):
            raise RnnzooError("Give either input_ids or inputs_embeds.")
        hidden = self.enter(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        shape, device = (hidden.shape[0], hidden.shape[1]), hidden.device
        if shape[1] == 0:
            raise ShapeError(f"The call has shape {shape} (batch, time); expected at least one token.")
        mask = padding_mask(attention_mask, *shape)
        ids = seq_ids if seq_ids is not None else seq_idx
        ids = documents_from_mask(attention_mask, shape[1]) if ids is None else ids
        named = ids is not None
        if ids is not None and tuple(ids.shape) != shape:
            raise ShapeError(f"seq_ids has shape {tuple(ids.shape)}, expected {shape}: one document id per token.")
        lengths = cu_seqlens if cu_seqlens is not None else cu_seq_lens_q
        if ids is None and lengths is not None:
            ids = documents_from_lengths(lengths, *shape)
        if ids is None:
            ids = documents_from_positions(position_ids, mask, *shape)

        cache = self._cache(first_given(cache, past_key_values, cache_params), use_cache)
        prefix = None
        if prefix_mask is not None:
            if not any("prefix_mask" in mixer_class(kind).columns for kind in set(self.config.layer_types)):
                raise RnnzooError("No layer of this model makes use of a prefix_mask; leave it out.")
            # Before the cache takes in the call, so that it stays as it is if the prefix does not fit.
            expected = lay_out(None if cache is None else cache.progress, mask, ids, named, shape, device)
            prefix = prefix_tokens(prefix_mask, mask, expected, shape)
        if cache is None:
            layout = lay_out(None, mask, ids, named, shape, device)
        else:
            cache.begin_recording(functools.partial(_replay, weakref.ref(self)), mask, ids, named, shape, prefix)
            layout = cache.advance(mask, ids, named, shape, device)
        ctx = self.context(mask, layout, prefix)
        # What recording keeps for a rollback shares its tensors with the states.
        plain = mask is None and layout.seq_ids is None and prefix is None and shape[1] == 1
        ctx.in_place = plain and not torch.is_grad_enabled() and cache is not None and not cache.recording

        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if self.perspectives is not None:
            hidden = self.perspectives.spread(hidden)
        all_hidden, carried = [], None
        runner = self.decoding  # read once: it goes as soon as the last thread that generates is done
        replayed = runner is not None and not collect and runner.serves(cache, hidden, ctx)
        if replayed:
            hidden = runner(self, cache, hidden, ctx)
        for i, layer in enumerate([] if replayed else self.layers):
            all_hidden += [hidden] if collect else []
            if cache is None:
                hidden, _, carried = layer(hidden, None, ctx, carried)
            else:
                cache.record(hidden)
                hidden, cache.states[i], carried = layer(hidden, self._state(cache, i, hidden), ctx, carried)
        if cache is not None:
            cache.end_recording()
        hidden = hidden if replayed else self.norm(hidden)
        if self.perspectives is not None:
            hidden = self.perspectives(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, hidden_states=(*all_hidden, hidden) if collect else None, **{CACHE_NAME: cache}
        )

    def _cache(self, given: RecurrentCache | None, use_cache: bool | None) -> RecurrentCache | None:
        if given is not None:
            if not isinstance(given, RecurrentCache):
                raise RnnzooError(
                    f"The cache is a {type(given).__name__}, but recurrent models keep their state in a "
                    "RecurrentCache; leave it out, or pass rnnzoo.zoo.RecurrentCache(model.config)."
                )
            return given
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        return RecurrentCache(self.config) if use_cache else None

    def _state(self, cache: RecurrentCache, layer_idx: int, hidden: Tensor) -> MixerState:
        state = cache.states[layer_idx]
        if state is None:
            state = self.layers[layer_idx].init_state(hidden.shape[0], hidden.device, hidden.dtype)
        return state

    def replay(
        self,
        inputs: list[Tensor],
        cache: RecurrentCache,
        mask: Tensor | None,
        ids: Tensor | None,
        named: bool,
        prefix: Tensor | None = None,
    ) -> None:
        """Runs over recorded block inputs what has a state, to bring a cache from a checkpoint to a later state."""
        shape = (inputs[0].shape[0], inputs[0].shape[1])
        ctx = self.context(mask, cache.advance(mask, ids, named, shape, inputs[0].device), prefix)
        carried = None
        for i, (layer, hidden) in enumerate(zip(self.layers, inputs, strict=True)):
            cache.states[i], carried = layer.advance(hidden, self._state(cache, i, hidden), ctx, carried)


PARAMETERS = tuple(inspect.signature(RecurrentModel.forward).parameters)[1:]  # for the sake of suggestions


def _replay(model: weakref.ref[RecurrentModel], *recorded) -> None:
    """`RecurrentModel.replay` for a cache, which must not keep the model alive."""
    found = model()
    if found is None:
        raise RnnzooError("The model that filled this cache is gone, so crop cannot run its layers again.")
    found.replay(*recorded)


def first_given(*caches: RecurrentCache | None) -> RecurrentCache | None:
    """The first that is not None; a cache has several names among a model's arguments."""
    return next((cache for cache in caches if cache is not None), None)
