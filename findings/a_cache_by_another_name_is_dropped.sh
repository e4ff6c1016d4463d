#!/usr/bin/env bash
# transformers 5.24.0: Mamba and Mamba-2 take their cache as `cache` (and by the old name `cache_params`, with a warning).
# Given as `past_key_values`, as most models had it, it is accepted and dropped: the call begins from an empty state, and
# nothing says so. A misspelt name goes the same way.
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
ids = torch.randint(0, 64, (1, 10))
print("version: transformers", transformers.__version__, "torch", torch.__version__)
print("does: the tenth token after nine, with the cache of these nine under several names")
for model_name, model in models.items():
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        right, alone = model(ids).logits[:, 9:], model(ids[:, 9:]).logits
        cache = model(ids[:, :9], use_cache=True).cache
        for name in ("cache", "past_key_values", "chache"):
            logits = model(ids[:, 9:], **{name: copy.deepcopy(cache)}).logits
            to_right, to_alone = (float((logits - other).abs().max()) for other in (right, alone))
            print(f"seen: {model_name}, {name}=: {to_right:.1e} from the right logits, {to_alone:.1e} from those without cache")
            wanted = to_right if name == "cache" else to_alone
            assert wanted < 1e-3 < max(to_right, to_alone), f"{name} is treated in another way now"
    assert not said, f"it now says: {said[0].message}"
PROGRAM
