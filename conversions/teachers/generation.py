"""How a teacher generates, for its student to do the same: end tokens, sampling, penalties, what ends a turn of a chat.

transformers keeps this in generation_config.json, or, of older models, in config.json; and the token that ends an
answer is often known to the chat template alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...kernels.errors import RnnzooError

__all__ = ["generation_settings", "turn_ends"]

# Of the teacher's cache and of the file itself; the student has a cache of its own.
NOT_CARRIED = ("cache_implementation", "cache_config", "compile_config", "transformers_version", "_from_model_config")
ANSWER = "answer"


def generation_settings(folder: Path, config: Any, tokenizer: Any) -> dict[str, Any]:
    """What the student's generation_config.json says: the teacher's settings, with every token that ends an answer.

    Args:
        folder: of the teacher's files. config: the teacher's.
    Raises:
        RnnzooError: the teacher's file is damaged.
    """
    import transformers

    found = _read(folder / "generation_config.json")
    if found is None:  # transformers' configuration classes forget what config.json says of generation
        older = _read(folder / "config.json") or config.to_dict()
        found = transformers.GenerationConfig.from_model_config(older).to_diff_dict()
    settings = {name: value for name, value in found.items() if name not in NOT_CARRIED}
    own = settings.get("eos_token_id", config.eos_token_id)
    ends = [*(own if isinstance(own, list) else [own]), *turn_ends(tokenizer)]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    if not ends and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if settings.get("pad_token_id") is None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    return settings | {"transformers_version": transformers.__version__}


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RnnzooError(f"{file} is not readable JSON ({error}); download the model again.") from error


def turn_ends(tokenizer: Any) -> Iterable[int]:
    """The tokens that end an answer in a chat: the tokenizer's own end, and what the template writes behind a turn."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    try:
        _, answer, after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(ANSWER)
    except Exception:  # a template may refuse any chat, in errors of its own
        return ends
    added = tokenizer.added_tokens_decoder
    written = tokenizer(after, add_special_tokens=False)["input_ids"] if answer else []
    return ends + [token for token in written if token in added][:1]
