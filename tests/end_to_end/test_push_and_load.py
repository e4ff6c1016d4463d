"""What was pushed loads by its name, as anything on the Hub, in processes that never saw the folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnnzoo.zoo.supra.modeling_supra import SupraForCausalLM

from ..hub_double import HubDouble

REPO = "alice/tiny"


def python(hub: HubDouble, home: Path, script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=hub.environment(home))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_what_was_pushed_loads_by_its_name_in_fresh_processes(hub, push, small_model, tmp_path):
    push(small_model, "--tag", "v1")
    ids = [5, 30, 77, 200]
    script = (
        "import json, sys, torch, rnnzoo\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision='v1').eval()\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1])('the cat').input_ids\n"
        "with torch.no_grad(): print(json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits[0].tolist()))"
    )
    fresh = json.loads(python(hub, tmp_path / "cache", script, REPO, json.dumps(ids)))
    with torch.no_grad():
        here = SupraForCausalLM.from_pretrained(small_model).eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.tensor(fresh), here, rtol=1e-5, atol=1e-5)

    script = "import sys; from huggingface_hub import snapshot_download; print(snapshot_download(sys.argv[1]))"
    snapshot = Path(python(hub, tmp_path / "other-cache", script, REPO))
    for path, content in hub.files(REPO).items():
        assert (snapshot / path).read_bytes() == content


def test_an_adapter_is_pushed_and_loaded_on_its_base(hub, push, small_model, tmp_path):
    peft = pytest.importorskip("peft")
    push(small_model)
    base = SupraForCausalLM.from_pretrained(small_model)
    base.name_or_path = REPO
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, base_model_name_or_path=REPO)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink(missing_ok=True)
    done = push(tmp_path / "adapter", repo="alice/adapter")
    assert "no README.md" in done.stderr
    script = (
        "import json, sys, torch, rnnzoo\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "with torch.no_grad(): print(json.dumps(model(torch.tensor([[5, 30, 77, 200]])).logits[0].tolist()))"
    )
    fresh = json.loads(python(hub, tmp_path / "cache", script, REPO, "alice/adapter"))
    with torch.no_grad():
        here = adapted.eval()(torch.tensor([[5, 30, 77, 200]])).logits[0]
        plain = SupraForCausalLM.from_pretrained(small_model).eval()(torch.tensor([[5, 30, 77, 200]])).logits[0]
    torch.testing.assert_close(torch.tensor(fresh), here, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(here, plain, atol=1e-3)


@pytest.mark.slow
def test_what_was_pushed_with_its_code_loads_without_rnnzoo(hub, push, small_model, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in small_model.rglob("*")}
    push(small_model, "--code")
    assert {path: path.stat().st_mtime_ns for path in small_model.rglob("*")} == before
    assert "nothing to do" in push(small_model, "--code").stdout
    ids = [5, 30, 77, 200]
    script = (
        "import json, sys, torch\n"
        "sys.modules['rnnzoo'] = None  # as if it were not installed\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "with torch.no_grad(): print(json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits[0].tolist()))"
    )
    fresh = json.loads(python(hub, tmp_path / "cache", script, REPO, json.dumps(ids)))
    with torch.no_grad():
        here = SupraForCausalLM.from_pretrained(small_model).eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.tensor(fresh), here, rtol=1e-4, atol=1e-4)
