"""Short convolution in Triton, forward and backward, as custom operators that autograd and torch.compile know.

One program takes a block of steps and a block of channels. The kernels know documents by `ages` alone: how many steps
of its document are before a step (the initial state counts as W-1). Masked steps are sorted behind the valid ones
before the kernels run, and the final state is read off the inputs, both by plain torch, which has their gradients.
"""

# pyright: reportGeneralTypeIssues=false
# (tl.static_range is declared as if it could not be iterated.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import tuned
from ..operators import differentiable
from ..steps import document_starts, take, valid_first

FLOAT = torch.float32


def short_conv(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.short_conv`."""
    batch, time, channels = x.shape
    past = weight.shape[1] - 1
    keep = back = ages = None
    if mask is not None:
        order, back = valid_first(mask)
        keep = mask.gather(1, order)
        x = torch.where(keep[..., None], take(x, order), 0.0)  # whatever stood there, even nan
        seq_ids = None if seq_ids is None else seq_ids.gather(1, order)
    if seq_ids is not None:
        ages = _ages(document_starts(seq_ids, keep), past)
    state = x.new_zeros(batch, channels, past) if initial_state is None else initial_state.to(x.dtype)
    y = forward(x, weight, bias, state, ages, activation == "silu")
    if keep is None or back is None:
        return y, _last(x, state, ages, torch.full((batch,), time, device=x.device))
    return take(torch.where(keep[..., None], y, 0.0), back), _last(x, state, ages, keep.sum(dim=1))


def _ages(starts: Tensor, past: int) -> Tensor:
    """(B, T) int32: steps between a step and the first that it sees, at most `past`."""
    steps = torch.arange(starts.shape[1], device=starts.device)
    first = torch.where(starts, steps, -past).cummax(dim=1).values
    return (steps - first).clamp(max=past).to(torch.int32)


def _last(x: Tensor, state: Tensor, ages: Tensor | None, lengths: Tensor) -> Tensor:
    """(B, D, W-1): what the step after the first `lengths` (B,) steps sees; the lag of column i is W-1-i."""
    past, time = state.shape[2], x.shape[1]
    lags = torch.arange(past, 0, -1, device=x.device)
    rows = lengths[:, None] - lags  # (B, W-1); below 0: in the initial state
    early = state.gather(2, (rows + past).clamp(max=past - 1)[:, None].expand_as(state)) if past else state
    last = torch.where((rows < 0)[:, None], early, take(x, rows.clamp(0, time - 1)).transpose(1, 2))
    if ages is None:
        return last
    age = ages.gather(1, (lengths[:, None] - 1).clamp(min=0)) + 1  # with no step at all, nothing has ended the past
    return torch.where(((lags <= age) | (lengths[:, None] == 0))[:, None], last, 0.0)


@triton.jit
def _inputs(x, state, b, t, lag, age, d, inside, time, channels, TAPS: tl.constexpr, HAS_AGES: tl.constexpr):
    """The inputs `lag` steps before steps t, zero outside of their documents."""
    seen = inside & (t < time)[:, None]
    if HAS_AGES:
        seen = seen & (lag <= age)[:, None]
    row = t - lag
    rows = (b.to(tl.int64) * time + row)[:, None] * channels + d[None, :]
    value = tl.load(x + rows, mask=seen & (row >= 0)[:, None], other=0.0).to(tl.float32)
    early = seen & (row < 0)[:, None] & (row >= 1 - TAPS)[:, None]
    columns = (b.to(tl.int64) * channels + d)[None, :] * (TAPS - 1) + (row + TAPS - 1)[:, None]
    return value + tl.load(state + columns, mask=early, other=0.0).to(tl.float32)


@triton.jit
def _gradient(
    x, weight, bias, state, ages, dy, b, t, d, time, channels,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_AGES: tl.constexpr,
):  # fmt: skip
    """dz of steps t, and their ages: the gradient before the activation; z is made again."""
    inside = (d < channels)[None, :]
    age = t * 0
    if HAS_AGES:
        age = tl.load(ages + b.to(tl.int64) * time + t, mask=t < time, other=0)
    rows = (b.to(tl.int64) * time + t)[:, None] * channels + d[None, :]
    dz = tl.load(dy + rows, mask=inside & (t < time)[:, None], other=0.0).to(tl.float32)
    if SILU:
        z = tl.zeros_like(dz)
        if HAS_BIAS:
            z += tl.load(bias + d, mask=d < channels, other=0.0)[None, :]
        for tap in tl.static_range(TAPS):
            factor = tl.load(weight + d * TAPS + tap, mask=d < channels, other=0.0)
            z += factor[None, :] * _inputs(
                x, state, b, t, TAPS - 1 - tap, age, d, inside, time, channels, TAPS, HAS_AGES
            )
        s = tl.sigmoid(z)
        dz *= s + z * s * (1 - s)
    return dz, age


@triton.jit
def _forward_kernel(
    x, weight, bias, state, ages, y, time, channels, blocks,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_AGES: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * STEPS + tl.arange(0, STEPS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (d < channels)[None, :]
    age = t * 0
    if HAS_AGES:
        age = tl.load(ages + b.to(tl.int64) * time + t, mask=t < time, other=0)
    z = tl.zeros((STEPS, WIDTH), dtype=tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + d, mask=d < channels, other=0.0)[None, :]
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight + d * TAPS + tap, mask=d < channels, other=0.0)
        z += factor[None, :] * _inputs(x, state, b, t, TAPS - 1 - tap, age, d, inside, time, channels, TAPS, HAS_AGES)
    if SILU:
        z *= tl.sigmoid(z)
    rows = (b.to(tl.int64) * time + t)[:, None] * channels + d[None, :]
    tl.store(y + rows, z.to(y.dtype.element_ty), mask=inside & (t < time)[:, None])


@triton.jit
def _backward_kernel(
    x, weight, bias, state, ages, dy, dx, sums, dstate, time, channels, blocks,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_AGES: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx of a block of steps, its share of dweight and dbias, and in the first block the gradient of the state."""
    b = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * STEPS
    t = start + tl.arange(0, STEPS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (d < channels)[None, :]
    total = tl.zeros((STEPS, WIDTH), dtype=tl.float32)
    share = sums + tl.program_id(0).to(tl.int64) * (TAPS + 1) * channels + d
    for lag in tl.static_range(TAPS):
        factor = tl.load(weight + d * TAPS + TAPS - 1 - lag, mask=d < channels, other=0.0)
        dz, age = _gradient(
            x, weight, bias, state, ages, dy, b, t + lag, d, time, channels, TAPS, SILU, HAS_BIAS, HAS_AGES
        )
        if HAS_AGES:
            dz = tl.where((lag <= age)[:, None], dz, 0.0)
        total += factor[None, :] * dz
        if lag == 0:
            tl.store(share + TAPS * channels, tl.sum(dz, axis=0), mask=d < channels)
            for tap in tl.static_range(TAPS):
                value = _inputs(x, state, b, t, TAPS - 1 - tap, age, d, inside, time, channels, TAPS, HAS_AGES)
                tl.store(share + tap * channels, tl.sum(dz * value, axis=0), mask=d < channels)
    rows = (b.to(tl.int64) * time + t)[:, None] * channels + d[None, :]
    tl.store(dx + rows, total.to(dx.dtype.element_ty), mask=inside & (t < time)[:, None])
    if start == 0:  # column c of the state is seen by step l with lag l + W-1-c
        for column in tl.static_range(TAPS - 1):
            early = tl.zeros((WIDTH,), dtype=tl.float32)
            for step in tl.static_range(TAPS - 1):
                if step <= column:
                    lag = step + TAPS - 1 - column
                    own = step + tl.arange(0, 1)
                    dz, age = _gradient(
                        x, weight, bias, state, ages, dy, b, own, d, time, channels, TAPS, SILU, HAS_BIAS, HAS_AGES
                    )
                    if HAS_AGES:
                        dz = tl.where((lag <= age)[:, None], dz, 0.0)
                    factor = tl.load(weight + d * TAPS + TAPS - 1 - lag, mask=d < channels, other=0.0)
                    early += factor * tl.sum(dz, axis=0)
            place = (b.to(tl.int64) * channels + d) * (TAPS - 1) + column
            tl.store(dstate + place, early.to(dstate.dtype.element_ty), mask=d < channels)


# What RNNZOO_AUTOTUNE=1 tries beside the rule.
CANDIDATES = [
    {"STEPS": steps, "WIDTH": width, "num_warps": warps}
    for steps in (16, 32, 64, 128)
    for width in (32, 64, 128)
    for warps in (2, 4, 8)
]


def _launch(kernel: str, x: Tensor, weight: Tensor, bias, ages, silu: bool, run=None):
    """Options of a launch, its grid, and the number of blocks of steps in a batch row.

    Args:
        run: launches the kernel with (options, grid, blocks), for tuning.
    """
    channels, taps = weight.shape
    steps = 16 if x.shape[1] <= 16 else 64 if kernel == "forward" else 32
    rule = {"STEPS": steps, "WIDTH": min(64, triton.next_power_of_2(channels)), "num_warps": 4}
    try_sizes = None if run is None else lambda sizes: run(*_geometry(x, weight, bias, ages, silu, sizes))
    sizes = tuned(f"short_conv {kernel}", (channels, taps, str(x.dtype)), rule, CANDIDATES, try_sizes)
    return _geometry(x, weight, bias, ages, silu, sizes)


def _geometry(x: Tensor, weight: Tensor, bias, ages, silu: bool, sizes: dict[str, int]):
    batch, time, channels = x.shape
    blocks = triton.cdiv(time, sizes["STEPS"])
    options = {"TAPS": weight.shape[1], "SILU": silu, "HAS_BIAS": bias is not None, "HAS_AGES": ages is not None}
    return {**options, **sizes}, (batch * blocks, triton.cdiv(channels, sizes["WIDTH"])), blocks


def _ready(x, weight, bias, state, ages):
    """As the kernels read them: contiguous, weight and bias in float32; any pointer stands for what is absent."""
    x, weight = x.contiguous(), weight.to(FLOAT).contiguous()
    bias = weight if bias is None else bias.to(FLOAT).contiguous()
    return x, weight, bias, state.contiguous(), x if ages is None else ages.contiguous()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, ages: Tensor | None, silu: bool) -> Tensor:
    """y (B, T, D)."""
    y = _empty_output(x, weight, bias, state, ages, silu)
    ready = _ready(x, weight, bias, state, ages)

    def run(options, grid, blocks) -> None:
        _forward_kernel[grid](*ready, y, *x.shape[1:], blocks, **options)

    run(*_launch("forward", x, weight, bias, ages, silu, run))
    return y


def _empty_output(x, weight, bias, state, ages, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, ages: Tensor | None, silu: bool, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weight, the bias (also where there is none) and the state."""
    dx, _, _, dstate = _empty_gradients(x, weight, bias, state, ages, silu, dy)
    channels, taps = weight.shape
    ready = _ready(x, weight, bias, state, ages)
    dy = dy.contiguous()
    sums: list[Tensor] = []

    def run(options, grid, blocks) -> None:
        sums[:] = [x.new_empty(grid[0], taps + 1, channels, dtype=FLOAT)]
        _backward_kernel[grid](*ready, dy, dx, sums[0], dstate, *x.shape[1:], blocks, **options)

    run(*_launch("backward", x, weight, bias, ages, silu, run))
    total = sums[0].sum(dim=0)
    return dx, total[:taps].t().contiguous(), total[taps].clone(), dstate


def _empty_gradients(x, weight, bias, state, ages, silu, dy):
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(weight, dtype=FLOAT, memory_format=contiguous),
        x.new_empty(weight.shape[0], dtype=FLOAT),
        torch.empty_like(state, memory_format=contiguous),
    )


forward = differentiable("short_conv_triton", _forward, _backward, _empty_output, _empty_gradients, "y")
