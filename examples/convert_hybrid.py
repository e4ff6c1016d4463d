"""A hybrid: the layers that matter most stay attention, the others become Gated DeltaNet.

    python examples/convert_hybrid.py [TEACHER] [--steps N] [--out DIR]

`best 50%` ranks the layers before the first stage, by forward passes alone. `rnnzoo plan TEACHER --select` shows the
ranking without converting anything.
"""

from __future__ import annotations

import torch
from shared import arguments, load
from tiny_teacher import files, train_teacher

from rnnzoo.conversions.convert import convert
from rnnzoo.zoo import RecurrentCache

args = arguments(__doc__, steps=40)
teacher = args.model or train_teacher(f"{args.out}/teacher")
out = f"{args.out}/student"
results = convert(
    teacher,
    "rnnzoo",
    out,
    student="gated_delta_net",
    keep="best 50%",
    data=[files(args.out)[0]],
    tokens=256 * args.steps,
    seq_len=128,
    batch_tokens=256,
    dtype="float32",
    evaluate=False,
)

kinds = results["model"]["layer_types"]
for number, kind in enumerate(kinds):
    print(f"layer {number}: {kind}")
model, tokenizer = load(out)
sizes = []
for length in (64, 256):
    cache = RecurrentCache(model.config)
    model(torch.zeros(1, length, dtype=torch.long), cache=cache)
    sizes.append(cache.num_bytes())
    print(f"memory after {length} tokens: {sizes[-1]:,} bytes")
