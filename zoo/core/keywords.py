"""Keyword arguments of a call that no model has a parameter for: known ones that ask for nothing, and mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from ...kernels.errors import RnnzooError

__all__ = ["check_keywords"]

# What Trainer, TRL, PEFT, generate, tokenizers and collators pass, and what changes nothing here: outputs have a fixed
# form, positions and lengths are counted, no kernel of attention is told about documents, and the loss has its own.
KNOWN = frozenset(
    {
        *("return_dict", "output_attentions", "output_router_logits", "num_items_in_batch", "shift_labels"),
        *("ignore_index", "logits_to_keep", "num_logits_to_keep", "return_loss", "skip_logits"),
        *("return_token_accuracy", "token_type_ids", "mm_token_type_ids", "cache_position", "head_mask"),
        *("cu_seq_lens_k", "max_length_q", "max_length_k", "max_seqlen", "seq_lengths"),
        *(
            "completion_mask",
            "assistant_masks",
            "task_ids",
            "adapter_names",
            "is_first_iteration",
            "next_sequence_length",
        ),
    }
)
# Names of other libraries for what has another one here.
ELSEWHERE = {"state": "cache", "states": "cache", "rnn_state": "cache", "document_ids": "seq_ids", "doc_ids": "seq_ids"}
ELSEWHERE |= {"sequence_ids": "seq_ids", "input_embeds": "inputs_embeds", "mask": "attention_mask"}


def check_keywords(given: dict[str, Any], parameters: Iterable[str]) -> None:
    """Raises an RnnzooError for an argument that would be ignored although it asks for something.

    Args:
        given: what is left over, by name. None asks for nothing. parameters: those that there are, for a suggestion.
    """
    for name, value in given.items():
        if value is None or name in KNOWN:
            continue
        nearest = difflib.get_close_matches(name, list(parameters), 1)
        meant = ELSEWHERE.get(name, nearest[0] if nearest else None)
        advice = f"did you mean {meant}?" if meant else "leave it out."
        raise RnnzooError(f"{name} is no argument of this model and would be ignored; {advice}")
