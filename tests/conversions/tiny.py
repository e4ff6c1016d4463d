"""Tiny random teachers of every family, with a byte-level tokenizer built in code: no network, 0.1 s each.

from .tiny import tiny_teacher, tiny_tokenizer      # relative: pytest runs in importlib mode
folder = tiny_teacher("llama", tmp_path)        # loads with AutoModelForCausalLM and AutoTokenizer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "TINY_FAMILIES", "tiny_config", "tiny_model", "tiny_teacher", "tiny_tokenizer"]

TINY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("the", "and", "of", "to", "in", "is", "that", "it", "on", "for", "was", "with", "th", "an", "er", "ing", "ed")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt_neox": "GPTNeoX"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: 3 special tokens (ids 0-2), 256 bytes, a few merges: 310 tokens; any text round-trips."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in (*WORDS, *("Ġ" + word for word in WORDS)):
        built = word[0]
        for letter in word[1:]:
            if (built, letter) not in merges:
                merges.append((built, letter))
            built += letter
            vocabulary.setdefault(built, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """Width 48, 2 layers, 6 heads of 8 (2 kv heads where the family groups queries), vocabulary 320, 512 positions."""
    settings: dict[str, Any] = dict(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=512,
        initializer_range=0.2,  # far from uniform predictions, so that differences show
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=family in ("llama", "qwen3"),
    )
    if family != "gpt_neox":
        settings.update(num_key_value_heads=2, head_dim=8)
    if family == "mistral":
        settings.update(sliding_window=None)
    return getattr(transformers, NAMES[family] + "Config")(**(settings | changes))


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random model; biases and norms are random too, so that an adapter that forgets one is found out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, NAMES[family] + "ForCausalLM")(tiny_config(family, **changes))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    return model.eval()


def tiny_teacher(family: str, tmp_path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Saves a tiny teacher with its tokenizer; returns the folder `tmp_path`/tiny-<family>.

    Args:
        family: one of TINY_FAMILIES. changes: settings of its config that differ from `tiny_config`.
    """
    folder = Path(tmp_path) / f"tiny-{family}"
    tiny_model(family, seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
