"""Text sampled from the teacher itself: what a conversion can learn from where there is no other text.

A batch of conversations grows in step, one token each a step, all of the same length, so there is no padding and no slot
idles: a conversation begins by being fed its prompt, and where the teacher ends its turn it is fed the next question.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .prompts import FOLLOW_UPS, OPENINGS, QUESTIONS, TOPICS

__all__ = ["sample_from_teacher"]

RESERVE = 256  # positions by which a cache grows


class _GrowingLayer(DynamicLayer):
    """Keys and values in a buffer that grows by blocks: appending a token copies nothing of what is there."""

    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        needed = held + key_states.shape[-2]
        if self.buffers is None or needed > self.buffers[0].shape[-2]:
            size = (needed // RESERVE + 1) * RESERVE
            grown = tuple(new.new_empty(*new.shape[:2], size, new.shape[-1]) for new in (key_states, value_states))
            if held:
                grown[0][:, :, :held], grown[1][:, :, :held] = self.keys, self.values
            self.buffers = grown
        self.buffers[0][:, :, held:needed], self.buffers[1][:, :, held:needed] = key_states, value_states
        self.keys, self.values = self.buffers[0][:, :, :needed], self.buffers[1][:, :, :needed]
        return self.keys, self.values


class _Conversation:
    """What one slot is fed where the teacher is not the one to speak."""

    def __init__(self, tokenizer: Any, draw: random.Random):
        self.tokenizer, self.draw = tokenizer, draw
        self.topic = draw.choice(TOPICS)
        self.ends = {tokenizer.eos_token_id} - {None}
        self.chats = bool(tokenizer.chat_template)
        if self.chats:
            self.fed = self._asked(draw.choice(QUESTIONS).format(topic=self.topic), first=True)
        else:
            opening = draw.choice(OPENINGS).format(topic=self.topic)
            self.fed = tokenizer(opening[:1].upper() + opening[1:])["input_ids"]
        if not self.fed:
            self.fed = [tokenizer.bos_token_id or 0]
        self.tokens: list[int] = []

    def _asked(self, question: str, first: bool) -> list[int]:
        """The tokens that put a question, up to where the teacher's answer begins."""
        chat = [{"role": "user", "content": question}]
        render = self.tokenizer.apply_chat_template
        if first:
            text = render(chat, tokenize=False, add_generation_prompt=True)
        else:
            answered = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            before = render(answered, tokenize=False)
            after = render(answered + chat, tokenize=False, add_generation_prompt=True)
            # The template has closed the last turn with an end token, which the teacher has said itself.
            end = self.tokenizer.eos_token or ""
            closing = before[before.rindex("!") + 1 :] if after.startswith(before) else ""
            text = closing.removeprefix(end) + (after[len(before) :] if after.startswith(before) else after)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def next(self, sampled: int) -> int:
        """The token that follows: fed if there is one waiting, else the sampled one, which is recorded either way."""
        token = self.fed.pop(0) if self.fed else sampled
        self.tokens.append(token)
        if not self.fed and token in self.ends:
            if self.chats:
                self.fed = self._asked(self.draw.choice(FOLLOW_UPS).format(topic=self.topic), first=False)
            else:
                self.topic = self.draw.choice(TOPICS)
                self.fed = self.tokenizer(self.draw.choice(OPENINGS).format(topic=self.topic))["input_ids"]
        return token


def _drawn(logits: Tensor, generator: torch.Generator) -> list[int]:
    """One draw from the softmax of each row of (B, V) by its running sum: torch.multinomial draws V numbers a row."""
    running = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    level = torch.rand(len(logits), 1, generator=generator, device=logits.device) * running[:, -1:]
    return torch.searchsorted(running, level, right=True).clamp(max=logits.shape[-1] - 1).squeeze(1).tolist()


@torch.no_grad()
def sample_from_teacher(
    model: Any,
    tokenizer: Any,
    num_tokens: int,
    *,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Conversations of a chat model, or continuations of a base model, on varied topics.

    Args:
        model: the teacher, in the dtype to run it in (bfloat16 halves the time on CPUs that know it).
        num_tokens: in all, prompts included; rounded up to whole batches.
        seed: fixes the prompts and the samples: the same machine, seed and batch size give the same text.
        max_new_tokens: length of each document, prompts included; at most the teacher's positions.
        temperature: 1 draws from the teacher's own distribution.
        progress: called every few steps with (tokens so far, tokens in all).
    Returns:
        Documents of max_new_tokens tokens each, special tokens written out.
    """
    length = min(max_new_tokens, model.config.max_position_embeddings, num_tokens)
    batches = -(-num_tokens // (batch_size * length))
    slots = min(batch_size, -(-num_tokens // length))
    total = batches * slots * length
    draw = random.Random(seed)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    texts: list[str] = []
    for batch in range(batches):
        conversations = [_Conversation(tokenizer, random.Random(draw.random())) for _ in range(slots)]
        cache = DynamicCache()
        cache.layers = [_GrowingLayer() for _ in range(model.config.num_hidden_layers)]
        sampled = [0] * slots
        for step in range(length):
            current = [c.next(token) for c, token in zip(conversations, sampled, strict=True)]
            if step == length - 1:
                break
            ids = torch.tensor(current, device=model.device).unsqueeze(1)
            logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].float()
            sampled = _drawn(logits / temperature, generator)
            if progress is not None and step % 16 == 0:
                progress((batch * length + step) * slots, total)
        texts += [tokenizer.decode(c.tokens, skip_special_tokens=False) for c in conversations]
        if progress is not None:
            progress((batch + 1) * length * slots, total)
    return texts
