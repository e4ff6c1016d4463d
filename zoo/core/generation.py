"""What generate() of transformers has to be told about recurrent models."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.generation import GenerationMixin

from ...kernels.errors import RnnzooError
from .cache import RecurrentCache

__all__ = ["RecurrentGenerationMixin"]


class RecurrentGenerationMixin(GenerationMixin):
    """generate() with a `RecurrentCache`."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: RecurrentCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        prefix_mask: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """As in transformers; and of `prefix_mask`, which is given for the prompt, each call gets its own columns."""
        own = (input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, is_first_iteration)
        inputs = super().prepare_inputs_for_generation(*own, **kwargs)
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        if prefix_mask is not None and start < prefix_mask.shape[1]:
            given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            columns = prefix_mask[:, start : start + given.shape[1]]
            inputs["prefix_mask"] = nn.functional.pad(columns, (0, given.shape[1] - columns.shape[1]))
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """generate() would make a cache by the class's name; ours is always a RecurrentCache under one name."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise RnnzooError(
                f"cache_implementation='{generation_config.cache_implementation}' does not apply: recurrent models "
                "have a cache of their own, of constant size. Leave the argument out."
            )
        given = model_kwargs.pop("cache_params", None)
        if model_kwargs.get("past_key_values") is None and given is not None:
            model_kwargs["past_key_values"] = given
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RecurrentCache(self.config)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
