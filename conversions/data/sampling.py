"""Text sampled from the teacher itself: what a conversion can learn from where there is no other text.

A batch of conversations grows in step, one token each a step, all of the same length, so there is no padding and no
slot idles: a conversation begins by being fed its prompt, and where the teacher ends its turn it is fed a new question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...zoo.core.cache import CACHE_NAME
from .prompts import FOLLOW_UPS, OPENINGS, QUESTIONS, TOPICS

__all__ = ["sample_from_teacher"]

RESERVE = 256  # positions by which a cache grows
TURN_TOKENS = (128, 384)  # longest answer, drawn for each turn
GROUPED = "rnnzoo_grouped_decoding"


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


def _grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """One new token, query (B, H, 1, d), over keys (B, Hk, S, d): the H / Hk queries that share a key head become a
    time axis, so the keys are read once for them all. Five times as fast on a CPU as repeating the keys."""
    if query.shape[2] > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    out = F.scaled_dot_product_attention(grouped, key, value, scale=kwargs.get("scaling"))
    return out.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register(GROUPED, _grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def _decoding(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
        self.left = draw.randint(*TURN_TOKENS)

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
        if self.fed or not self.ends:
            return token
        self.left -= 1
        if token in self.ends:
            self.fed = self._next_prompt()
            self.left = self.draw.randint(*TURN_TOKENS)
        elif self.left <= 0:  # a small teacher would repeat itself from here on
            self.fed = [min(self.ends), *self._next_prompt()]
            self.left = self.draw.randint(*TURN_TOKENS)
        return token

    def _next_prompt(self) -> list[int]:
        changes_topic = not self.chats or self.draw.random() < 0.5
        if changes_topic:
            self.topic = self.draw.choice(TOPICS)
        if not self.chats:
            return self.tokenizer(self.draw.choice(OPENINGS).format(topic=self.topic))["input_ids"]
        return self._asked(
            self.draw.choice(QUESTIONS if changes_topic else FOLLOW_UPS).format(topic=self.topic), first=False
        )


def _drawn(logits: Tensor, min_p: float, generator: torch.Generator) -> list[int]:
    """One draw from the softmax of each row of (B, V), by its running sum: torch.multinomial draws V numbers a row."""
    chances = torch.softmax(logits, dim=-1)
    chances = chances.masked_fill_(chances < min_p * chances.amax(dim=-1, keepdim=True), 0.0)
    running = chances.cumsum(dim=-1)
    level = torch.rand(len(logits), 1, generator=generator, device=logits.device) * running[:, -1:]
    return torch.searchsorted(running, level, right=True).clamp(max=logits.shape[-1] - 1).squeeze(1).tolist()


def _converse(
    model: Any,
    conversations: list[_Conversation],
    length: int,
    draw: Callable[[Tensor], list[int]],
    report: Callable[[int], None],
) -> None:
    """Lets every conversation grow to `length` tokens."""
    cache = DynamicCache()
    cache.layers = [_GrowingLayer() for _ in range(model.config.num_hidden_layers)]
    sampled = [0] * len(conversations)
    for step in range(length):
        current = [c.next(token) for c, token in zip(conversations, sampled, strict=True)]
        if step == length - 1:
            return
        ids = torch.tensor(current, device=model.device).unsqueeze(1)
        sampled = draw(model(ids, use_cache=True, **{CACHE_NAME: cache}).logits[:, -1].float())
        if step % 16 == 0:
            report(step)


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
    min_p: float = 0.02,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Conversations of a chat model, or continuations of a base model, on varied topics.

    Args:
        model: the teacher, in the dtype to run it in (bfloat16 halves the time on CPUs that know it).
        num_tokens: in all, prompts included; rounded up to whole batches.
        seed: fixes the prompts and the samples: the same machine, seed and batch size give the same text.
        max_new_tokens: length of each document, prompts included; at most the teacher's positions.
        temperature: 1 draws from the teacher's own distribution.
        min_p: tokens less likely than this share of the likeliest are not drawn (Nguyen et al. 2024); 0 keeps the whole
            tail, from which a small teacher's long texts drift into nonsense.
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
        done = batch * slots * length

        def report(step: int, done: int = done) -> None:
            if progress is not None:
                progress(done + step * slots, total)

        with _decoding(model):
            _converse(
                model, conversations, length, lambda logits: _drawn(logits / temperature, min_p, generator), report
            )
        texts += [tokenizer.decode(c.tokens, skip_special_tokens=False) for c in conversations]
        report(length)
    return texts
