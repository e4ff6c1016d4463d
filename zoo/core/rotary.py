"""Rotary position embedding, with the scalings of transformers and partial rotation."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["Rotary", "RotaryFrequencies", "turn"]

# For these types the frequencies depend on the longest position of the call, as in transformers.
LENGTH_DEPENDENT = ("dynamic", "longrope")


class RotaryFrequencies:
    """Inverse frequencies of a configuration, computed on first use and kept per device.

    Not a module and without buffers: loading on the meta device would lose a buffer that no checkpoint holds.
    """

    def __init__(self, config):
        self.config = config
        self._cached: dict[torch.device, tuple[Tensor, float]] = {}

    def get(self, positions: Tensor) -> tuple[Tensor, float]:
        """(rotary_dim / 2,) float32 frequencies in radians per token, and the factor on cos and sin."""
        parameters = self.config.rope_parameters
        rope_type = parameters.get("rope_type", "default")
        device = positions.device
        if rope_type in LENGTH_DEPENDENT:
            length = positions.max() + 1 if positions.numel() else 1
            if rope_type == "longrope" or device.type == "cpu":
                length = int(length)  # longrope chooses by it; elsewhere to read it would be to wait for the device
            return ROPE_INIT_FUNCTIONS[rope_type](self.config, device, seq_len=length)
        if device not in self._cached:
            if rope_type == "default":
                self._cached[device] = (self._default(parameters).to(device), 1.0)
            else:
                self._cached[device] = ROPE_INIT_FUNCTIONS[rope_type](self.config, device)
        return self._cached[device]

    def _default(self, parameters: dict) -> Tensor:
        width = int(self.config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, width, 2, dtype=torch.int64).float() / width
        return 1.0 / (parameters["rope_theta"] ** exponent)


class Rotary:
    """Rotates heads by position. One object per forward pass: cos and sin of its positions are computed once."""

    def __init__(self, frequencies: RotaryFrequencies, positions: Tensor):
        self.frequencies = frequencies
        self.positions = positions
        self._memo: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each (*positions.shape, rotary_dim), in `dtype`; float64 is computed in float64."""
        if positions is self.positions and dtype in self._memo:
            return self._memo[dtype]
        # Those of the call, whatever is turned in it: queries and keys must agree, and `unrotate` with `rotate`.
        frequencies, factor = self.frequencies.get(self.positions)
        accurate = torch.promote_types(dtype, torch.float32)
        angle = positions.to(accurate)[..., None] * frequencies.to(accurate)
        angle = torch.cat([angle, angle], -1)
        pair = ((angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype))
        if positions is self.positions:
            self._memo[dtype] = pair
        return pair

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates x (B, T, H, D) by positions (B, T) or (1, T); channels beyond rotary_dim pass unchanged."""
        cos, sin = self.cos_sin(positions, x.dtype)
        return turn(x, cos.unsqueeze(-2), sin.unsqueeze(-2))

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        _, factor = self.frequencies.get(self.positions)
        cos, sin = self.cos_sin(positions, x.dtype)
        if factor != 1.0:  # it is in both directions
            cos, sin = cos / factor**2, sin / factor**2
        return turn(x, cos.unsqueeze(-2), -sin.unsqueeze(-2))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., D) turned by angles whose cos and sin (..., rotary_dim) name each pair twice, in its two halves."""
    width = cos.shape[-1]
    turned = x[..., :width]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)
