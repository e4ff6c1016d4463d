"""Chats and preferences for stages that have data of their own: records of any file or dataset that `--data` takes.

chat        {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, or
            {"prompt", "completion"}
preference  {"prompt", "chosen", "rejected"}; without a prompt, what chosen and rejected begin with in common

A prompt, a completion, chosen and rejected are text, or lists of messages.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ...kernels.errors import RnnzooError
from .corpus import open_corpus

__all__ = ["Kind", "chat_tokens", "check_template", "examples", "kind_of_source"]

Kind = Literal["chat", "preference"]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # as ShareGPT names them
FIELDS = {"chat": "messages, conversations, or prompt and completion", "preference": "prompt, chosen and rejected"}


def examples(sources: list[str], kind: Kind, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The records in an order that the seed fixes: {"messages": [...]}, or {"prompt", "chosen", "rejected": [...]}.

    Args:
        sources: as `open_corpus` takes them, but records, not plain text.
    Raises:
        RnnzooError: unreadable, no records, or one that is not of this kind; names the file and the line.
    """
    read = _chat if kind == "chat" else _preference

    def render(record: Any, place: str) -> str:
        if not isinstance(record, dict):
            raise RnnzooError(f"{place} is {type(record).__name__}, not an object with {FIELDS[kind]}.")
        return json.dumps(read(record, place))

    for text in open_corpus(sources, render=render).documents(seed=seed):
        yield json.loads(text)


def kind_of_source(source: str) -> Kind:
    """What the first record of a source is.

    Raises:
        RnnzooError: unreadable, or neither.
    """
    seen: list[Kind] = []

    def render(record: Any, place: str) -> str:
        fields = record if isinstance(record, dict) else {}
        if not seen:
            if not ("chosen" in fields or {"messages", "conversations", "completion"} & set(fields)):
                known = ", ".join(map(str, fields)) or "none"
                raise RnnzooError(
                    f"{place} is neither a chat ({FIELDS['chat']}) nor a preference ({FIELDS['preference']}); its "
                    f"fields are {known}."
                )
            seen.append("preference" if "chosen" in fields else "chat")
        return "record"

    corpus = open_corpus([source], render=render)
    next(itertools.islice(corpus.read(0), 1), None)
    if not seen:
        raise RnnzooError(f"{Path(source).name} holds no records; chats are JSON lines, JSON or parquet.")
    return seen[0]


def _chat(record: dict[str, Any], place: str) -> dict[str, Any]:
    if "messages" in record or "conversations" in record:
        messages = _messages(record.get("messages", record.get("conversations")), "user", place)
    elif {"prompt", "completion"} <= set(record):
        messages = _messages(record["prompt"], "user", place) + _messages(record["completion"], "assistant", place)
    else:
        raise RnnzooError(f"{place} is no chat: it has {', '.join(record)}, but not {FIELDS['chat']}.")
    if not any(message["role"] == "assistant" for message in messages):
        raise RnnzooError(f"{place} has no turn of the assistant, so there is nothing to learn from it; leave it out.")
    return {"messages": messages}


def _preference(record: dict[str, Any], place: str) -> dict[str, Any]:
    if not {"chosen", "rejected"} <= set(record):
        raise RnnzooError(f"{place} is no preference: it has {', '.join(record)}, but not {FIELDS['preference']}.")
    chosen, rejected = (_messages(record[name], "assistant", place) for name in ("chosen", "rejected"))
    if "prompt" in record:
        prompt = _messages(record["prompt"], "user", place)
    else:
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if not prompt:
        raise RnnzooError(f"{place}: a preference needs a prompt, or two answers that begin with the same turns.")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _messages(value: Any, role: str, place: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    found = []
    for message in value if isinstance(value, list) else [None]:
        fields = message if isinstance(message, dict) else {}
        said, who = fields.get("content", fields.get("value")), fields.get("role", fields.get("from"))
        if not isinstance(said, str) or not isinstance(who, str):
            raise RnnzooError(
                f"{place}: a turn must have a role and a content, both text; one is {str(message)[:60]!r}."
            )
        found.append({"role": ROLES.get(who, who), "content": said})
    return found


def check_template(tokenizer: Any, name: str) -> None:
    """Raises RnnzooError where there is no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise RnnzooError(
            f"The tokenizer of {name} has no chat template, so there is no way to write a chat down; convert an "
            "instruct model, or add a chat_template to its tokenizer_config.json."
        )


def chat_tokens(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool] | None]:
    """A chat's tokens, and which of them the assistant says, the end of its turns included.

    The template marks them ({% generation %}), or they are what a turn of the assistant adds to the text; None where
    neither holds, as the template writes earlier turns in another way than the last one.

    Raises:
        RnnzooError: the template refuses the chat.
    """
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        made = _rendered(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(made["input_ids"]), [bool(x) for x in made["assistant_masks"]]
    text = _rendered(tokenizer, messages, tokenize=False)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _rendered(tokenizer, messages[:number], tokenize=False, add_generation_prompt=True)
            after = _rendered(tokenizer, messages[: number + 1], tokenize=False)
            if not after.startswith(before) or not text.startswith(after):
                return made["input_ids"], None
            spans.append((len(before), len(after.rstrip())))
    said = [any(begin <= first < end for begin, end in spans) for first, _ in made["offset_mapping"]]
    return made["input_ids"], said


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates raise whatever they like
        beginning = messages[0]["content"][:40] if messages else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RnnzooError(f"The chat that begins {beginning!r} does not suit the chat template: {reason}") from error
