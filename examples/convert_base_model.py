"""A base model becomes recurrent: a state of so many bytes, windows and linear memory where they are needed most.

python examples/convert_base_model.py [TEACHER] [--steps N] [--out DIR]
"""

from __future__ import annotations

from shared import arguments, complete, load
from tiny_teacher import PROMPT, files, train_teacher

from rnnzoo.conversions.convert import convert

args = arguments(__doc__, steps=24)
teacher = args.model or train_teacher(f"{args.out}/teacher")
out = f"{args.out}/student"
tiny = dict(state_budget=16_000, seq_len=128, batch_tokens=256, dtype="float32") if args.model is None else {}
data = [files(args.out)[0]] if args.model is None else None  # None: an open corpus, or what there is without the Hub
tokens = args.steps * tiny.get("batch_tokens", 2048)
results = convert(teacher, "rnnzoo", out, data=data, tokens=tokens, **tiny)

(student, whole, window) = results["evaluation"]["perplexity"]
print(f"state: {results['model']['state_bytes']:,} bytes at any length; windows {results['model']['windows']}")
print(
    f"perplexity: {student['value']:.2f}, the teacher's {whole['value']:.2f}, in a window alone {window['value']:.2f}"
)
for row in results["evaluation"]["ablations"]:
    print(f"  {row['branch']}: {row['perplexity']:.2f}")
model, tokenizer = load(out)
print(PROMPT + complete(model, tokenizer, PROMPT)[:9])
