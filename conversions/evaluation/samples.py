"""Real outputs for the card: greedy answers to a few fixed prompts, and what the card's own example prints."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROMPTS", "run_example", "sample"]

log = logging.getLogger(__name__)

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 64,
) -> list[dict[str, str]]:
    """Greedy continuations, as chat answers where the tokenizer has a chat template: [{prompt, output}]."""
    results = []
    for prompt in prompts:
        text, special = prompt, True
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            text, special = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), False
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=special, return_token_type_ids=False)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
        answer = output[0, inputs["input_ids"].shape[1] :]
        results.append({"prompt": prompt, "output": tokenizer.decode(answer, skip_special_tokens=True).strip()})
    return results


def run_example(folder: Path, code: str) -> dict[str, str]:
    """Runs the example of a card in the model's folder, as a reader would: {code, output}.

    An example that fails is logged and has no output: the card then says that it was not run.
    """
    printed = io.StringIO()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed), torch.random.fork_rng():
            exec(compile(code, "<example of the card>", "exec"), {"__name__": "__main__"})
    except Exception as error:  # anything that the model's code or the tokenizer may raise
        log.warning("The example of the card does not run: %s: %s", type(error).__name__, error)
        return {"code": code}
    return {"code": code, "output": printed.getvalue()}
