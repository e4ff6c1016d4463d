"""Long convolution in plain torch with autograd, on any device: the kernel by powers, the convolution by FFT.

No tensor has axes for batch, time and state at once. With n close to sqrt(T) and t = j n + i, A^t b is A^{jn} A^i b:
the n columns A^i b and the T / n rows c A^{jn} give the kernel as one matrix product, and, with the inputs of every n
steps, the last state. Powers of A are squares of squares, so that |A| <= 1 never grows, and A = 0 is exact.

Documents and padding: every document's valid tokens become a row of their own, zeros before them, together with others
of its length up to a factor of two, so that there are at most twice the tokens. A state from before goes on into the
first document of a row alone, and is added to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..steps import document_starts
from .reference import long_conv as loop
from .reference import long_conv_step, state_dtype, times

__all__ = ["long_conv", "long_conv_step"]

# Up to here a matrix product is faster; and MKL's shorter FFTs round differently with the number of threads.
SHORT = 32


def long_conv(
    *,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.long_conv`."""
    if u.shape[1] == 1:
        system = {"a": a, "b": b, "c": c, "d": d, "p": p, "q": q}
        return loop(u=u, **system, initial_state=initial_state, seq_ids=seq_ids, mask=mask)
    real, dtype = state_dtype(u, a, b, c, p, q, initial_state)
    output_dtype, size, one_output = u.dtype, b.shape[-1], c.ndim == 2
    u = u.to(real) if mask is None else torch.where(mask[..., None], u.to(real), 0.0)
    a, b, c = a.to(dtype), b.to(dtype), c.to(dtype)
    c = c[:, None] if one_output else c
    state = None if initial_state is None else initial_state.to(dtype)
    if p is not None and q is not None:
        a, b, c, state = _as_real(a, b, c, p.to(dtype), q.to(dtype), state)

    if seq_ids is None and mask is None:
        steps = u.shape[1]
        system = System(a, b, c, steps)
        y, last = system.convolve(u), system.last_state(u)
        if state is not None:
            y = y + system.free_response(state, steps)
            last = last + system.advance(state, torch.full(u.shape[:1], steps, device=u.device), steps)
    else:
        y, last = _document_by_document(u, a, b, c, state, seq_ids, mask)

    if p is not None and dtype.is_complex:
        last = torch.complex(*last.split(size, -1))
    if d is not None:
        y = y + u[..., None] * d.to(real).view(u.shape[-1], -1)
    return (y[..., 0] if one_output else y).to(output_dtype), last


def _as_real(a: Tensor, b: Tensor, c: Tensor, p: Tensor, q: Tensor, state: Tensor | None):
    """A diagonal plus low rank as a dense matrix, over the reals: on [Re h, Im h] where h is complex."""
    if not a.is_complex():
        return torch.diag_embed(a) + p @ q, b, c, state
    rotation = [torch.diag_embed(x) for x in (a.real, a.imag)]
    diagonal = torch.cat([torch.cat([rotation[0], -rotation[1]], -1), torch.cat([rotation[1], rotation[0]], -1)], -2)
    state = None if state is None else torch.cat([state.real, state.imag], -1)
    return diagonal + _columns(p) @ _rows(q), torch.cat([b.real, b.imag], -1), _rows(c), state


def _columns(x: Tensor) -> Tensor:
    """(..., N, k) -> (..., 2 N, k) where complex, so that _rows(y) @ _columns(x) is Re(y x)."""
    return torch.cat([x.real, x.imag], -2) if x.is_complex() else x


def _rows(y: Tensor) -> Tensor:
    """(..., k, N) -> (..., k, 2 N) where complex."""
    return torch.cat([y.real, -y.imag], -1) if y.is_complex() else y


def _exponent(count: int) -> int:
    """The smallest e with 2^e >= count."""
    return max(0, count - 1).bit_length()


