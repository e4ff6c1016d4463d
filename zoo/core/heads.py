"""Models with a head: language modelling and classification.

B batch, T tokens of the call, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from ...kernels.errors import RnnzooError
from ...kernels.losses import linear_cross_entropy
from .cache import CACHE_NAME, RecurrentCache
from .configuration import RecurrentConfig
from .generation import RecurrentGenerationMixin
from .model import RecurrentModel, RecurrentPreTrainedModel, first_given

__all__ = ["RecurrentForCausalLM", "RecurrentForSequenceClassification", "model_classes"]


class RecurrentForCausalLM(RecurrentPreTrainedModel, RecurrentGenerationMixin, GenerationMixin):
    """The decoder with a language-model head."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.model = RecurrentModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        seq_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        cache_params: RecurrentCache | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prefix_mask: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits and, with labels, the loss.

        Arguments as for `RecurrentModel.forward`, and:
            labels: (B, T), -100 where nothing is to be predicted; shifted inside.
            logits_to_keep: as in transformers: the last n positions, or indices.

        In training with labels and `config.fused_loss`, the loss is computed chunk by chunk and `logits` is None.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=first_given(cache, past_key_values, cache_params),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_ids=seq_ids,
            seq_idx=seq_idx,
            output_hidden_states=output_hidden_states,
            prefix_mask=prefix_mask,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None and self._may_fuse(logits_to_keep):
            loss = self._fused_loss(hidden, labels, **kwargs)
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
            if self.config.logit_cap is not None:
                logits = self.config.logit_cap * torch.tanh(logits / self.config.logit_cap)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: getattr(outputs, CACHE_NAME)}
        )

    def _may_fuse(self, logits_to_keep: int | Tensor) -> bool:
        # An adapter or a hook on the head (accelerate puts its own in place of `forward`), or a loss of the user's own,
        # must not be passed by.
        head = self.lm_head
        hooked = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
        plain_head = type(head) is nn.Linear and not hooked
        everything = isinstance(logits_to_keep, int) and logits_to_keep == 0 and self.config.logit_cap is None
        own_loss = getattr(self, "_loss_function", None) is not None
        return self.training and self.config.fused_loss and plain_head and everything and not own_loss

    def _fused_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            shift_labels.reshape(-1).to(hidden.device),
            bias=self.lm_head.bias,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


class RecurrentForSequenceClassification(RecurrentPreTrainedModel):
    """The decoder with a linear classifier on the last token of each row."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RecurrentModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Class logits (B, num_labels), and the loss for labels (B,) or (B, num_labels).

        Padding is told by `attention_mask`, or else by `config.pad_token_id` at the ends of a row; it may be on either
        side.

        Raises:
            RnnzooError: several rows and no way to tell padding.
        """
        token = self._tokens(input_ids, attention_mask)
        if attention_mask is None and token is not None and not bool(token.all()):
            attention_mask = token
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = self._last_token(hidden, token)
        pooled = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=pooled, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=pooled, hidden_states=outputs.hidden_states, **{CACHE_NAME: getattr(outputs, CACHE_NAME)}
        )

    def _tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """(B, T) bool: what is a token; None where it cannot be told."""
        if attention_mask is not None:
            return attention_mask.bool()
        pad = self.config.pad_token_id
        if input_ids is None or pad is None:
            return None
        other = input_ids != pad
        after_the_first = other.long().cumsum(1) > 0
        before_the_last = other.flip(1).long().cumsum(1).flip(1) > 0
        begin = (~after_the_first).sum(1)  # how many pad tokens each row begins with
        if pad == self.config.bos_token_id and bool(begin.any()):
            if not bool((begin == 1).all()):
                raise RnnzooError(
                    f"Rows begin with token {pad}, which is the pad token and the one that begins a text, too; pass an "
                    "attention_mask to tell padding from tokens."
                )
            after_the_first = torch.ones_like(other)
        return after_the_first & before_the_last

    def _last_token(self, hidden: Tensor, token: Tensor | None) -> Tensor | int:
        batch, time = hidden.shape[:2]
        if token is not None:
            return (torch.arange(time, device=hidden.device) * token[:, -time:].to(hidden.device)).argmax(-1)
        if batch == 1:
            return -1
        raise RnnzooError(
            "Classifying several rows needs an attention_mask, or config.pad_token_id with input_ids, to tell "
            "padding from tokens."
        )


def model_classes(
    config_class: type[RecurrentConfig],
) -> tuple[type[RecurrentModel], type[RecurrentForCausalLM], type[RecurrentForSequenceClassification]]:
    """The three models of an architecture, XModel, XForCausalLM and XForSequenceClassification for XConfig.

    They differ from the generic ones in name and configuration alone. To be assigned under these names in the module
    `modeling_<name>` beside the configuration's.
    """
    name = config_class.__name__.removesuffix("Config")
    module = config_class.__module__.replace("configuration_", "modeling_")

    def derive(base: type, suffix: str, what: str, *mixins: type) -> type:
        doc = f"{name}: {what}"
        return type(
            name + suffix, (base, *mixins), {"config_class": config_class, "__module__": module, "__doc__": doc}
        )

    return (
        derive(RecurrentModel, "Model", "the decoder without a head."),
        # transformers looks for GenerationMixin among the bases of the class itself.
        derive(RecurrentForCausalLM, "ForCausalLM", "the decoder with a language-model head.", GenerationMixin),
        derive(RecurrentForSequenceClassification, "ForSequenceClassification", "with a classifier on the last token."),
    )
