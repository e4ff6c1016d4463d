"""The teacher's tokenizer: a fast one, with its chat template and with a pad token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...kernels.errors import RnnzooError

__all__ = ["folder_tokenizer", "gguf_tokenizer"]

PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


def folder_tokenizer(path: str | Path, config: Any, **download: Any) -> Any:
    """The tokenizer of a folder or a Hub id.

    Raises:
        RnnzooError: there is none, it is not a fast one, or it has more tokens than the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **download)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise RnnzooError(f"{path} has no readable tokenizer (tokenizer.json): {first_line(error)}") from error
    return _finished(tokenizer, config, str(path))


def gguf_tokenizer(path: Path, config: Any) -> Any:
    """The tokenizer inside a GGUF file.

    Raises:
        RnnzooError: the file has none, or one of an unknown kind.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
        splitting = read_gguf_metadata(str(path))[0].get("tokenizer.ggml.pre")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RnnzooError(f"{path} has no tokenizer that can be read: {first_line(error)}") from error
    if splitting == "smollm":
        # transformers leaves out that this vocabulary sees every digit alone.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return _finished(tokenizer, config, str(path))


def _finished(tokenizer: Any, config: Any, source: str) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        raise RnnzooError(f"{source} has a slow tokenizer only; save it once as tokenizer.json.")
    if len(tokenizer) > config.vocab_size:
        raise RnnzooError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens but the model embeds {config.vocab_size}; "
            "they do not belong together."
        )
    tokenizer.model_max_length = config.max_position_embeddings
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        pad = next((name for name in PAD_NAMES if name in vocabulary), tokenizer.eos_token)
        if pad is None:
            raise RnnzooError(f"{source}: the tokenizer has neither a pad token nor an end-of-text token; set one.")
        tokenizer.pad_token = pad
    return tokenizer


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