class System:
    """One state space and the powers A^(2^e) that sequences of up to `longest` steps need.

    Args:
        a: (D, N) or (D, N, N). b: (D, N). c: (D, M, N). All of one dtype.
    """

    def __init__(self, a: Tensor, b: Tensor, c: Tensor, longest: int):
        self.c, self.dense = c, a.ndim == 3
        self.squares = [a]
        low, _ = _halves(longest)
        self.columns = self._columns_after(b, low)
        self.kernel = self._outputs(self.columns, longest)

    def _square(self, e: int) -> Tensor:
        """A^(2^e)."""
        while len(self.squares) <= e:
            last = self.squares[-1]
            self.squares.append(last @ last if self.dense else last * last)
        return self.squares[e]

    def _power(self, e: int, x: Tensor) -> Tensor:
        """A^(2^e) x for columns x (..., D, N, k)."""
        return times(self._square(e), x) if self.dense else self._square(e)[..., None] * x

    def _columns_after(self, x: Tensor, e: int) -> Tensor:
        """A^i x, i = 0 ... 2^e - 1, for x (..., D, N): (..., D, N, 2^e)."""
        x = x[..., None]
        for k in range(e):
            x = torch.cat([x, self._power(k, x)], -1)
        return x

    def _rows_before(self, first: int, e: int) -> Tensor:
        """c A^(j 2^first), j = 0 ... 2^e - 1: (D, 2^e, M, N)."""
        y = self.c
        for k in range(first, first + e):
            power = self._square(k)
            y = torch.cat([y, y @ power if self.dense else y * power[:, None]], 1)
        return y.unflatten(1, (2**e, -1))

    def _outputs(self, columns: Tensor, steps: int) -> Tensor:
        """Re(c A^t x), t = 0 ... steps - 1: (..., D, M, steps), from the columns A^i x (..., D, N, 2^low)."""
        rows = self._rows_before(*_halves(steps))
        y = times(_rows(rows).flatten(1, 2), _columns(columns)).unflatten(-2, rows.shape[1:3])
        return y.transpose(-3, -2).flatten(-2)[..., :steps]

    def convolve(self, u: Tensor) -> Tensor:
        """The outputs (R, L, D, M) for u (R, L, D), from a zero state."""
        steps = u.shape[1]
        if steps <= SHORT:
            windows = F.pad(self.kernel[..., :steps], (steps - 1, 0)).unfold(-1, steps, 1)  # (D, M, L, L)
            y = windows.flatten(1, 2) @ u.flip(1).permute(2, 1, 0)
            return y.unflatten(1, (-1, steps)).permute(3, 2, 0, 1)
        length = _fft_length(2 * steps - 1)
        spectrum = torch.fft.rfft(u.transpose(1, 2), n=length)[:, :, None]
        y = torch.fft.irfft(spectrum * torch.fft.rfft(self.kernel[..., :steps], n=length), n=length)
        return y[..., :steps].permute(0, 3, 1, 2)

    def last_state(self, u: Tensor) -> Tensor:
        """The state (R, D, N) after u (R, L, D), from a zero state."""
        steps = u.shape[1]
        low, high = _halves(steps)
        u = F.pad(u.transpose(1, 2), (2 ** (low + high) - steps, 0)).unflatten(-1, (-1, 2**low))
        columns = self.columns[..., : 2**low].flip(-1)
        parts = times(_columns(columns), u.mT)  # (R, D, N, 2^high) what every 2^low inputs add
        state = torch.complex(*parts.chunk(2, -2)) if columns.is_complex() else parts
        for e in range(low, low + high):
            state = self._power(e, state[..., 0::2]) + state[..., 1::2]
        return state[..., 0]

    def free_response(self, state: Tensor, steps: int) -> Tensor:
        """The outputs (B, steps, D, M) without inputs, from a state (B, D, N)."""
        columns = self._columns_after(self._power(0, state[..., None])[..., 0], _halves(steps)[0])
        return self._outputs(columns, steps).permute(0, 3, 1, 2)

    def advance(self, state: Tensor, steps: Tensor, longest: int) -> Tensor:
        """The state (B, D, N) after `steps` (B,) steps, at most `longest`, without inputs."""
        for e in range(longest.bit_length()):
            bit = (steps >> e & 1).bool()[:, None, None]
            state = torch.where(bit, self._power(e, state[..., None])[..., 0], state)
        return state


def _halves(steps: int) -> tuple[int, int]:
    """low, high with 2^(low + high) >= steps: t = 2^low j + i."""
    e = _exponent(steps)
    return (e + 1) // 2, e // 2


def _fft_length(least: int) -> int:
    """A length that the FFT is fast at: 4, 5 or 6 times a power of two."""
    e = _exponent(least) - 3
    return next(m << e for m in (4, 5, 6, 8) if m << e >= least)


def _document_by_document(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, seq_ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The outputs (B, T, D, M) and the last state (B, D, N)."""
    batch, time, channels = u.shape
    nothing = torch.zeros(batch, time, dtype=torch.bool, device=u.device)
    valid = ~nothing if mask is None else mask
    document = (nothing if seq_ids is None else document_starts(seq_ids, mask)).cumsum(1)  # in its row, below time
    names = document + time * torch.arange(batch, device=u.device)[:, None]
    tokens = valid.flatten().nonzero()[:, 0]  # of document after document
    found, counts = names.flatten()[tokens].unique_consecutive(return_counts=True)
    rows = found // time
    ends_row = F.pad(rows[1:] != rows[:-1], (0, 1), value=True)[: len(rows)]

    system = System(a, b, c, max([1, *counts.tolist()]))
    given = torch.cat([u.new_zeros(1, channels), u.flatten(0, 1)[tokens]])  # the first one stands for no token
    outputs = u.new_zeros(batch * time, channels, c.shape[1])
    last = u.new_zeros(batch, channels, b.shape[-1], dtype=b.dtype)
    for members in _alike(counts):
        index = _token_table(counts, members)
        inside, own = index > 0, given[index]
        outputs = outputs.index_copy(0, tokens[index[inside] - 1], system.convolve(own)[inside])
        final = ends_row[members]
        last = last.index_copy(0, rows[members[final]], system.last_state(own)[final])
    if state is not None:
        first = valid & (document == 0)
        continued = first.sum(1)
        longest = max(1, int(continued.max()))
        free = system.free_response(state, longest)
        steps = torch.arange(free.shape[1], device=u.device) < continued[:, None]
        outputs = outputs.index_add(0, first.flatten().nonzero()[:, 0], free[steps])
        still = (continued == valid.sum(1))[:, None, None]
        last = last + torch.where(still, system.advance(state, continued, longest), 0.0)
    return outputs.unflatten(0, (batch, time)), last


def _alike(counts: Tensor) -> list[Tensor]:
    """Documents of equal length up to a factor of two, by number."""
    groups: dict[int, list[int]] = {}
    for number, count in enumerate(counts.tolist()):
        groups.setdefault(_exponent(count), []).append(number)
    return [torch.tensor(members, device=counts.device) for members in groups.values()]


def _token_table(counts: Tensor, members: Tensor) -> Tensor:
    """(R, L) which token, counted from 1 over all documents, stands where in these; 0: none, before the first."""
    longest = int(counts[members].max())
    place = torch.arange(longest, device=counts.device) - (longest - counts[members])[:, None]
    before = (counts.cumsum(0) - counts)[members, None]
    return torch.where(place >= 0, before + place + 1, 0)
