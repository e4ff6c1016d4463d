"""The plans in the configurations: two processes with a part of the weights each give one process's model."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rnnzoo  # noqa: F401

WORKER = """
    import os, sys, torch, rnnzoo
    from transformers import AutoModelForCausalLM

    folder = sys.argv[1]
    ids, options = torch.arange(3, 19)[None], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    parts = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    sizes = dict(whole.named_parameters())
    split = [n for n, p in parts.named_parameters() if hasattr(p, "placements") or p.shape != sizes[n].shape]
    assert any("mlp" in name or "lm_head" in name for name in split), split
    with torch.no_grad():
        torch.testing.assert_close(parts(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(parts.generate(ids, **options), whole.generate(ids, **options))
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["transformer", "gla", "mamba2", "rwkv7"])
def test_two_processes_share_the_weights_and_equal_one(tmp_path: Path, architecture: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(f"rnnzoo-{architecture}", vocab_size=64, hidden_size=64, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path / "model")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
