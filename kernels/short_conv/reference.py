"""The equation of `short_conv` as a loop over time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..steps import Documents, one_step


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
    if mask is not None:
        x = torch.where(mask[..., None], x, 0.0)  # whatever stands there, even nan
    weight = weight.to(x.dtype)
    state = x.new_zeros(batch, channels, weight.shape[1] - 1) if initial_state is None else initial_state.to(x.dtype)
    documents = Documents(batch, seq_ids, mask, x.device)
    outputs = []
    for t in range(time):
        valid, begins = documents.step(t)
        taps = torch.cat([torch.where(begins[:, None, None], 0.0, state), x[:, t, :, None]], dim=-1)
        y = (taps * weight).sum(-1)
        if bias is not None:
            y = y + bias.to(x.dtype)
        y = F.silu(y) if activation == "silu" else y
        outputs.append(torch.where(valid[:, None], y, 0.0))
        state = torch.where(valid[:, None, None], taps[..., 1:], state)
    return torch.stack(outputs, dim=1), state


short_conv_step = one_step(short_conv, "x")
