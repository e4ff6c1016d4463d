"""The commands and the snippet of a card: what a reader types to use the model or to make it again."""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from .view import View

__all__ = ["convert_command", "eval_command", "import_command", "snippet_code", "train_command"]

_OPTIONS = ("student", "keep", "state-budget", "tokens", "seq-len")
PROMPT = "What is the capital of France?"


def snippet_code(prompt: str = PROMPT, *, chat: bool, max_new_tokens: int = 48) -> str:
    """The Python of the section "Use", which `rnnzoo eval` runs in the model's folder."""
    ask = (
        f'messages = [{{"role": "user", "content": {json.dumps(prompt)}}}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)\n"
        if chat
        else f'inputs = tokenizer({json.dumps(prompt)}, return_tensors="pt")\n'
    )
    return (
        "import rnnzoo  # registers the architecture\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        'folder = "."  # this folder, or its id on the Hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        f"{ask}"
        f"output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n'
    )


def convert_command(view: View) -> str:
    """With the values that the run had, the recipe's own or the user's."""
    words = ["rnnzoo", "convert", _teacher_word(view), "--recipe", view.recipe.get("name") or "RECIPE"]
    try:
        recipe = yaml.safe_load(view.recipe.get("yaml") or "")
    except yaml.YAMLError:
        recipe = None
    settings = recipe if isinstance(recipe, dict) else {}
    options: dict[str, Any] = {option: settings.get(option.replace("-", "_")) for option in _OPTIONS}
    options |= {"seed": view.conversion.get("seed"), "dtype": view.model.get("dtype")}
    if view.teacher.get("kind") == "hub":
        options["revision"] = view.teacher.get("sha")
    for option, value in options.items():
        words += [] if value is None else [f"--{option}", str(value)]
    return shlex.join([*words, "--out", view.name])


def train_command(view: View) -> str:
    """With the settings of a training from scratch."""
    words = ["rnnzoo", "train", "--config", f"{view.name}/config.json"]
    own = view.training.get("settings") or {}
    known = ("context", "batch_size", "accumulate", "tokens", "steps", "learning_rate", "eval_fraction", "seed")
    for name in (*known, "dtype"):
        words += [] if own.get(name) is None else [f"--{name.replace('_', '-')}", str(own[name])]
    return shlex.join([*words, "--out", "again"])


def eval_command(view: View) -> str:
    against = ["--against", _teacher_word(view)] if view.kind == "converted" else []
    return shlex.join(["rnnzoo", "eval", view.name, *against])


def import_command(view: View) -> str:
    origin = view.origin
    words = ["rnnzoo", "import", str(origin.get("source")), "--as", str(view.model.get("architecture"))]
    words += ["--format", str(origin["format"])] if origin.get("format") else []
    words += ["--revision", str(origin["sha"])] if origin.get("kind") == "hub" and origin.get("sha") else []
    return shlex.join([*words, "--out", view.name])


def _teacher_word(view: View) -> str:
    embedded = view.teacher.get("kind") == "embedded"
    return "embedded" if embedded else view.teacher_id or view.teacher_name
