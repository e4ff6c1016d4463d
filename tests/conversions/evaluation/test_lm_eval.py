"""lm-eval knows the model `rnnzoo`: through its own command line, in batches, equal to its `hf` on the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`)")

from rnnzoo.conversions.evaluation.harness import lm_eval_tasks
from rnnzoo.conversions.student import zoo_teacher
from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.supra.configuration_supra import SupraConfig
from rnnzoo.zoo.supra.modeling_supra import SupraForCausalLM

from ..tiny import tiny_teacher

pytestmark = pytest.mark.slow  # lm-eval reads the list of its thousands of tasks in every process

WORDS = "the cat sat on a mat and then it went for the long way home to sleep".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama, and the same weights as a hybrid with attention in every layer; tasks with their data."""
    root = tmp_path_factory.mktemp("lm-eval")
    teacher = tiny_teacher("llama", root)
    found = resolve_teacher(str(teacher))
    teacher_model = root / "teacher_model"
    same = zoo_teacher(found, found.load(), torch.float32)
    fields = {k: v for k, v in same.config.to_dict().items() if k not in ("model_type", "architectures", "layer_types")}
    hybrid = SupraForCausalLM(SupraConfig(**fields, layer_types=["full_attention"] * found.config.num_hidden_layers))
    hybrid.load_state_dict(same.state_dict())
    hybrid.save_pretrained(teacher_model)
    found.tokenizer().save_pretrained(teacher_model)
    tasks = root / "tasks"
    tasks.mkdir()
    rows = [
        {"q": " ".join(WORDS[: 2 + i]), "choices": [" on the mat", " it", " for the long way home"], "label": i % 3}
        for i in range(7)  # contexts of different lengths, so that batches are padded
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(root / "rows.jsonl")}},
        "validation_split": "validation",
        "doc_to_text": "{{q}}",
    }
    accuracy = {"aggregation": "mean", "higher_is_better": True}
    choice = common | {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"} | accuracy, {"metric": "acc_norm"} | accuracy],
    }
    written = common | {
        "task": "tiny_written",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"} | accuracy],
    }
    for task in (choice, written):
        (tasks / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return {"hf": teacher, "rnnzoo": teacher_model, "tasks": tasks, "root": root}


def answers(folders: dict[str, Path], model: str, *, batch_size: int, runner: str) -> dict[str, list]:
    """What `model` answered to every item, by lm-eval's command line: log likelihoods, and texts."""
    out = folders["root"] / f"{model}-{batch_size}"
    command = [
        *(sys.executable, "-m", runner, "--model", model, "--device", "cpu", "--batch_size", str(batch_size)),
        *("--model_args", f"pretrained={folders[model]},dtype=float32", "--tasks", "tiny_choice,tiny_written"),
        *("--include_path", str(folders["tasks"]), "--output_path", str(out), "--log_samples"),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folders["root"] / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for task in ("tiny_choice", "tiny_written"):
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        found[task] = [answer for sample in samples for answer in sample["resps"]]
    return found


def test_command_line_equals_hf_on_the_same_weights_in_padded_batches(folders):
    theirs = answers(folders, "hf", batch_size=1, runner="lm_eval")
    ours = answers(folders, "rnnzoo", batch_size=4, runner="rnnzoo.lm_eval")
    assert len(ours["tiny_choice"]) == 21 and len(ours["tiny_written"]) == 7
    for (own,), (other,) in zip(ours["tiny_choice"], theirs["tiny_choice"], strict=True):
        assert float(own[0]) == pytest.approx(float(other[0]), abs=1e-4) and str(own[1]) == str(other[1])
    assert len({round(float(one[0][0]), 3) for one in ours["tiny_choice"]}) > 10, "the items differ"
    assert ours["tiny_written"] == theirs["tiny_written"]


def test_rows_of_a_loaded_model_and_an_unknown_task(folders):
    from transformers import AutoTokenizer

    model = SupraForCausalLM.from_pretrained(folders["rnnzoo"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["rnnzoo"])
    task = yaml.safe_load((folders["tasks"] / "tiny_choice.yaml").read_text())
    rows = lm_eval_tasks(model, tokenizer, [task], batch_size=4)  # type: ignore[list-item]
    assert {row["metric"] for row in rows} >= {"acc", "acc_norm"}
    assert all(row["task"] == "tiny_choice" and row["n"] == 7 for row in rows)
    with pytest.raises(RnnzooError, match="no_such_task"):
        lm_eval_tasks(model, tokenizer, ["no_such_task"])
