"""Long rows, chats and preferences by several processes: the same steps as by one, whoever goes on with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rnnzoo.conversions.convert import convert
from rnnzoo.conversions.stages.training import CHECKPOINTS

from ..end_to_end.conftest import write_documents
from .stages.test_chats import chats, pairs
from .test_processes import SMALL, assert_same_end, losses, run, stop_and_go_on
from .tiny import tiny_teacher

RECIPE = {
    "student": "hedgehog",
    "student_options": {"feature_map": "prototype", "feature_width": 4, "window_size": 4},
    "seq_len": 64,
    "batch_tokens": 4 * 64,
    "tokens": 16 * 64,
    "calibration_tokens": 128,
    "stages": [
        {"name": "longer", "kind": "extend", "share": 1.0, "length": 128, "chunk": 32, "ce": 0.5, "lr": 1e-3},
        {"name": "chat", "kind": "sft", "lr": 1e-3, "epochs": 2},
        {"name": "adapted", "kind": "sft", "lr": 1e-2, "trains": "lora"},
        {"name": "prefer", "kind": "dpo", "batch": 4, "lr": 1e-3, "beta": 0.3},
    ],
}
STAGES = [stage["name"] for stage in RECIPE["stages"]]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[str, str, list[str], list[str]]:
    """Teacher, recipe, data and examples."""
    folder = tmp_path_factory.mktemp("given")
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    data = str(write_documents(folder / "text.jsonl", 100))
    examples = [chats(folder / "c.jsonl"), pairs(folder / "p.jsonl")]
    return str(tiny_teacher("llama", folder)), str(recipe), [data], examples


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory) -> Path:
    """The run of one process."""
    teacher, recipe, data, examples = given
    out = tmp_path_factory.mktemp("alone") / "model"
    convert(teacher, recipe, out, data=data, chat_data=examples, **SMALL)
    return out


def chat_data(given) -> list[str]:
    return [word for source in given[3] for word in ("--chat-data", source)]


def test_two_processes_end_where_one_does(given, alone, tmp_path):
    out = tmp_path / "model"
    done = run(2, given[:3], out, *chat_data(given))
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert len(losses(out, stage)) > 1
    assert_same_end(out, alone, STAGES)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("stage", ["longer", "chat", "adapted", "prefer"])
def test_a_stopped_stage_goes_on_with_another_number_of_processes(given, alone, tmp_path, stage, before, after):
    first_kept = -(-len(losses(alone, stage)) // CHECKPOINTS)
    stop_and_go_on(given[:3], tmp_path / "model", stage, first_kept, before, after, *chat_data(given))
    assert_same_end(tmp_path / "model", alone, STAGES)
