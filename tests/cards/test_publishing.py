"""What a push takes along, what it refuses before the Hub is asked, and how long it waits."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rnnzoo import cli
from rnnzoo.cards.hub_errors import retrying, waiting_time
from rnnzoo.cards.licences import forbids_derivatives, may_publish
from rnnzoo.cards.published import published_files, stale_weights
from rnnzoo.kernels.errors import RnnzooError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("licence", ["cc-by-nd-4.0", "CC BY-NC-ND 3.0", "https://creativecommons.org/licenses/by-nd/4.0/",
                                     "Attribution-NoDerivatives 4.0", "CC-BY-NoDerivs"])  # fmt: skip
def test_licences_that_forbid_derivatives_are_known_in_every_spelling(licence):
    assert forbids_derivatives(licence)
    with pytest.raises(RnnzooError, match=r"teacher/x, .*--i-have-permission"):
        may_publish({"teacher": {"licence": licence, "base_model": "teacher/x"}})
    with pytest.raises(RnnzooError, match="forbids"):
        may_publish({"teacher": {"licence": "other", "licence_name": licence}})
    assert may_publish({"teacher": {"licence": licence}}, permission=True)
    assert may_publish({"teacher": {"licence": licence}, "publish": {"permission": True}})


@pytest.mark.parametrize("licence", ["apache-2.0", "cc-by-nc-sa-4.0", "gemma", "llama3.2", "bsd-2-clause", "", None])
def test_other_licences_need_no_permission(licence):
    assert not may_publish({"teacher": {"licence": licence}})
    assert not may_publish({"teacher": {"licence": licence}}, permission=True)
    assert not may_publish(None)


def test_a_forbidden_licence_stops_the_command_and_permission_is_written_down(folder, capsys, monkeypatch):
    results = {"schema": 1, "teacher": {"licence": "cc-by-nd-4.0", "name": "x"}, "recipe": {"yaml": "name: x\n"}}
    (folder / "results.json").write_text(json.dumps(results))
    assert cli._run(["push", str(folder), "a/b", "--dry-run"]) == 1
    assert "--i-have-permission" in capsys.readouterr().err
    assert cli._run(["push", str(folder), "a/b", "--dry-run", "--i-have-permission", "--json"]) == 0
    assert "recipe.yaml" in {file["path"] for file in json.loads(capsys.readouterr().out)["files"]}
    assert json.loads((folder / "results.json").read_text()) == results, "a dry run writes nothing"

    rendered, pushed = [], []
    monkeypatch.setattr("rnnzoo.cards.render.render_card", rendered.append)
    monkeypatch.setattr("rnnzoo.cards.hub.push_files", lambda files, *_, **__: pushed.append(files) or 1 / 0)
    assert cli._run(["push", str(folder), "a/b", "--i-have-permission"]) == 1
    assert json.loads((folder / "results.json").read_text())["publish"] == {"permission": True}
    assert rendered == [str(folder)] and len(pushed) == 1


def test_an_invalid_card_is_not_published(folder, capsys):
    (folder / "results.json").write_text(json.dumps({"schema": 1}))
    (folder / "README.md").write_text("---\nlicence: mit\n---\n")
    assert cli._run(["push", str(folder), "a/b", "--dry-run"]) == 1
    assert "The card of" in capsys.readouterr().err


def test_a_card_by_hand_needs_no_sections_of_ours(folder, capsys):
    (folder / "results.json").write_text(json.dumps({"schema": 1}))
    head = "language: en\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [rnn]\n"
    (folder / "README.md").write_text(f"---\n{head}---\n# My own words\n")
    assert cli._run(["push", str(folder), "a/b", "--dry-run"]) == 0
    assert "README.md: The section" in capsys.readouterr().err


def test_paths_of_this_machine_are_named_before_they_are_public(folder, capsys):
    private = "/" + "home/me/secret.txt"
    (folder / "results.json").write_text(json.dumps({"schema": 1, "data": private, "url": "https://x.y/" + "home/z"}))
    assert cli._run(["push", str(folder), "a/b", "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert f"will be public: {private}" in err and "x.y" not in err


def test_folders_that_are_no_whole_model_are_refused(folder, tmp_path):
    def refused(words):
        with pytest.raises(RnnzooError, match=words):
            published_files(folder)

    with pytest.raises(RnnzooError, match="There is no folder"):
        published_files(folder / "absent")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    refused("is damaged")
    (folder / "model.safetensors").write_bytes(b"x")
    refused("not a readable safetensors file .*; save the model again")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    refused("lacks model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text("[")
    refused("index.json is damaged")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("as pickles")
    (folder / "pytorch_model.bin").unlink()
    refused("no weights")
    (folder / "config.json").unlink()
    refused("holds no model")


def test_hidden_files_checkpoints_and_other_folders_stay(folder):
    for name in (".env", ".cache/config.json", "checkpoint-5/model.safetensors", "__pycache__/x.py", "plots/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    files, left = published_files(folder)
    assert [file.path for file in files] == ["config.json", "model.safetensors"]
    assert left == ["checkpoint-5/model.safetensors", "plots/notes.txt"]


def test_only_weights_of_an_earlier_push_are_stale():
    remote = ["model.safetensors", "adapter_model.safetensors", "old/model.safetensors", "notes.md", "config.json"]
    assert stale_weights(remote, ["config.json", "model-00001-of-00002.safetensors"]) == ["model.safetensors"]


def answer(status: int, **headers: str) -> Exception:
    error = Exception()
    error.response = SimpleNamespace(status_code=status, headers=headers)  # type: ignore[attr-defined]
    return error


def test_waiting_follows_the_hub_and_ends():
    assert waiting_time(answer(503), 2) == 4.0 and waiting_time(ConnectionError(), 0) == 1.0
    assert waiting_time(answer(429, **{"Retry-After": "7"}), 0) == 7.0
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=60)
    most = (soon - datetime.now(UTC)).total_seconds()
    waited = waiting_time(answer(429, **{"Retry-After": format_datetime(soon)}), 0)
    assert waited is not None and (soon - datetime.now(UTC)).total_seconds() <= waited <= most
    assert waiting_time(answer(429, ratelimit='"api";r=0;t=55'), 0) == 55.0
    assert waiting_time(answer(429, **{"Retry-After": "4000"}), 0) is None
    for status in (400, 401, 403, 404, 409, 412):
        assert waiting_time(answer(status), 0) is None
    assert waiting_time(ValueError(), 0) is None


def test_what_passes_is_tried_four_times_and_what_does_not_once(monkeypatch):
    slept, said = [], []
    monkeypatch.setattr("rnnzoo.cards.hub_errors.time.sleep", slept.append)
    outcomes = [answer(503), ConnectionError(), "done"]

    def call():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert retrying(call, said.append) == "done" and slept == [1.0, 2.0]
    assert said == ["the Hub answers 503; trying again in 1 s", "the Hub does not answer; trying again in 2 s"]
    outcomes[:] = [answer(500)] * 9
    with pytest.raises(Exception):  # noqa: B017
        retrying(call, said.append)
    assert len(outcomes) == 5
    outcomes[:] = [answer(404)] * 9
    with pytest.raises(Exception):  # noqa: B017
        retrying(call, said.append)
    assert len(outcomes) == 8
