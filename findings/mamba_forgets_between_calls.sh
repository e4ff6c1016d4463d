#!/usr/bin/env bash
# transformers 5.24.0: a prompt read by Mamba in two calls, the second with the cache of the first. If the second call has
# one token, the logits are those of the whole prompt; if it has several, they are wrong, without an error or a warning.
# Mamba-2, read in the same way, is right.
source "$(dirname "$0")/_install.sh"
install transformers==5.24.0
python - <<'PROGRAM'
import copy
import warnings

import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3)
models = {
    "Mamba": MambaForCausalLM(MambaConfig(**sizes)).eval(),
    "Mamba-2": Mamba2ForCausalLM(Mamba2Config(**sizes, head_dim=16, num_heads=4, n_groups=1)).eval(),
}
ids = torch.randint(0, 64, (1, 16))
print("version: transformers", transformers.__version__, "torch", torch.__version__)
print("does: 9 tokens in one call, then one or seven more with its cache, against all in one call")
seen = {}
with torch.no_grad(), warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for name, model in models.items():
        whole, cache = model(ids).logits, model(ids[:, :9], use_cache=True).cache
        for more in (1, 7):
            logits = model(ids[:, 9 : 9 + more], cache=copy.deepcopy(cache), use_cache=True).logits
            seen[name, more] = float((logits - whole[:, 9 : 9 + more]).abs().max())
            print(f"seen: {name}, {more} more: largest difference {seen[name, more]:.1e}")
print("seen: warnings:", [str(warning.message) for warning in said])
assert max(seen["Mamba", 1], seen["Mamba-2", 1], seen["Mamba-2", 7]) < 1e-3, "others are wrong, too"
assert seen["Mamba", 7] > 0.1 and not said, "Mamba no longer forgets, or says so"
PROGRAM
