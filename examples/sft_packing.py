"""Supervised fine-tuning with TRL's SFTTrainer, on questions and answers packed into full rows.

    python examples/sft_packing.py [MODEL] [--steps N] [--out DIR]

With packing, TRL puts several documents into one row and says where each begins. Attention keeps them apart by a mask;
a recurrent layer has to start its state anew there, and rnnzoo's do: no document reads what another left behind.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from shared import HOMES, arguments, complete, load
from trl import SFTConfig, SFTTrainer

args = arguments(__doc__, steps=60)
model, tokenizer = load(args.model)


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


rows = [
    {"prompt": message("user", f"Where does the {animal} live?"), "completion": message("assistant", f"In a {home}.")}
    for animal, home in HOMES.items()
]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.out,
        packing=True,  # rows of max_length tokens, no padding; the loss is that of the answers
        max_length=256,
        max_steps=args.steps,
        per_device_train_batch_size=1,
        learning_rate=5e-3 if args.model is None else 5e-5,
        logging_steps=args.steps // 4 or 1,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(args.out)

question = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, tokenize=False)
answer = complete(model, tokenizer, question)
print(f"loss {trainer.state.log_history[0]['loss']:.2f} -> {trainer.state.log_history[-2]['loss']:.2f}")
print(f"{len(rows)} documents in {len(trainer.train_dataset)} packed rows\n{question}{answer}")
