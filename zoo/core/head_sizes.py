"""Sizes of heads that are not the configuration's attention heads, in fields named by a prefix."""

from __future__ import annotations

from typing import Any

from .configuration import RecurrentConfig

__all__ = ["delta_student", "derive_delta", "derive_heads"]


def derive_heads(config: RecurrentConfig, prefix: str, widest: int = 128) -> None:
    """Fills what is None of `<prefix>_key_dim`, `_num_heads` and `_value_dim`: equal heads that share hidden_size.

    Args:
        widest: where nothing is given, the key width is the largest proper divisor of hidden_size up to this.
    """
    width = config.hidden_size
    key_dim, heads, value_dim = (f"{prefix}_{name}" for name in ("key_dim", "num_heads", "value_dim"))
    if getattr(config, key_dim) is None:
        given = getattr(config, heads)
        share = (
            width // given
            if given
            else next(d for d in range(min(widest, max(1, width // 2)), 0, -1) if width % d == 0)
        )
        setattr(config, key_dim, max(1, share))
    if getattr(config, heads) is None:
        setattr(config, heads, max(1, width // getattr(config, key_dim)))
    if getattr(config, value_dim) is None:
        setattr(config, value_dim, max(1, width // getattr(config, heads)))


def derive_delta(config: RecurrentConfig, prefix: str) -> None:
    """`derive_heads` for a mixer of `core.delta`, and `_k_heads` and `_v_heads`: `_num_heads` where None.

    Raises:
        ValueError: heads that do not divide, or an activation of the convolutions that there is not.
    """
    derive_heads(config, prefix)
    q_heads, k_heads, v_heads = (f"{prefix}_{name}" for name in ("num_heads", "k_heads", "v_heads"))
    for name in (k_heads, v_heads):
        if getattr(config, name) is None:
            setattr(config, name, getattr(config, q_heads))
    q, k, v = (getattr(config, name) for name in (q_heads, k_heads, v_heads))
    if v % k or (q % v and v % q):
        raise ValueError(
            f"{v_heads} ({v}) must be a multiple of {k_heads} ({k}), and a multiple or a divisor of {q_heads} ({q})."
        )
    if getattr(config, f"{prefix}_conv_activation") not in ("silu", "none"):
        raise ValueError(
            f"{prefix}_conv_activation must be 'silu' or 'none', got {getattr(config, f'{prefix}_conv_activation')!r}."
        )


def delta_student(prefix: str, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Fields of a student of attention: a state per kv head, and no activation, which would change its q, k and v."""
    sizes = {"num_heads": num_heads, "k_heads": num_kv_heads, "v_heads": num_kv_heads}
    sizes |= {"key_dim": head_dim, "value_dim": head_dim, "conv_activation": "none"}
    return {f"{prefix}_{name}": value for name, value in sizes.items()}
