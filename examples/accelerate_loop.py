"""A training loop of one's own with Accelerate, on one device or, by torchrun or `accelerate launch`, on several.

    python examples/accelerate_loop.py [MODEL] [--steps N] [--out DIR]
    torchrun --nproc-per-node 2 examples/accelerate_loop.py [MODEL] [--steps N] [--out DIR]

Every process reads its share of the data; the gradients, and so the weights, are the same in all.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from shared import TEXTS, arguments, complete, load
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, get_cosine_schedule_with_warmup

args = arguments(__doc__, steps=120)
# Without a GPU, several processes find each other only if the CPU is asked for.
accelerator = Accelerator(cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=2)
model, tokenizer = load(args.model)
ids = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
rows = [{"input_ids": row, "labels": row} for row in ids]
loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3 if args.model is None else 5e-5)
schedule = get_cosine_schedule_with_warmup(optimizer, 5, args.steps * accelerator.num_processes)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

losses: list[float] = []
model.train()
while len(losses) < args.steps:
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if len(losses) == args.steps:
            break

accelerator.wait_for_everyone()
trained = accelerator.unwrap_model(model)
trained.save_pretrained(args.out, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
accelerator.print(f"{accelerator.num_processes} processes, loss {losses[0]:.2f} -> {losses[-1]:.2f}, in {args.out}")
accelerator.print(f"The bee lives in{complete(trained, tokenizer, 'The bee lives in')}")
accelerator.end_training()
