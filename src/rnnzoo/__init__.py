"""rnnzoo: recurrent language models on Hugging Face, and the way from a Transformer to one.

    import rnnzoo                                                  # adds its model types to the Auto classes
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("my-converted-model")

The environment variable RNNZOO_NO_REGISTER=1 leaves the Auto classes alone (and the import without transformers);
`rnnzoo.zoo.register_auto_classes()` does it later.
"""

from __future__ import annotations

import os

__all__ = ["__version__"]

__version__ = "0.1.0"

if os.environ.get("RNNZOO_NO_REGISTER", "0") in ("", "0"):
    from .zoo import register_auto_classes

    register_auto_classes()
