"""`rnnzoo generate DIR "prompt"`: one answer, streamed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..kernels.errors import RnnzooError
from .conversion_options import loading_options
from .output import Output, output_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@click.command("generate")
@click.argument("folder", metavar="DIR")
@click.argument("prompt")
@click.option(
    "--chat/--raw",
    "chat",
    default=None,
    help="Send PROMPT as a user message, or continue it as plain text. Default: chat if there is a chat template.",
)
@click.option("--system", help="A system message; with --chat only.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=0.7, show_default=True)
@click.option("--greedy", is_flag=True, help="Always take the most likely token; excludes --temperature.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for sampling.")
@loading_options
@output_options
def command(
    folder: str,
    prompt: str,
    chat: bool | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    greedy: bool,
    seed: int,
    output: Output,
    **source: Any,
) -> None:
    """Continue PROMPT with the model in DIR (a folder or a Hub id); a PROMPT of - is read from standard input."""
    if system is not None and chat is False:
        raise click.UsageError("--system needs a chat; it does not go with --raw.")
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise click.UsageError("The prompt is empty.")
    with output.only_result_on_stdout():
        model, tokenizer = load(folder, **source)
    chat = tokenizer.chat_template is not None if chat is None else chat
    if (chat or system is not None) and tokenizer.chat_template is None:
        raise RnnzooError(f"The tokenizer of {folder} has no chat template; leave out --chat and --system.")
    inputs = _encode(tokenizer, prompt, system, chat)

    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    streamer = None if output.as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    choice: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature}
    started = time.perf_counter()
    with torch.inference_mode():
        tokens = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, streamer=streamer, **choice)  # type: ignore[operator]
    seconds = time.perf_counter() - started
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    if output.as_json:
        value = {
            "prompt": prompt,
            "text": tokenizer.decode(answer, skip_special_tokens=True),
            "prompt_tokens": inputs["input_ids"].shape[1],
            "new_tokens": len(answer),
            "seconds": seconds,
        }
        output.result(value, lambda console: None)
    else:
        sys.stdout.flush()
        output.note(f"{len(answer)} tokens, {len(answer) / seconds:.1f} tokens/s")


def load(
    folder: str, *, dtype: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer, ours or any other, on the GPU where there is one.

    Code that comes with the model is run with `trust_remote_code` alone.
    """
    path = Path(folder)
    if path.exists() and not (path / "config.json").is_file():
        raise RnnzooError(
            f"{folder} holds no model: there is no config.json in it. Give the --out folder of `rnnzoo convert`."
        )
    if not path.exists() and (folder.startswith((".", "/", "~")) or folder.count("/") != 1):
        raise RnnzooError(f"There is no folder {folder}; give the --out folder of `rnnzoo convert`, or a Hub id.")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..conversions.teachers.files import foreign_code, hub_reachable, quiet_loading
    from ..zoo import register_auto_classes

    register_auto_classes()
    # Where the Hub is out of reach, only the cache is asked: a look-up would retry for half a minute.
    cached_only = not path.exists() and not hub_reachable()
    source: dict[str, Any] = {
        "revision": revision or "main",
        "local_files_only": cached_only,
        "trust_remote_code": trust_remote_code,
    }
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **source)
    except SafetensorError as error:
        raise RnnzooError(f"The weights in {folder} are damaged ({error}); convert or download them again.") from error
    except ValueError as error:
        if refusal := foreign_code(folder, error):
            raise refusal from error
        raise
    except OSError as error:
        if not cached_only:
            raise
        raise RnnzooError(f"The Hub cannot be reached, and {folder} is neither a folder nor in the cache.") from error
    return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def _encode(tokenizer: Any, prompt: str, system: str | None, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
