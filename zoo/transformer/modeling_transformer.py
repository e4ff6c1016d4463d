"""The Llama-style Transformer, the baseline that recurrent architectures are measured against.

    q, k, v = rotate(norm(x W_q)), rotate(norm(x W_k)), x W_v        the norms of q and k only with `qk_norm`
    o_t     = sum_{j <= t} softmax_j(q_t k_j / sqrt(d)) v_j           per head; groups of heads share k and v
    out     = o W_o

It remembers every key and value of the document, so its memory grows with the text and nothing is ever forgotten; all
other architectures of the zoo keep a state of constant size instead.

Sources: Vaswani et al. 2017, "Attention is all you need", equation 1; Touvron et al. 2023, "LLaMA", section 2.2;
Su et al. 2021 (rotation); Ainslie et al. 2023 (grouped heads).
"""

from __future__ import annotations

from ..core.attention import FullAttention
from ..core.heads import model_classes
from ..core.registry import register_mixer
from .configuration_transformer import TransformerConfig


@register_mixer("transformer")
class TransformerMixer(FullAttention):
    """The core's attention under the name of its architecture."""

    paper = "Touvron et al. 2023, arXiv 2302.13971"


TransformerModel, TransformerForCausalLM, TransformerForSequenceClassification = model_classes(TransformerConfig)
