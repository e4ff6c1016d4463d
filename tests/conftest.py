"""For all tests: without a GPU, Triton kernels run in Triton's interpreter, which must be said before it is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
