"""What generate() of transformers has to be told about recurrent models."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.generation import GenerationMixin

from ...kernels.errors import RnnzooError, ShapeError
from .cache import CACHE_NAME, RecurrentCache
from .decoding import replaying

__all__ = ["RecurrentGenerationMixin"]


class RecurrentGenerationMixin(GenerationMixin):
    """generate() with a `RecurrentCache`."""

    def generate(self, *args, **kwargs):
        """As in transformers; on a CPU, tokens after the second are replayed (`decoding.py`)."""
        with replaying(self):
            return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """As in transformers; and of `prefix_mask`, which is given for the prompt, each call gets its own columns."""
        # generate() looks for inputs_embeds in the signature; the cache goes by a name that depends on the version.
        kwargs |= {"next_sequence_length": next_sequence_length, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if next_sequence_length == 1 and not kwargs.get("is_first_iteration"):
            inputs.pop("attention_mask", None)  # what generate() has added is a token: there is nothing to look up
        cache = inputs.get(CACHE_NAME)
        start = 0 if cache is None else cache.get_seq_length()
        if prefix_mask is not None and start < prefix_mask.shape[1]:
            given = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            columns = prefix_mask[:, start : start + given.shape[1]]
            inputs["prefix_mask"] = nn.functional.pad(columns, (0, given.shape[1] - columns.shape[1]))
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict, mode, batch_size: int, *args
    ) -> None:
        """generate() would make a cache by the class's name; ours is always a RecurrentCache under one name."""
        if batch_size == 0:
            raise ShapeError("generate was given no prompt (a batch of 0 rows); expected at least one.")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise RnnzooError(
                f"cache_implementation='{generation_config.cache_implementation}' does not apply: recurrent models "
                "have a cache of their own, of constant size. Leave the argument out."
            )
        names = ("cache", "past_key_values", "cache_params")
        given = [cache for cache in (model_kwargs.pop(name, None) for name in names) if cache is not None]
        if given:
            model_kwargs[CACHE_NAME] = given[0]
            given[0]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = RecurrentCache(self.config)
            if generation_config.is_assistant:
                model_kwargs[CACHE_NAME].activate_past_recording()
