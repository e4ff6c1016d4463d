"""The contract of a mixer: `forward(hidden, state, ctx) -> (hidden, state)`, and what it is given.

B batch, T time, D hidden_size, H query heads, Hk key/value heads, d head_dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.errors import RnnzooError
from .configuration import RecurrentConfig
from .rotary import Rotary

__all__ = ["AttentionWeights", "BlockState", "Context", "Mixer", "MixerState", "SelfInitialised", "shared_decay"]


@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """A teacher's attention layer. Matrices in nn.Linear's layout, (out, in); heads contiguous, not interleaved."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def repeated(self) -> AttentionWeights:
        """The same layer with as many key/value heads as query heads, each repeated for the queries of its group."""
        groups = self.num_heads // self.num_kv_heads
        if groups == 1:
            return self
        wider: dict[str, Any] = {"num_kv_heads": self.num_heads}
        for name in ("k", "v", "k_bias", "v_bias"):
            x = getattr(self, name)
            if x is not None:
                wider[name] = x.unflatten(0, (-1, self.head_dim)).repeat_interleave(groups, 0).flatten(0, 1)
        return dataclasses.replace(self, **wider)


@dataclasses.dataclass
class Context:
    """What a mixer knows about the tokens of a call, besides their hidden states.

    Attributes:
        mask: (B, T) bool, False = not a token: leave the state alone. None: all are tokens.
        seq_ids: (B, T) integers; a new document starts where the id differs from the step before. None: one document.
        positions: (B, T) or (1, T) int64, tokens of the same document before this one, over the whole cache.
        rotary: rotates by positions.
        shared: layer type -> the module that all layers of this type share (`Mixer.shared`).
        prefix: (B, T) bool, tokens of a prefix that every token of its document sees whole, in mixers that can (JRT);
            the document begins in this call. None: no prefix.
        in_place: one token a row, no gradients, and nobody else needs the state: a mixer may change it in place.
        memo: scratch for one call of the model, for values without gradients that layers of one kind share (attention
            masks).
        outside: calls a function of tensors, whose result has one shape at every token, that cannot be replayed
            (`decoding.py`): in place, and with tensors that grow or values that decide.
        carried: what an earlier layer left here for the later ones (RWKV-7's first values), gradients included; None in
            the first layer and in one that runs alone. A mixer may set it; the block takes and returns it.
    """

    mask: Tensor | None
    seq_ids: Tensor | None
    positions: Tensor
    rotary: Rotary
    shared: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict, repr=False)
    prefix: Tensor | None = None
    in_place: bool = False
    outside: Callable[..., Tensor] = dataclasses.field(
        default=lambda function, *tensors: function(*tensors), repr=False
    )
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    carried: Tensor | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass
class MixerState:
    """Base of the states: dataclasses of tensors, batch first, whose all-zero value means 'nothing seen yet'.

    Fields may also be None, other states, or dataclasses of the kernels (tensors inside are found).
    """

    def map(self, fn: Callable[[Tensor], Tensor]) -> MixerState:
        """A copy with `fn` applied to every tensor."""
        return _map(self, fn)

    def tensors(self) -> list[Tensor]:
        """Every tensor inside."""
        found: list[Tensor] = []
        _map(self, lambda tensor: found.append(tensor) or tensor)
        return found

    def reorder(self, beam_idx: Tensor) -> MixerState:
        """Rows `beam_idx` (int64, any number of them) of the batch."""
        return self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def reset_rows(self, rows: Tensor) -> MixerState:
        """The state with the batch rows where `rows` (B,) is True as if nothing had been seen."""
        return self.map(
            lambda tensor: tensor.masked_fill(rows.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0)
        )

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


@dataclasses.dataclass
class BlockState(MixerState):
    """The state of a block whose channel mixer has one too."""

    mixer: MixerState
    channel_mixer: MixerState

    def reset_rows(self, rows: Tensor) -> BlockState:
        return BlockState(self.mixer.reset_rows(rows), self.channel_mixer.reset_rows(rows))


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _map(getattr(value, f.name), fn) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changed)
    return value


class SelfInitialised(nn.Module):
    """A module with parameters of its own to initialise."""

    def init_weights(self) -> None:
        """Fresh values for parameters that are not plain linear or norm layers.

        Runs after the core has initialised these. Must use `transformers.initialization`, which leaves alone what a
        checkpoint has just filled.
        """


