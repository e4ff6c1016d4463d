"""A new family of teachers: say where its layers keep q, k, v, o and the MLP; every recipe and student follows.

    python examples/new_teacher_family.py [TEACHER] [--steps N] [--out DIR]

Phi-3 (Abdin et al. 2024) keeps q, k and v in one matrix, and the gate and the input of the MLP in another.
"""

from __future__ import annotations

import torch
from shared import arguments, complete, load
from tiny_teacher import PROMPT, SIZES, files, train_teacher
from transformers import Phi3Config, Phi3ForCausalLM

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.student import zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.conversions.teachers.families import FAMILIES, Family
from rnnzoo.zoo.core.mixer import AttentionWeights


class Phi3(Family):
    model_type, config_name, model_name = "phi3", "Phi3Config", "Phi3ForCausalLM"

    def attention_weights(self, model, layer: int) -> AttentionWeights:
        attention, counts = self.attention_module(model, layer), self._head_counts(model.config)
        rows = [counts[name] * counts["head_dim"] for name in ("num_heads", "num_kv_heads", "num_kv_heads")]
        q, k, v = attention.qkv_proj.weight.detach().split(rows)
        return AttentionWeights(q=q, k=k, v=v, o=attention.o_proj.weight.detach(), **counts)

    def shared_tensors(self, model) -> dict:
        shared = super().shared_tensors(model)
        for name in [name for name in shared if name.endswith("gate_up_proj.weight")]:
            gate, up = shared.pop(name).chunk(2)
            shared |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        return shared


FAMILIES[Phi3.model_type] = Phi3()

args = arguments(__doc__, steps=40)
teacher = args.model or train_teacher(f"{args.out}/teacher", Phi3ForCausalLM(Phi3Config(**SIZES)))
found = resolve_teacher(teacher)
original = found.load()
ids = torch.arange(3, 60)[None]
# In the zoo's block, every layer attention, it must say what the original says: the test of a new family.
with torch.no_grad():
    teacher_model = zoo_teacher(found, original, torch.float32)
    difference = (teacher_model(ids).logits - original(ids).logits).abs().max().item()
print(f"largest difference of a logit: {difference:.1e}")

out, data = f"{args.out}/student", [files(args.out)[0]]
settings = dict(seq_len=128, batch_tokens=256, tokens=256 * args.steps, dtype="float32", evaluate=False)
convert(teacher, "rnnzoo", out, student="mamba2", keep="1/2", data=data, **settings)
student, tokenizer = load(out)
print(PROMPT + complete(student, tokenizer, PROMPT)[:9])
