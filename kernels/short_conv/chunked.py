"""Short causal convolution: a grouped convolution of the sequence, or W shifted products where it is packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..steps import document_starts, take, valid_first


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
    taps = weight.shape[1]
    weight = weight.to(x.dtype)
    keep = back = None
    if mask is not None and not bool(mask.all()):
        order, back = valid_first(mask)
        keep = mask.gather(1, order)
        x = torch.where(keep[..., None], take(x, order), 0.0)  # whatever stood there, even nan
        seq_ids = None if seq_ids is None else seq_ids.gather(1, order)
    past = x.new_zeros(batch, channels, taps - 1) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([past.transpose(1, 2), x], dim=1)  # (B, W-1+T, D): step t sees rows t .. t+W-1
    document = None
    if seq_ids is not None:
        document = F.pad(document_starts(seq_ids, keep).cumsum(dim=1), (taps - 1, 0))
    if time == 1:
        y = (inputs * weight.t()).sum(dim=1, keepdim=True)
    elif document is None:
        y = F.conv1d(inputs.transpose(1, 2), weight[:, None], groups=channels).transpose(1, 2)
    else:
        y = x * weight[:, -1]
        for tap in range(taps - 1):
            same = document[:, tap : tap + time] == document[:, taps - 1 :]
            y = y + torch.where(same[..., None], inputs[:, tap : tap + time], 0.0) * weight[:, tap]
    y = y if bias is None else y + bias.to(x.dtype)
    y = F.silu(y) if activation == "silu" else y

    if keep is None or back is None:
        rows = torch.arange(time, time + taps - 1, device=x.device).expand(batch, -1)
    else:
        y = take(torch.where(keep[..., None], y, 0.0), back)
        rows = keep.sum(dim=1, keepdim=True) + torch.arange(taps - 1, device=x.device)
    state = take(inputs, rows)
    if document is not None and taps > 1:
        own = document.gather(1, rows)
        state = torch.where((own == own[:, -1:])[..., None], state, 0.0)
    return y, state.transpose(1, 2)


@torch.no_grad()
def short_conv_step(*, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None) -> Tensor:
    """See `kernels.short_conv.short_conv_step`."""
    taps = torch.cat([state, x[..., None]], dim=-1)
    y = (taps * weight.to(x.dtype)).sum(dim=-1)
    y = y if bias is None else y + bias.to(x.dtype)
    state.copy_(taps[..., 1:])
    return F.silu(y) if activation == "silu" else y
