"""`rnnzoo` with accelerate's FSDP on CPUs, which accelerate leaves to accelerators; started by torchrun in tests.

torch's fully_shard works over gloo. accelerate turns to it only for kinds of devices that are no CPUs, so here it is
told that these are of such a kind.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from rnnzoo import cli
from rnnzoo.conversions import sharding


def told(student: Any, whole: Any = sharding.whole_model) -> Any:
    """Says for the test what was sharded: modules of the student, and the share of its parameters held here."""
    units = sum(type(module).__name__.startswith("FSDP") for module in student.modules())
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in student.parameters())
    share = held / sum(p.numel() for p in student.parameters())
    print(f"units {units}, share {share:.2f}", file=sys.stderr)
    return whole(student)


def several_devices(self: Any, *_: Any) -> tuple[str, DistributedType]:
    self.device = torch.device("cpu")
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    setattr(PartialState, "_prepare_backend", several_devices)  # noqa: B010  (it has another signature)
    setattr(PartialState, "set_device", lambda self: None)  # noqa: B010
    sharding.whole_model = told
    sys.exit(cli._run(sys.argv[1:]))
