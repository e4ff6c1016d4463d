"""rnnzoo: recurrent language models on Hugging Face, and the way from a Transformer to one."""

from __future__ import annotations

__version__ = "0.1.0"
