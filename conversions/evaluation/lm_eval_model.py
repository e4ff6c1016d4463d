"""The model `rnnzoo` of lm-eval: importing this module puts it into lm-eval's registry.

lm-eval has no entry points for models of other packages, so something must import this before its command line looks
the name up: `python -m rnnzoo.lm_eval` is that command line, with this import before it. In Python:

    import rnnzoo.conversions.evaluation.lm_eval_model
    lm_eval.simple_evaluate(model="rnnzoo", model_args={"pretrained": "my-model"}, tasks=["piqa"])
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ...zoo import register_auto_classes
from ..precision import mixed_precision

__all__ = ["RnnzooLM"]


@register_model("rnnzoo")
class RnnzooLM(HFLM):
    """lm-eval's Hugging Face model, which knows the architectures of the zoo.

    Args:
        pretrained: a folder, a Hub id, or a loaded causal language model (then with `tokenizer`).
        options: those of lm-eval's `hf`: batch_size, dtype, device, peft, max_length, ... Remote code is not run unless
            trust_remote_code=True. `max_length` is in tokens and by default the config's max_position_embeddings, that
            of the teacher, so that both read the same; a model without attention layers may be given more.
    """

    AUTO_MODEL_CLASS: Any = None

    def __init__(self, pretrained: Any, **options: Any) -> None:
        register_auto_classes()
        options.setdefault("backend", "causal")
        super().__init__(pretrained=pretrained, **options)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits (batch, time, vocab) of right-padded rows. What stands behind a row's end changes nothing before it,
        so no mask is needed; and no state is kept, because nothing goes on from here."""
        with torch.no_grad(), mixed_precision(self.device, self.mixed_precision_dtype):
            return self.model(inps, use_cache=False).logits
