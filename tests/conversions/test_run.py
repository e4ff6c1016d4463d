"""The folder of a run: only its own, only for the same request, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnnzoo.conversions import run_folder as run_module
from rnnzoo.conversions.run_folder import alone_in, holds_run, open_run
from rnnzoo.kernels.errors import RnnzooError

REQUEST = {"teacher": "abc", "recipe": {"name": "r", "stages": [{"lr": 0.1}, {"lr": 0.2}]}, "data": None, "seed": 0}


class Model:
    """Stands for a student or a tokenizer: saves one file."""

    def __init__(self, *names: str, text: str = "weights"):
        self.names, self.text = names or ("model.safetensors", "config.json"), text

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in self.names:
            (Path(folder) / name).write_text(self.text)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_and_its_continuation(tmp_path):
    out = tmp_path / "deep" / "out"
    run = open_run(out, REQUEST, False)
    assert run.created and not run.stages and run.student_folder() is None and holds_run(out)
    run.finish("initialise", Model(), {"tokens": 0})
    run.finish("train", Model(text="trained"), {"tokens": 5})
    again = open_run(str(out), REQUEST, False)
    assert not again.created
    assert again.record("train")["tokens"] == 5 and again.record("finished") is None
    assert (again.student_folder() / "model.safetensors").read_text() == "trained"
    assert files(out) == {".rnnzoo/run.json", ".rnnzoo/student-1/model.safetensors", ".rnnzoo/student-1/config.json"}


def test_a_finished_stage_forgets_its_checkpoints_but_not_its_metrics(tmp_path):
    run = open_run(tmp_path / "out", REQUEST, False)
    folder = run.folder / "train"
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}")
    run.finish("train", None, {})
    assert files(folder) == {"metrics.jsonl"} and not (folder / "checkpoint-3").exists()


def test_publishing_replaces_the_model_and_keeps_other_files(tmp_path):
    run = open_run(tmp_path / "out", REQUEST, False)
    (run.out / "model-00001-of-00002.safetensors").write_text("old")
    (run.out / "notes.txt").write_text("mine")
    run.publish(Model(), Model("tokenizer.json"))
    expected = {"model.safetensors", "config.json", "tokenizer.json", "notes.txt", ".rnnzoo/run.json"}
    assert files(run.out) == expected


def test_what_a_killed_save_left_is_no_model(tmp_path):
    run = open_run(tmp_path / "out", REQUEST, False)
    run.finish("initialise", Model(), {})

    class Killed(Model):
        def save_pretrained(self, folder):
            super().save_pretrained(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.finish("train", Killed(), {})
    again = open_run(tmp_path / "out", REQUEST, False)
    assert again.record("train") is None and again.student_folder().name == "student-0"
    again.finish("train", Model(text="whole"), {})
    assert (again.student_folder() / "config.json").read_text() == "whole"


def test_folders_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    for restart in (False, True):
        with pytest.raises(RnnzooError, match=r"holds something else \(photo.jpg\)"):
            open_run(tmp_path, REQUEST, restart)
    assert files(tmp_path) == {"photo.jpg"}
    with pytest.raises(RnnzooError, match="is a file; give --out a folder"):
        open_run(tmp_path / "photo.jpg", REQUEST, False)


def test_an_empty_folder_is_taken_and_given_back(tmp_path):
    run = open_run(tmp_path, REQUEST, False)
    run.discard()
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())
    run = open_run(tmp_path / "new", REQUEST, False)
    run.discard()
    assert not (tmp_path / "new").exists()


def test_discard_leaves_a_folder_with_other_files_alone(tmp_path):
    run = open_run(tmp_path / "out", REQUEST, False)
    (run.out / "notes.txt").write_text("mine")
    run.discard()
    assert holds_run(run.out) and (run.out / "notes.txt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"teacher": "xyz"}, "teacher was 'abc', is 'xyz'"),
        ({"data": ["a.txt"]}, "data was None, is ['a.txt']"),
        ({"recipe": {"name": "r", "stages": [{"lr": 0.1}, {"lr": 0.3}]}}, "recipe.stages[1].lr was 0.2, is 0.3"),
        ({"recipe": {"name": "r", "stages": []}}, "recipe.stages was"),
        ({"extra": 5}, "extra was None, is 5"),
    ],
)
def test_other_settings_are_refused_with_the_difference(tmp_path, change, message):
    open_run(tmp_path, REQUEST, False)
    with pytest.raises(RnnzooError) as raised:
        open_run(tmp_path, REQUEST | change, False)
    assert message in str(raised.value) and "--restart" in str(raised.value)
    assert open_run(tmp_path, REQUEST, False).request == REQUEST


def test_tuples_and_lists_are_the_same_request(tmp_path):
    open_run(tmp_path, REQUEST | {"data": ("a", "b")}, False)
    open_run(tmp_path, REQUEST | {"data": ["a", "b"]}, False)


@pytest.fixture
def finished(tmp_path):
    """A folder with a finished run, and a file of somebody else's."""
    run = open_run(tmp_path, REQUEST, False)
    run.finish("initialise", Model(), {})
    (run.folder / "data").mkdir()
    (run.folder / "data" / "training.safetensors").write_text("old")
    run.publish(Model(text="old"), Model("tokenizer.json"))
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


