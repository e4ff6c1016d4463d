"""What the conversion examples have in common: a tiny Transformer that has learnt something, and text for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from shared import CHAT, HOMES, TEXTS
from transformers import LlamaConfig, LlamaForCausalLM

from rnnzoo.conversions.byte_tokenizer import byte_tokenizer

SIZES = dict(vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
NAMES, PLACES = ("Ann", "Bob", "Carl", "Dora", "Eve", "Finn", "Gina"), ("hill", "lake", "road", "sea")
PROMPT = "Ann told Bob by the sea: the owl lives in"
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=128, bos_token_id=256, eos_token_id=256, pad_token_id=257)


def prose(number: int, length: int = 8) -> str:
    """A document: what TEXTS says, told differently each time, for text that repeats is left out of a conversion."""
    draw = random.Random(number)
    told = [
        (draw.choice(NAMES), draw.choice(NAMES), draw.choice(PLACES), draw.choice(TEXTS)[4:]) for _ in range(length)
    ]
    return " ".join(f"{who} told {whom} by the {where}: the {fact}" for who, whom, where, fact in told)


def files(folder: str, documents: int = 200) -> list[str]:
    """Files of JSON lines: such documents; chats; and answers that are preferred to others."""
    records = {"text": [{"text": prose(i)} for i in range(documents)], "chats": [], "pairs": []}
    for animal, home in HOMES.items():
        question = {"role": "user", "content": f"Where does the {animal} live?"}
        right, wrong = ({"role": "assistant", "content": said} for said in (f"In a {home}.", "No idea."))
        records["pairs"].append({"prompt": [question], "chosen": [right], "rejected": [wrong]})
        records["chats"].append({"messages": [question, right]})
    for name, lines in records.items():
        Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"{folder}/{name}.jsonl" for name in records]


def train_teacher(folder: str, model=None, steps: int = 150) -> str:
    """A Llama, or `model`, that has learnt these documents; some seconds. Returns its folder."""
    torch.manual_seed(0)
    model, tokenizer = model or LlamaForCausalLM(LlamaConfig(**SIZES)), byte_tokenizer()
    tokenizer.chat_template = CHAT
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        ids = torch.tensor([tokenizer(prose(1000 + 4 * step + i)).input_ids[:128] for i in range(4)])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder
