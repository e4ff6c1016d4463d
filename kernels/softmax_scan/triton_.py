"""Softmax scan on GPUs, in Triton: a program is one head of one batch row, or a block of its channels where each has a
score of its own, and keeps the state in registers.

Where a head has one score, every lane holds it, and its maximum and denominator. Backward goes through time in chunks,
last first; it makes the states of a chunk again from the state before it, which forward kept, into a scratch of one
chunk for each program. The formulas are those of `cpu.c`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import tuned
from ..operators import contiguous, differentiable, needs_gradient
from ..steps import step_codes
from .operators import CHUNK, empty_gradients, empty_outputs
from .state import SoftmaxState


@triton.jit
def places(H, V, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """For this program's lanes: batch row, score and value within a step, whether there is such a value, a score."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    value = h * V + lane
    inside = lane < V
    if SHARED:
        return b, h + lane * 0, value, inside, lane == 0
    else:
        return b, value, value, inside, inside


@triton.jit
def code_at(codes, row, lanes, HAS_CODES: tl.constexpr):
    """The code of a step, on every lane."""
    code = lanes * 0
    if HAS_CODES:
        code += tl.load(codes + row).to(tl.int32)
    return code


@triton.jit
def summed(x, SHARED: tl.constexpr):
    """Summed over the values of a score."""
    if SHARED:
        return tl.zeros_like(x) + tl.sum(x, axis=0)
    else:
        return x


@triton.jit
def weights(first, second):
    """exp(first - larger), exp(second - larger), and where the second is larger; no weight for -inf beside -inf."""
    larger = second > first
    difference = tl.where(larger, first - second, second - first)
    e = tl.where(difference <= 0.0, tl.exp(difference), 0.0)
    return tl.where(larger, e, 1.0), tl.where(larger, 1.0, e), larger


@triton.jit
def weigh(m, d, k, decay, bonus, HAS_BONUS: tl.constexpr):
    """f, p, a, c of `cpu.c`, where the new score is the maximum, and the maximum and denominator after the step."""
    f, p, won = weights(m + decay, k)
    after = f * d + p
    a, c, total = f, p, after
    if HAS_BONUS:
        a, c, _ = weights(m, k + bonus)
        total = a * d + c
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    return f, p, a * inverse, c * inverse, won, tl.where(won, k, m + decay), after


@triton.jit
def load_state(at_maximum, at_numerator, at_denominator, inside):
    m = tl.load(at_maximum, mask=inside, other=0.0)
    return m, tl.load(at_numerator, mask=inside, other=0.0), tl.load(at_denominator, mask=inside, other=0.0)


@triton.jit
def store_state(at_maximum, at_numerator, at_denominator, m, n, d, first, inside):
    tl.store(at_maximum, m, mask=first)
    tl.store(at_numerator, n, mask=inside)
    tl.store(at_denominator, d, mask=first)


@triton.jit
def load_parameter(tensor, score, inside, GIVEN: tl.constexpr):
    x = tl.zeros(score.shape, tl.float32)
    if GIVEN:
        x = tl.load(tensor + score, mask=inside, other=0.0)
    return x


