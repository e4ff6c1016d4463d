"""What the layers of a teacher see and what the loss asks of them, on one sequence of text.

T tokens, H query heads, Hk kv heads, d head_dim, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...zoo.core.heads import RecurrentForCausalLM

__all__ = ["Observed", "observe", "sample_rows", "token_weights"]

ROWS = 384


@dataclass
class Observed:
    """What one attention layer saw: q (T, H, d) and k, v (T, Hk, d) before rotation, gradient at the layer's output.

    hidden: (T, D), of which it made them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    turned_q: Tensor
    turned_k: Tensor
    gradient: Tensor
    output_weight: Tensor
    hidden: Tensor | None = None


def observe(teacher_model: RecurrentForCausalLM, ids: Tensor, with_gradient: bool, seed: int) -> list[Observed]:
    """Runs the teacher over ids (T,); the gradient is of the loss on labels drawn from its own predictions."""
    inputs, outputs = _run(teacher_model, ids, None, with_gradient, seed)
    ctx = teacher_model.model.make_context(1, len(ids), ids.device)
    layers = []
    with torch.no_grad():
        for block, hidden, output in zip(teacher_model.model.layers, inputs, outputs, strict=True):
            q, k, v = block.mixer.proj.split(hidden)
            turned_q, turned_k = (ctx.rotary.rotate(x, ctx.positions) for x in (q, k))
            gradient = output.grad[0].float() if output.grad is not None else torch.ones_like(output[0]).float()
            heads = [x[0].float() for x in (q, k, v, turned_q, turned_k)]
            layers.append(Observed(*heads, gradient, block.mixer.proj.o_proj.weight.float(), hidden[0].float()))
    return layers


def token_weights(teacher_model: RecurrentForCausalLM, ids: Tensor, seq_ids: Tensor | None, seed: int) -> Tensor:
    """(layers, T): the mean squared gradient, as in `observe`, at each token of each layer's attention output.

    Args:
        ids: (T,). seq_ids: (T,), None where the row is one document.
    """
    _, outputs = _run(teacher_model, ids, seq_ids, True, seed)
    return torch.stack([output.grad[0].float().square().mean(-1) for output in outputs if output.grad is not None])


def _run(
    teacher_model: RecurrentForCausalLM, ids: Tensor, seq_ids: Tensor | None, with_gradient: bool, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs (1, T, D) of every attention layer; the outputs hold their gradients."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = []
    for block in teacher_model.model.layers:
        hooks.append(block.mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())))
        hooks.append(block.mixer.proj.o_proj.register_forward_hook(lambda _, args, out: _keep(out, outputs)))
    try:
        embedded = teacher_model.model.embed_tokens(ids[None]).detach().requires_grad_(with_gradient)
        documents = None if seq_ids is None else seq_ids[None]
        with torch.set_grad_enabled(with_gradient):
            hidden = teacher_model.model(inputs_embeds=embedded, seq_ids=documents, use_cache=False).last_hidden_state
            if with_gradient:
                hidden.backward(_sampled_gradient(teacher_model, hidden.detach()[0], seed)[None])
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, outputs


def _keep(output: Tensor, outputs: list[Tensor]) -> None:
    if output.requires_grad:
        output.retain_grad()
    outputs.append(output)


@torch.no_grad()
def _sampled_gradient(teacher_model: RecurrentForCausalLM, hidden: Tensor, seed: int) -> Tensor:
    """Gradient at hidden (T, D) of the cross-entropy on labels drawn from the model: its square is the Fisher's."""
    generator = torch.Generator().manual_seed(seed)
    weight = teacher_model.lm_head.weight
    gradient = torch.empty_like(hidden)
    for rows in torch.arange(len(hidden)).split(256):
        p = torch.softmax((hidden[rows] @ weight.T).float(), -1)
        level = torch.rand(len(rows), 1, generator=generator)
        drawn = torch.searchsorted(p.cumsum(-1), level).clamp(max=p.shape[-1] - 1)
        gradient[rows] = p.scatter_add(1, drawn, -torch.ones_like(level)).to(weight.dtype) @ weight
    return gradient


def sample_rows(time: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = min(ROWS, time)
    return torch.randperm(time, generator=generator)[:count].sort().values