OTHER = REQUEST | {"seed": 4}


def test_restart_discards_the_old_run_and_its_results(finished):
    again = open_run(finished, OTHER, True)
    assert again.stages == [] and again.request["seed"] == 4
    again.begin()
    assert files(finished) == {".rnnzoo/run.json", "tokenizer.json", "notes.txt"}
    again.discard()
    open_run(finished, OTHER, False)


def test_a_restart_that_cannot_begin_leaves_the_old_run_as_it_was(finished):
    before = {name: (finished / name).read_bytes() for name in files(finished)}
    run = open_run(finished, OTHER, True)
    (run.folder / "data").mkdir()
    (run.folder / "data" / "calibration.safetensors").write_text("new")
    run.discard()
    assert {name: (finished / name).read_bytes() for name in files(finished)} == before
    assert open_run(finished, REQUEST, False).record("initialise")


@pytest.mark.parametrize("stop_at", range(1, 9))
@pytest.mark.parametrize("restart", [False, True])
def test_a_restart_that_was_killed_loses_neither_run(finished, monkeypatch, stop_at, restart):
    """Killed at the n-th renaming; afterwards each request finds its own run, whole, or is refused."""
    before = {name: (finished / name).read_bytes() for name in files(finished)}
    renamed, replace = [], os.replace

    def killed(*arguments):
        renamed.append(arguments)
        if len(renamed) == stop_at:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.os, "replace", killed)
        try:
            open_run(finished, OTHER, True).begin()
        except KeyboardInterrupt:
            begun = False
        else:
            begun = True
    if restart or begun:
        run = open_run(finished, OTHER, restart)
        assert run.stages == [] and not (run.folder / "data").exists()
    else:
        assert open_run(finished, REQUEST, False).record("initialise")
        assert {name: (finished / name).read_bytes() for name in files(finished)} == before
    assert begun == (stop_at > 7)


def test_a_restart_that_was_killed_goes_on(finished):
    run = open_run(finished, OTHER, True)
    (run.folder / "data").mkdir()
    (run.folder / "data" / "training.safetensors").write_text("new")
    again = open_run(finished, OTHER, False)
    again.discard()
    assert (again.folder / "data" / "training.safetensors").read_text() == "new"
    again.finish("initialise", Model(), {})
    assert "old" not in {path.read_text() for path in finished.rglob("*") if path.is_file()}


def test_a_failure_of_a_call_that_goes_on_deletes_nothing(tmp_path):
    run = open_run(tmp_path / "out", REQUEST, False)
    (run.folder / "checkpoint-4").mkdir()
    again = open_run(tmp_path / "out", REQUEST, False)
    again.discard()
    assert holds_run(run.out) and (run.folder / "checkpoint-4").exists()