@triton.jit
def forward_kernel(
    k, v, decay, bonus, maximum, numerator, denominator, codes,
    out, to_maximum, to_numerator, to_denominator, kept, T, H, V, S,
    HAS_DECAY: tl.constexpr, HAS_BONUS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_CODES: tl.constexpr,
    KEEP: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, score, value, inside, first = places(H, V, SHARED, BLOCK)
    D = H * V
    w = load_parameter(decay, score, inside, HAS_DECAY)
    u = load_parameter(bonus, score, inside, HAS_BONUS)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    n = tl.zeros([BLOCK], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    if HAS_STATE:
        m, n, d = load_state(maximum + b * S + score, numerator + b * D + value, denominator + b * S + score, inside)
    chunks = tl.cdiv(T, CHUNK)
    for chunk in range(chunks):
        if KEEP:
            at = kept + (b * chunks + chunk) * (2 * S + D)
            store_state(at + score, at + 2 * S + value, at + S + score, m, n, d, first, inside)
        for t in tl.range(chunk * CHUNK, tl.minimum(T, chunk * CHUNK + CHUNK), num_stages=4):  # pyright: ignore
            row = b * T + t
            code = code_at(codes, row, score, HAS_CODES)
            read = inside & (code != 2)
            k_t = tl.load(k + row * S + score, mask=read, other=0.0).to(tl.float32)
            v_t = tl.load(v + row * D + value, mask=read, other=0.0).to(tl.float32)
            m_t, n_t = tl.where(code == 1, float("-inf"), m), tl.where(code == 1, 0.0, n)
            d_t = tl.where(code == 1, 0.0, d)
            f, p, a, c, _, m_after, d_after = weigh(m_t, d_t, k_t, w, u, HAS_BONUS)
            average = tl.where(code == 2, 0.0, a * n_t + c * v_t)
            tl.store(out + row * D + value, average.to(out.dtype.element_ty), mask=inside)
            m, n = tl.where(code == 2, m, m_after), tl.where(code == 2, n, f * n_t + p * v_t)
            d = tl.where(code == 2, d, d_after)
    to_m, to_n, to_d = to_maximum + b * S + score, to_numerator + b * D + value, to_denominator + b * S + score
    store_state(to_m, to_n, to_d, m, n, d, first, inside)


@triton.jit
def backward_kernel(
    k, v, decay, bonus, codes, kept, dout, maximum, numerator, denominator, scratch,
    dk, dv, ddecay, dbonus, to_maximum, to_numerator, to_denominator, T, H, V, S,
    HAS_DECAY: tl.constexpr, HAS_BONUS: tl.constexpr, HAS_CODES: tl.constexpr,
    SHARED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, score, value, inside, first = places(H, V, SHARED, BLOCK)
    D = H * V
    w = load_parameter(decay, score, inside, HAS_DECAY)
    u = load_parameter(bonus, score, inside, HAS_BONUS)
    # This program's own CHUNK rows of maxima, numerators and denominators before each step.
    program = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    states = scratch + program * (3 * CHUNK * BLOCK) + tl.arange(0, BLOCK)
    everywhere = tl.arange(0, BLOCK) < BLOCK
    mu, g, h = load_state(maximum + b * S + score, numerator + b * D + value, denominator + b * S + score, inside)
    dw = tl.zeros([BLOCK], tl.float32)
    du = tl.zeros([BLOCK], tl.float32)
    chunks = tl.cdiv(T, CHUNK)
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = chunk * CHUNK
        steps = tl.minimum(T - start, CHUNK)
        at = kept + (b * chunks + chunk) * (2 * S + D)
        m, n, d = load_state(at + score, at + 2 * S + value, at + S + score, inside)
        for i in range(steps):
            row = b * T + start + i
            code = code_at(codes, row, score, HAS_CODES)
            read = inside & (code != 2)
            k_t = tl.load(k + row * S + score, mask=read, other=0.0).to(tl.float32)
            v_t = tl.load(v + row * D + value, mask=read, other=0.0).to(tl.float32)
            m_t, n_t = tl.where(code == 1, float("-inf"), m), tl.where(code == 1, 0.0, n)
            d_t = tl.where(code == 1, 0.0, d)
            own = states + i * (3 * BLOCK)
            store_state(own, own + BLOCK, own + 2 * BLOCK, m_t, n_t, d_t, everywhere, everywhere)
            f, p, a, c, won, m_after, d_after = weigh(m_t, d_t, k_t, w, u, HAS_BONUS)
            m, n = tl.where(code == 2, m, m_after), tl.where(code == 2, n, f * n_t + p * v_t)
            d = tl.where(code == 2, d, d_after)
        tl.debug_barrier()  # other threads of the program may read what this one wrote
        if back == 0:  # what the final maximum's gradient has beyond the pair's
            mu -= summed(n * g, SHARED) + d * h
        chunk_dw = tl.zeros([BLOCK], tl.float32)
        chunk_du = tl.zeros([BLOCK], tl.float32)
        for j in range(steps):
            i = steps - 1 - j
            row = b * T + start + i
            code = code_at(codes, row, score, HAS_CODES)
            read = inside & (code != 2)
            k_t = tl.load(k + row * S + score, mask=read, other=0.0).to(tl.float32)
            v_t = tl.load(v + row * D + value, mask=read, other=0.0).to(tl.float32)
            o_t = tl.load(dout + row * D + value, mask=read, other=0.0).to(tl.float32)
            own = states + i * (3 * BLOCK)
            m_t, n_t, d_t = load_state(own, own + BLOCK, own + 2 * BLOCK, everywhere)
            f, p, a, c, won, m_after, d_after = weigh(m_t, d_t, k_t, w, u, HAS_BONUS)
            o_n, o_v = summed(o_t * n_t, SHARED), summed(o_t * v_t, SHARED)
            g_n, g_v = summed(g * n_t, SHARED), summed(g * v_t, SHARED)
            s = c * (a * (d_t * o_v - o_n))
            score_gradient = s + p * (g_v + h) + tl.where(won, mu, 0.0)
            decay_gradient = f * (g_n + h * d_t) + tl.where(won, 0.0, mu)
            if not HAS_BONUS:
                decay_gradient -= s
            value_gradient = c * o_t + p * g
            there = code != 2
            chunk_dw += tl.where(there, decay_gradient, 0.0)
            chunk_du += tl.where(there, s, 0.0)
            score_gradient = tl.where(there, score_gradient, 0.0).to(dk.dtype.element_ty)
            tl.store(dk + row * S + score, score_gradient, mask=first)
            value_gradient = tl.where(there, value_gradient, 0.0).to(dv.dtype.element_ty)
            tl.store(dv + row * D + value, value_gradient, mask=inside)
            g = tl.where(there, f * g + a * o_t, g)
            h = tl.where(there, f * h - a * (a * o_n + c * o_v), h)
            mu = tl.where(there & won, 0.0, mu)
        dw += chunk_dw
        du += chunk_du
        tl.debug_barrier()
    at = kept + b * chunks * (2 * S + D)
    m, n, d = load_state(at + score, at + 2 * S + value, at + S + score, inside)
    mu += summed(n * g, SHARED) + d * h
    to_m, to_n, to_d = to_maximum + b * S + score, to_numerator + b * D + value, to_denominator + b * S + score
    store_state(to_m, to_n, to_d, mu, g, h, first, inside)
    tl.store(ddecay + b * S + score, dw, mask=first)
    tl.store(dbonus + b * S + score, du, mask=first)


def softmax_scan(
    *,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: SoftmaxState | None,
    seq_ids: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, SoftmaxState]:
    """See `kernels.softmax_scan`."""
    decay, bonus = (None if x is None else x.to(torch.float32) for x in (decay, bonus))
    state = (None, None, None) if initial_state is None else tuple(x.to(torch.float32) for x in initial_state)
    tensors = (k, v, decay, bonus, *state)
    needed = needs_gradient(*tensors)
    out, *final, _ = forward(*tensors, step_codes(seq_ids, mask), needed)
    return out, SoftmaxState(*final)


def _sizes(kernel: str, k: Tensor, v: Tensor, launch: Callable[[dict[str, int]], None]) -> dict[str, int]:
    """Lanes a program, all of a head where they share a score, and warps; by rule a warp for up to 128 lanes."""
    width, scores = v.shape[3], k.shape[3]
    lanes = triton.next_power_of_2(width)
    block = min(64, lanes) if scores == width else lanes
    others = [width for width in (32, 64, 128, 256) if width <= lanes] if scores == width else [lanes]
    candidates = [
        {"block": lanes, "num_warps": warps} for lanes in others for warps in (1, 2, 4) if 32 * warps <= lanes
    ]
    rule = {"block": block, "num_warps": max(1, block // 128)}
    return tuned(f"softmax_scan {kernel}", (width, scores, str(v.dtype)), rule, candidates, launch)


def _numbers(k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """T, H, V, S."""
    _, time, heads, width = v.shape
    return time, heads, width, heads * k.shape[3]


def _forward(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    maximum: Tensor | None,
    numerator: Tensor | None,
    denominator: Tensor | None,
    codes: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, the final state's three tensors, states before each chunk: what backward needs; empty unless `keep`)."""
    outputs = empty_outputs(k, v, decay, bonus, maximum, numerator, denominator, codes, keep)
    inputs = contiguous(k, v, decay, bonus, maximum, numerator, denominator, codes)
    given = [x is not None for x in (decay, bonus, maximum, codes)]

    def launch(sizes: dict[str, int]) -> None:
        grid = *v.shape[:3:2], triton.cdiv(v.shape[3], sizes["block"])
        flags = *given, keep, k.shape[3] != v.shape[3], CHUNK, sizes["block"]
        forward_kernel[grid](*inputs, *outputs, *_numbers(k, v), *flags, num_warps=sizes["num_warps"])

    with torch.cuda.device_of(v):
        launch(_sizes("forward", k, v, launch))
    return outputs


def _backward(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    codes: Tensor | None,
    kept: Tensor,
    dout: Tensor,
    dmaximum: Tensor,
    dnumerator: Tensor,
    ddenominator: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, decay, bonus and the initial state's three tensors."""
    dk, dv, *_, to_maximum, to_numerator, to_denominator = empty_gradients(
        k, v, decay, bonus, codes, kept, dout, dmaximum, dnumerator, ddenominator
    )
    ddecay, dbonus = (torch.empty_like(to_maximum) for _ in range(2))  # of each batch row
    gradients = dk, dv, ddecay, dbonus, to_maximum, to_numerator, to_denominator
    inputs = contiguous(k, v, decay, bonus, codes, kept, dout, dmaximum, dnumerator, ddenominator)
    given = [x is not None for x in (decay, bonus, codes)]

    def launch(sizes: dict[str, int]) -> None:
        grid = *v.shape[:3:2], triton.cdiv(v.shape[3], sizes["block"])
        scratch = kept.new_empty(math.prod(grid) * 3 * CHUNK * sizes["block"])
        flags = *given, k.shape[3] != v.shape[3], CHUNK, sizes["block"]
        backward_kernel[grid](*inputs, scratch, *gradients, *_numbers(k, v), *flags, num_warps=sizes["num_warps"])

    with torch.cuda.device_of(v):
        launch(_sizes("backward", k, v, launch))
    return dk, dv, ddecay.sum(0), dbonus.sum(0), to_maximum, to_numerator, to_denominator


forward = differentiable(
    "softmax_scan_triton", _forward, _backward, empty_outputs, empty_gradients, "out maximum numerator denominator kept"
)
