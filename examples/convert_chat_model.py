"""A chat model becomes recurrent: distilled, then tuned on chats and on preferences, all in one recipe that resumes.

    python examples/convert_chat_model.py [TEACHER] [--steps N] [--out DIR]

The stages `sft` and `dpo` take their data from `chat_data`: chats with `messages`, pairs with `chosen` and `rejected`.
"""

from __future__ import annotations

from pathlib import Path

from shared import arguments, load
from tiny_teacher import files, train_teacher

from rnnzoo.conversions.convert import convert

RECIPE = """
student: gated_delta_net
seq_len: 128
batch_tokens: 256
stages:
  - {name: calibrate, kind: calibrate}
  - {name: distill, kind: train, share: 1.0, trains: all, lr: 3.0e-3, new_lr: 3.0e-3}
  - {name: chat, kind: sft, trains: all, lr: 4.0e-3, new_lr: 4.0e-3, epochs: 40}
  - {name: prefer, kind: dpo, trains: all, lr: 1.0e-4, beta: 0.1}
"""

args = arguments(__doc__, steps=60)
teacher = args.model or train_teacher(f"{args.out}/teacher")
recipe = Path(args.out) / "chat.yaml"
recipe.write_text(RECIPE)
(text, *chats), out = files(args.out), f"{args.out}/student"
results = convert(
    teacher,
    str(recipe),
    out,
    data=[text],
    chat_data=chats,
    tokens=256 * args.steps,
    dtype="float32",
    evaluate=False,
)

for stage in results["conversion"]["stages"]:
    if "loss_first" in stage:
        print(f"{stage['name']}: loss {stage['loss_first']:.2f} -> {stage['loss_last']:.2f}")
model, tokenizer = load(out)
question = [{"role": "user", "content": "Where does the owl live?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False)
answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(f"Where does the owl live? {answer}")