def test_a_restart_whose_first_student_cannot_be_saved_gives_the_old_run_back(finished):
    class Full(Model):
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    before = {name: (finished / name).read_bytes() for name in files(finished)}
    run = open_run(finished, OTHER, True)
    with pytest.raises(OSError, match="No space"):
        run.finish("initialise", Full(), {})
    run.discard()
    assert {name: (finished / name).read_bytes() for name in files(finished)} == before


def test_a_run_that_has_begun_is_not_discarded(tmp_path):
    run = open_run(tmp_path / "out", REQUEST, False)
    run.begin()
    run.discard()
    assert holds_run(run.out)


def test_pieces_without_a_run_are_not_used(tmp_path):
    (tmp_path / ".rnnzoo" / "data").mkdir(parents=True)
    (tmp_path / ".rnnzoo" / "data" / "training.safetensors").write_text("old")
    open_run(tmp_path, REQUEST, False)
    assert files(tmp_path) == {".rnnzoo/run.json"}


def test_restart_in_a_new_folder_is_a_new_run(tmp_path):
    assert open_run(tmp_path / "out", REQUEST, True).created


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"request": {}}', '{"request": 5, "stages": []}'])
def test_a_damaged_run_is_told_and_can_be_restarted(tmp_path, content):
    open_run(tmp_path, REQUEST, False)
    (tmp_path / ".rnnzoo" / "run.json").write_text(content)
    with pytest.raises(RnnzooError, match=r"run.json is damaged; run again with --restart"):
        open_run(tmp_path, REQUEST, False)
    assert open_run(tmp_path, REQUEST, True).stages == []


def test_an_unwritable_place_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RnnzooError, match="cannot be used: Permission denied; choose another folder"):
        open_run(tmp_path / "out", REQUEST, False)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RnnzooError, match="cannot be used"):
            open_run(tmp_path / "out", REQUEST, False)
    finally:
        tmp_path.chmod(0o700)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    run_module.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        run_module.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and files(tmp_path) == {"x.json"}


def test_a_second_process_is_kept_out_while_the_first_one_works(tmp_path):
    code = "import sys; from rnnzoo.conversions.run_folder import alone_in\nwith alone_in(sys.argv[1]): print('in')"

    def second() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, str(tmp_path)]
        environment = os.environ | {"RNNZOO_NO_REGISTER": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    with alone_in(tmp_path):
        refused = second()
        assert refused.returncode and f"Another process is at work in {tmp_path}" in refused.stderr
    assert second().stdout == "in\n"
    with alone_in(tmp_path / "not yet there"):
        pass
    assert not list(tmp_path.iterdir())


STUDENT = {"name": "initialise", "tokens": 0, "kept": [], "student": "student-0"}
LAYERS = {"name": "initialise", "tokens": 0, "kept": [], "seconds": 0.1}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("stages", "layers", "was"),
    [([STUDENT], False, False), ([LAYERS], False, True), ([], True, True), ([], False, None)],
)
def test_a_run_goes_on_with_or_without_offload_as_it_was_begun(tmp_path, stages, layers, was, earlier):
    """Also one of a version that did not write that down: what it has kept says so."""
    request = REQUEST if earlier else REQUEST | {"offload": bool(was)}
    (tmp_path / ".rnnzoo").mkdir()
    (tmp_path / ".rnnzoo" / "run.json").write_text(json.dumps({"request": request, "stages": stages}))
    if layers:
        (tmp_path / ".rnnzoo" / "layers").mkdir()
    fits = {bool(was)} if was is not None or not earlier else {False, True}
    for offload in (False, True):
        if offload in fits:
            assert open_run(tmp_path, REQUEST | {"offload": offload}, False).stages == stages
            continue
        how = "without" if offload else "with"
        with pytest.raises(RnnzooError, match=f"begun {how} --offload; go on {how} it, .*--restart"):
            open_run(tmp_path, REQUEST | {"offload": offload}, False)
