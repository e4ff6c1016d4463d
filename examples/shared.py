"""What the examples have in common: a command line, a model, and a little knowledge to teach it.

Without MODEL it is a tiny model of random weights with one token for each byte, made on the spot.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

import rnnzoo  # noqa: F401  (adds its model types to the Auto classes)
from rnnzoo.conversions.byte_tokenizer import byte_tokenizer

HOMES = dict(fox="den", bird="nest", bee="hive", bear="cave", spider="web", horse="stable", ant="hill", owl="barn")
TEXTS = [f"The {animal} lives in a {home}." for animal, home in HOMES.items()]
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def arguments(description: str | None, steps: int) -> argparse.Namespace:
    """MODEL (a folder or a Hub id), --steps and --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or Hub id; default: a tiny new model")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--out", help="where to save; default: a temporary folder")
    args = parser.parse_args()
    args.out = args.out or tempfile.mkdtemp(prefix="rnnzoo-example-")
    return args


def load(model: str | None, layer_types: tuple[str, ...] = ("mamba2", "mamba2")):
    """The model, in float32, and its tokenizer, with a chat template."""
    set_seed(0)
    if model is not None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = tokenizer.chat_template or CHAT
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    sizes = dict(vocab_size=258, hidden_size=64, num_hidden_layers=len(layer_types), layer_types=list(layer_types))
    other = dict(bos_token_id=256, eos_token_id=256, pad_token_id=257)
    other["initializer_range"] = 0.1  # an adapter cannot say much through a frozen head of smaller weights
    config = AutoConfig.for_model(f"rnnzoo-{layer_types[0]}", **sizes, **other)
    return AutoModelForCausalLM.from_config(config), tokenizer


def complete(model, tokenizer, prompt: str) -> str:
    """What the model makes of a prompt, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
