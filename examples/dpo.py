"""Preference tuning with TRL's DPOTrainer: whole sentences are preferred to shrugs.

    python examples/dpo.py [MODEL] [--steps N] [--out DIR]

The model learns through LoRA, so that the reference model is itself without the adapter and takes no memory of its own.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import LoraConfig
from shared import HOMES, arguments, load
from trl import DPOConfig, DPOTrainer

args = arguments(__doc__, steps=60)
model, tokenizer = load(args.model)
rows = [
    {
        "prompt": [{"role": "user", "content": f"Where does the {animal} live?"}],
        "chosen": [{"role": "assistant", "content": f"The {animal} lives in a {home}."}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
    }
    for animal, home in HOMES.items()
]
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=args.out,
        beta=0.1,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2 if args.model is None else 1e-4,
        logging_steps=args.steps // 6 or 1,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", exclude_modules=["lm_head"], task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(args.out)

log = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
for name in ("loss", "rewards/margins", "rewards/accuracies"):
    print(f"{name}: {log[0][name]:.2f} -> {log[-1][name]:.2f}")
print(f"adapter in {args.out}")
