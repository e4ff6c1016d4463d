"""Teacher and student spread over devices by FSDP2, where `accelerate launch` is configured so (fsdp_version 2).

accelerate shards the student: its blocks, within them its mixers (which alignment calls by themselves), and the rest.
The teacher's blocks are sharded here, by the same settings; its embeddings and head are whole on every device.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["gathers", "is_sharded", "shard_frozen", "units", "whole_model"]


def units(student: Any) -> list[str]:
    """Classes of modules that are gathered by themselves."""
    mixers = (type(block.mixer).__name__ for block in student.model.layers.children())
    return list(dict.fromkeys(["RecurrentBlock", *mixers]))


def shard_frozen(teacher_model: Any, plugin: Any, device: torch.device) -> Any:
    """Spreads the blocks of a frozen teacher over the processes, in place.

    Args:
        plugin: accelerate's settings of FSDP. device: of this process.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for block in teacher_model.model.layers:
        if not isinstance(block, FSDPModule):
            fully_shard(block, reshard_after_forward=True, offload_policy=plugin.cpu_offload)
    for name, module in [*teacher_model.model.named_children(), ("lm_head", teacher_model.lm_head)]:
        if name != "layers":
            module.to(device)
    return teacher_model


def gathers(module: Any, method: str) -> Any:
    """`method` of a module, which gathers the module's weights first if they are spread, as its forward does."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if method not in vars(module):  # where it is not wrapped yet
        register_fsdp_forward_method(module, method)
    return getattr(module, method)


def is_sharded(model: Any) -> bool:
    """Whether some of its parameters are spread over processes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_model(student: Any) -> Any:
    """The same model whole in the memory of each process, if it was sharded; all have to call this together."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not is_sharded(student):
        return student
    plain: type = next(cls for cls in type(student).__mro__ if not issubclass(cls, FSDPModule))
    tensors = {}
    for name, tensor in student.state_dict().items():
        tensors[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()
    found = plain(student.config)
    found.load_state_dict(tensors)
    found.tie_weights()
    return found.eval()