class Mixer(SelfInitialised):
    """Mixes tokens along time. Knows nothing of caches, generation and padding beyond its `Context`.

    A channel mixer with a state is of the same kind (`register_channel_mixer`).

    Attributes:
        layer_type: its name in `config.layer_types`.
        kernel: folder of kernels/ whose recurrence it runs. paper: authors, year and arXiv number or venue.
        columns: arguments of the model, (B, T) bool, that it makes use of besides the tokens ("prefix_mask").
        complexity: of a forward pass in the number of tokens T, of the layer's memory while decoding after a slash.
        branches: the parts whose sum the output is, where there are several, such as ("window", "linear").
        rotates: whether it turns queries and keys by their positions (`ctx.rotary`).
        decay_parameters: names, or how they begin, of parameters that decide how fast the state forgets and nothing
            else of weight.
        divides_budget: whether a state budget can be divided among its layers and heads. Then its configuration has
            `window_sizes`, for every layer those of its kv heads ([] in layers of other types), `num_sinks` and, if the
            width of a linear state can be chosen too (`fixed_widths_because`), `feature_widths`, one for every layer.
        keeps_by_score: whether a score of each token decides what it keeps (`set_scores`, `recent_tokens`).
        lengths: tokens that every kv head keeps exactly, the current one included, be they the last ones (a window) or
            some of them chosen by a score; () without such tokens.
        sinks: first tokens of a document that stay exact. features: width of the linear state of a kv head.
    """

    layer_type: str = ""
    kernel: str = ""
    paper: str = ""
    columns: tuple[str, ...] = ()
    complexity: str = "T / 1"
    branches: tuple[str, ...] = ()
    rotates: bool = False
    decay_parameters: tuple[str, ...] = ()
    divides_budget: bool = False
    keeps_by_score: bool = False
    lengths: tuple[int, ...] = ()
    sinks: int = 0
    features: int = 0

    def __init__(self, config: RecurrentConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """The state before the first token. `dtype` is that of the hidden states."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, state: MixerState | None, ctx: Context) -> tuple[Tensor, MixerState | None]:
        """Mixes hidden (B, T, D). A state comes back where one was given; None starts from nothing and returns None."""
        raise NotImplementedError

    @staticmethod
    def shared(config: RecurrentConfig) -> nn.Module | None:
        """A module that all layers of this type share; the model makes it once and gives it as `ctx.shared`."""
        return None

    # What conversion asks of a mixer. A default says that there is no such thing, or does nothing. -------------------

    @contextlib.contextmanager
    def only(self, branch: str) -> Iterator[None]:
        """Within the block, one of `branches` works alone; states are not those of the whole mixer.

        Raises:
            RnnzooError: the mixer has no such branch.
        """
        raise RnnzooError(
            f"A '{self.layer_type}' layer has no branch {branch!r}; it has {', '.join(self.branches) or 'none'}."
        )
        yield

    def init_from_attention(self, weights: AttentionWeights) -> None:
        """Starts this mixer from a teacher's attention layer.

        What it takes from the teacher it copies, repeats or scales: `filled_from_attention` finds it by that.

        Raises:
            RnnzooError: this mixer has no such start. ShapeError: heads or widths are not the teacher's (those of
                `student_fields` of the configuration are), or a bias or norm of the teacher has no place.
        """
        raise RnnzooError(f"A '{self.layer_type}' layer cannot be started from an attention layer.")

    @classmethod
    def starts_from_attention(cls) -> bool:
        """Whether it has an `init_from_attention`."""
        return cls.init_from_attention is not Mixer.init_from_attention

    @classmethod
    def filled_from_attention(cls, config: RecurrentConfig, layer_idx: int) -> frozenset[str]:
        """Names of the parameters into which `init_from_attention` puts values of the teacher; the others are new.

        A matrix of which some rows are the teacher's is among them; a bias that is zero because the teacher has none is
        new. Class and configuration decide it, so it holds for a layer that comes from a file as well.
        """
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, nan = config.hidden_size, torch.full((), torch.nan, device="cpu")
        rows = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
        teacher: dict[str, Any] = {name: nan.expand(size, hidden) for name, size in rows.items()}
        teacher["o"] = nan.expand(hidden, heads * width)
        if config.attention_bias:
            teacher |= {f"{name}_bias": nan.expand(size) for name, size in rows.items()}
        if config.attention_output_bias:
            teacher["o_bias"] = nan.expand(hidden)
        if config.qk_norm:
            teacher |= {"q_norm": nan.expand(width), "k_norm": nan.expand(width)}
        with torch.device("meta"):
            mixer = cls(config, layer_idx).to(torch.bfloat16)
        mixer.to_empty(device="cpu")
        with torch.no_grad(), torch.device("cpu"):  # whatever the caller makes tensors on
            for tensor in [*mixer.parameters(), *mixer.buffers()]:
                tensor.zero_()
            try:
                mixer.init_from_attention(
                    AttentionWeights(**teacher, num_heads=heads, num_kv_heads=kv_heads, head_dim=width)
                )
            except RnnzooError:  # no teacher has such a layer
                return frozenset()
        return frozenset(name for name, parameter in mixer.named_parameters() if bool(parameter.isnan().any()))

    def set_decay(self, log_decay: Tensor) -> None:
        """Starts every head with the decay of log_decay (H,) < 0, natural log per step and teacher's query head.

        A mixer overrides it that has a decay of its own, whatever the tokens are, in a parameter. Heads that share a
        state take the geometric mean (`shared_decay`).

        Raises:
            RnnzooError: this mixer has no such decay.
        """
        raise RnnzooError(f"A '{self.layer_type}' layer has no decay to set.")

    @classmethod
    def has_decay(cls) -> bool:
        """Whether it has a `set_decay`."""
        return cls.set_decay is not Mixer.set_decay

    def mixing_matrix(self, hidden: Tensor, ctx: Context) -> Tensor:
        """The matrix M of the sequence hidden (B, T, D), seen from its first token: (B, H, T, T), gradients included.

        Row t holds the weights with which a head's output at t, before norms and gates, sums the values up to t.

        Raises:
            RnnzooError: this mixer's output is no such sum.
        """
        raise RnnzooError(f"A '{self.layer_type}' layer has no mixing matrix.")

    def output_projection(self) -> nn.Linear | None:
        """The linear layer that writes the output into the residual stream."""
        return getattr(getattr(self, "proj", None), "o_proj", None)

    def value_projection(self) -> nn.Linear | None:
        """The linear layer that makes the values which the heads sum over time."""
        return getattr(getattr(self, "proj", None), "v_proj", None)

    def heads_reader(self) -> nn.Module | None:
        """The module that is given what the heads have read: their norm or, without one, the output projection."""
        norm = getattr(self, "norm", None)
        return norm if isinstance(norm, nn.Module) else self.output_projection()

    def query_key_value(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a window reads, of hidden (B, T, D): q (B, T, H, d) and k, v (B, T, Hk, d), not rotated."""
        proj: Any = self.get_submodule("proj")
        return proj.split(hidden.to(proj.q_proj.weight.dtype))

    @contextlib.contextmanager
    def shortened(self, share: float) -> Iterator[None]:
        """Within the block, windows are `share` of their `lengths`, at least one token, and states are of that size."""
        before, self.lengths = self.lengths, tuple(max(1, int(length * share)) for length in self.lengths)
        try:
            yield
        finally:
            self.lengths = before

    @classmethod
    def recent_tokens(cls, config: RecurrentConfig, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """How many of so many tokens of a kv head are the last ones, with `keeps_by_score`."""
        return lengths

    def set_scores(self, weight: Tensor) -> None:
        """Scores tokens by weight (Hk, D) times the layer's input, with `keeps_by_score`; larger ones stay longer."""

    @classmethod
    def state_widths(cls, config: RecurrentConfig) -> list[int]:
        """`features` of every layer."""
        return [0] * config.num_hidden_layers

    @classmethod
    def fixed_widths_because(cls, options: Mapping[str, Any]) -> str | None:
        """Why a budget cannot choose `state_widths`, as a clause; None: it can, by `sized` and `linear_weights`.

        Args:
            options: fields of the configuration that are not to have their defaults.
        """
        return f"'{cls.layer_type}' layers have no linear state whose width can be chosen"

    @classmethod
    def sized(cls, config: RecurrentConfig, window: int, sinks: int, features: int) -> Mixer:
        """A mixer for `fit_features` and `linear_weights` alone; what they do not need is on the meta device.

        Args:
            config: of any model with the teacher's heads. window: of every kv head.
        """
        raise RnnzooError(f"A '{cls.layer_type}' layer has no linear state whose width can be chosen.")

    def fit_features(self, q: Tensor, k: Tensor, ctx: Context, rows: Tensor, seed: int) -> None:
        """Starts what sums beside the window in closed form, from what a teacher's attention does.

        Args:
            q: (T, H, d), k: (T, Hk, d), of the teacher, not rotated.
            ctx: of these tokens, one row. rows: (n,) int64, positions of the queries that are looked at.
        """

    def linear_weights(self, head: int, q: Tensor, k: Tensor, delay: Tensor) -> Tensor:
        """Weights (H / Hk, n, T) of the keys in the linear state of a kv head, in the units of exp(q k / sqrt(d)).

        Args:
            q: (n, H, d), of all heads, and k: (T, d), of this one, not rotated.
            delay: (n, T), tokens since a key has left the window, -inf for keys that have not, whose weight is 0.
        """
        raise RnnzooError(f"A '{self.layer_type}' layer has no linear state whose weights are known.")


def shared_decay(log_decay: Tensor, heads: int) -> Tensor:
    """log decays (H,) of query heads -> (heads,): the geometric mean of the groups, or each repeated."""
    if heads >= len(log_decay):
        return log_decay.repeat_interleave(heads // len(log_decay))
    return -(-log_decay).log().view(heads, -1).mean(-1).exp()
