"""Block floating point: numbers of 4 or 8 bits that share a power of two in blocks, for long exact windows.

A block of up to 32 neighbours is kept as integers c, |c| <= 2^(bits-1) - 1, and one exponent p: x = c * 2^p, with the
smallest p at which the largest of them fits. The layout is that of the MXINT8 format (OCP Microscaling Formats
specification 1.0, 2023, section 5.3), and the same with 4 bits, two numbers to a byte.

Such values are exact in bfloat16 and wider types, and quantising them again changes nothing; so a state may be unpacked
and packed at every call without drift.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Packed", "pack", "quantise", "rounded_like", "stored_like", "unpacked"]

BLOCK = 32
LEAST_EXPONENT, LARGEST_EXPONENT = -126, 127


@dataclasses.dataclass
class Packed:
    """Quantised vectors (..., width). All zero stands for zeros.

    codes: (..., width) int8 for 8 bits, (..., width / 2) uint8 for 4 bits: first half of the vector in the low bits.
    exponents: (..., blocks) int8.
    """

    codes: Tensor
    exponents: Tensor

    @classmethod
    def zeros(cls, *shape: int, bits: int, device: torch.device | str | None = None) -> Packed:
        """Zeros of `shape` (..., width)."""
        *rows, width = shape
        kind, stored = (torch.int8, width) if bits == 8 else (torch.uint8, width // 2)
        exponents = torch.zeros(*rows, width // _block(width), dtype=torch.int8, device=device)
        return cls(torch.zeros(*rows, stored, dtype=kind, device=device), exponents)

    @property
    def width(self) -> int:
        """Of the vectors."""
        return self.codes.shape[-1] * (2 if self.codes.dtype == torch.uint8 else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., width)."""
        return (*self.codes.shape[:-1], self.width)

    @property
    def bits(self) -> int:
        """Of a number: 4 or 8."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    def select(self, *index: Tensor) -> Packed:
        """The vectors at these places of the leading axes."""
        return Packed(self.codes[index], self.exponents[index])

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """(..., width) in `dtype`."""
        codes = self.codes
        if codes.dtype == torch.uint8:
            codes = torch.cat([codes << 4, codes & 0xF0], dim=-1).view(torch.int8) >> 4  # the shift keeps the sign
        blocks = codes.to(dtype).unflatten(-1, (self.exponents.shape[-1], -1))
        return (blocks * _power_of_two(self.exponents).to(dtype)[..., None]).flatten(-2)


def pack(x: Tensor, bits: int) -> Packed:
    """x (..., width) in `bits` bits, 4 or 8. Exact where x is a result of `quantise`."""
    codes, exponents = _codes(x, bits)
    codes = codes.flatten(-2).to(torch.int8)
    if bits == 4:
        low, high = codes.view(torch.uint8).chunk(2, -1)
        codes = (low & 0xF) | (high << 4)
    return Packed(codes, exponents.to(torch.int8))


def quantise(x: Tensor, bits: int) -> Tensor:
    """x (..., width) rounded to what `pack` keeps of it, in x's type; the gradient passes as if nothing was done."""
    return _Quantise.apply(x, bits)


def rounded_like(x: Tensor, kept: Tensor | Packed) -> Tensor:
    """x rounded to what `kept`, plain or packed, can hold."""
    return x.to(kept.dtype) if isinstance(kept, Tensor) else quantise(x, kept.bits)


def stored_like(x: Tensor, kept: Tensor | Packed) -> Tensor | Packed:
    """x as `kept` is stored."""
    return x.to(kept.dtype) if isinstance(kept, Tensor) else pack(x, kept.bits)


def unpacked(kept: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """Plain, in `dtype`."""
    return kept.to(dtype) if isinstance(kept, Tensor) else kept.unpack(dtype)


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bits: int) -> Tensor:
        codes, exponents = _codes(x, bits)
        return (codes * _power_of_two(exponents).to(codes.dtype)[..., None]).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def _block(width: int) -> int:
    return BLOCK if width % BLOCK == 0 else width


def _codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers (..., blocks, n) as floating numbers, and exponents (..., blocks) int32."""
    top = 2 ** (bits - 1) - 1
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = x.unflatten(-1, (-1, _block(x.shape[-1])))
    mantissa, exponents = torch.frexp(blocks.abs().amax(-1) / top)
    exponents = (exponents - (mantissa == 0.5).int()).clamp(LEAST_EXPONENT, LARGEST_EXPONENT - 7)
    codes = (blocks * _power_of_two(-exponents).to(x.dtype)[..., None]).round().clamp(-top, top)
    return codes, exponents


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in float32, exactly: the bits of the number are written down."""
    return ((exponents.int() + 127).clamp(min=1) << 23).view(torch.float32)
