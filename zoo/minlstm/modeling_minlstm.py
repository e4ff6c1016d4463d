"""minLSTM: an LSTM without state in its gates, without output gate, and with gates that sum to 1.

    f_t, i_t = sigmoid(W_f u_t), sigmoid(W_i u_t)                                  section 3.2
    f'_t = f_t / (f_t + i_t),  i'_t = i_t / (f_t + i_t)                            scale independent of time
    h_t = f'_t * h_{t-1} + i'_t * c_t                                              h_0 = 0; c as in minGRU

Division by the sum makes h an average of the candidates, whatever the length. In logarithms the normalised gates are
log f' = -softplus(d), log i' = -softplus(-d) with d = softplus(-W_f u) - softplus(-W_i u) (appendix B.2), that is
f' = sigmoid(-d), i' = sigmoid(d): no division, exact where both gates are nearly shut. Convolution, candidate and
output are minGRU's.

Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.2, appendix B.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import initialization as init

from ..core.heads import model_classes
from ..core.registry import register_mixer
from ..mingru.modeling_mingru import MinRNNMixer
from .configuration_minlstm import MinLSTMConfig


@register_mixer("minlstm")
class MinLSTMMixer(MinRNNMixer):
    """The equations at the head of this file. Rows of in_proj: W_f, W_i, then those of the candidate."""

    gates = 2

    def init_weights(self) -> None:
        super().init_weights()
        if self.in_proj.bias is not None and self.config.minlstm_forget_bias:
            bias = torch.zeros_like(self.in_proj.bias)
            bias[: self.inner] = self.config.minlstm_forget_bias
            init.copy_(self.in_proj.bias, bias)

    def factors(self, *logits: Tensor) -> tuple[Tensor, Tensor]:
        forget, write = logits
        difference = F.softplus(-forget) - F.softplus(-write)
        return torch.sigmoid(-difference), torch.sigmoid(difference)


MinLSTMModel, MinLSTMForCausalLM, MinLSTMForSequenceClassification = model_classes(MinLSTMConfig)
