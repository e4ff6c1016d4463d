#!/usr/bin/env bash
# transformers 5.24.0: two documents in one row of Llama, told apart by `position_ids` that begin again. The second has the
# logits that it has alone only with `use_cache=False` and without an attention mask. With the cache, which is the default,
# or with a mask of ones, as tokenizers give it, it reads the first document.
source "$(dirname "$0")/_install.sh"
install transformers==5.24.0
python - <<'PROGRAM'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()
first, second = torch.randint(0, 64, (1, 9)), torch.randint(0, 64, (1, 7))
row = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
ones = torch.ones_like(row)


@torch.no_grad()
def gap(**options):
    """Largest difference between the second document's logits in the row and alone."""
    return float((model(row, position_ids=positions, **options).logits[:, 9:] - model(second).logits).abs().max())


seen = {
    "no options": gap(),
    "use_cache=False": gap(use_cache=False),
    "use_cache=False, attention_mask of ones": gap(use_cache=False, attention_mask=ones),
}
print("version: transformers", transformers.__version__, "torch", torch.__version__)
print("does: logits of a packed document against the same document alone, by position_ids that begin again")
for options, value in seen.items():
    print(f"seen: {options}: largest difference {value:.1e}")
assert seen["use_cache=False"] < 1e-4, "documents leak even without a cache and a mask"
assert min(seen["no options"], seen["use_cache=False, attention_mask of ones"]) > 1, "documents no longer leak"
PROGRAM
