"""Griffin: Hawk's recurrent block (`zoo/hawk/modeling_hawk.py` has its equations) alternating with local attention.

    layers = recurrent, recurrent, local attention, recurrent, recurrent, local attention, ...

Local attention is the core's "sliding_attention", with one head of keys and values and rotation of half of each head's
channels. It copies exactly within its window, for which a state of fixed size is poor; the recurrence carries what is
older. RecurrentGemma is Griffin with Gemma's embeddings, scaled, and bounded logits; its checkpoints are imported as
Griffin.

Sources: De et al. 2024, "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
section 2; Botev et al. 2024, "RecurrentGemma: Moving Past Transformers for Efficient Open Language Models".
"""

from __future__ import annotations

from ..core.heads import model_classes
from ..core.registry import register_mixer
from ..hawk.modeling_hawk import HawkMixer
from .configuration_griffin import GriffinConfig


@register_mixer("griffin")
class GriffinMixer(HawkMixer):
    """Griffin's recurrent block: Hawk's."""


GriffinModel, GriffinForCausalLM, GriffinForSequenceClassification = model_classes(GriffinConfig)
