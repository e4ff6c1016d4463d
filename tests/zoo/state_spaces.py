"""A model of state-space layers as a plain loop over dense complex matrices, without any of our kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Continuous = Callable[[torch.nn.Module], tuple[Tensor, Tensor, Tensor]]
"""mixer -> A (D, N, N), B (D, N), C (D, M, N), complex: both halves of all pairs of conjugates."""


def both_halves(x: Tensor) -> Tensor:
    """(..., N/2, 2) real and imaginary parts -> (..., N)."""
    x = torch.complex(x[..., 0], x[..., 1])
    return torch.cat([x, x.conj()], -1)


def eigenvalues(mixer: torch.nn.Module) -> Tensor:
    """(D, N, N), diagonal."""
    return torch.diag_embed(both_halves(torch.stack([-mixer.log_A_real.exp(), mixer.A_imag], -1)))


def bilinear(a: Tensor, b: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the trapezoid rule: (1 - dt/2 A)^-1 (1 + dt/2 A), (1 - dt/2 A)^-1 dt B."""
    one = torch.eye(a.shape[-1], dtype=a.dtype)
    inverse = torch.linalg.inv(one - dt[:, None, None] / 2 * a)
    return inverse @ (one + dt[:, None, None] / 2 * a), (inverse @ (dt[:, None] * b)[..., None])[..., 0]


def zero_order_hold(a: Tensor, b: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """exp(dt A), A^-1 (exp(dt A) - 1) B."""
    factor = torch.matrix_exp(dt[:, None, None] * a)
    one = torch.eye(a.shape[-1], dtype=a.dtype)
    return factor, (torch.linalg.inv(a) @ (factor - one) @ b[..., None])[..., 0]


def plain_mixer(mixer: torch.nn.Module, continuous: Continuous, discretize, u: Tensor) -> Tensor:
    """The layer's output for u (B, T, D)."""
    a, b, c = continuous(mixer)
    a, b = discretize(a, b, mixer.log_dt.exp())
    h, outputs = torch.zeros(len(u), *b.shape, dtype=b.dtype), []
    skip = mixer.D.view(u.shape[-1], -1)
    for u_t in u.unbind(1):
        h = torch.einsum("dnm,bdm->bdn", a, h) + b * u_t[..., None]
        outputs.append(torch.einsum("dmn,bdn->bdm", c, h).real + skip * u_t[..., None])
    y = torch.nn.functional.gelu(torch.stack(outputs, 1)).flatten(2) @ mixer.out_proj.weight.T + mixer.out_proj.bias
    if not mixer.glu:
        return y
    value, gate = y.chunk(2, -1)
    return value / (1 + (-gate).exp())


@torch.no_grad()
def plain_logits(model, ids: Tensor, continuous: Continuous, discretize=bilinear) -> Tensor:
    """Logits (B, T, V) of a model without MLPs."""

    def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * module.weight

    hidden = model.model.embed_tokens.weight[ids]
    for block in model.model.layers:
        hidden = hidden + plain_mixer(block.mixer, continuous, discretize, norm(hidden, block.input_layernorm))
    return norm(hidden, model.model.norm) @ model.lm_head.weight.T


def random_model(classes, **fields):
    """A model in float64 whose parameters are all off their starts, and ids (2, 75)."""
    config_type, model_type = classes
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 0}
    model = model_type(config_type(**sizes, initializer_range=0.3, **fields)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randint(0, 61, (2, 75))
