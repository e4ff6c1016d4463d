"""For all tests: without a GPU, Triton kernels run in Triton's interpreter (to be said before Triton is imported)."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
