"""`rnnzoo push` against a Hub on loopback: what is sent, in one commit, and what is not sent twice."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from rnnzoo.zoo.supra.modeling_supra import SupraForCausalLM

REPO = "alice/tiny"
GUARD = 600  # seconds, against hanging for ever where something is broken


def large(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.safetensors")}


def test_push_makes_the_repository_and_sends_the_model_in_one_commit(hub, push, small_model):
    said = json.loads(push(small_model, "--json", "--message", "First words").stdout)
    sent = hub.files(REPO)
    assert set(sent) - {".gitattributes"} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "modeling_tiny.py",
        "plots/recall.png",
        "tokenizer.json",
        "tokenizer_config.json",
        *large(small_model),
    }
    assert all(
        content == (small_model / path).read_bytes() for path, content in sent.items() if path != ".gitattributes"
    )
    repo = hub.repositories[REPO]
    assert list(repo.messages.values()) == ["initial", "First words"] and not repo.private
    assert said["created"] and said["commit"] == repo.branches["main"] and said["url"] == f"{hub.url}/{REPO}"
    assert sorted(said["uploaded"]) == sorted(set(sent) - {".gitattributes"}) and len(large(small_model)) > 1


def test_unchanged_files_are_not_sent_again_and_make_no_commit(hub, push, small_model):
    push(small_model)
    uploads, commits = len(hub.uploads), len(hub.repositories[REPO].commits)
    assert "nothing to do" in push(small_model).stdout
    assert len(hub.uploads) == uploads and len(hub.repositories[REPO].commits) == commits
    (small_model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    said = json.loads(push(small_model, "--json").stdout)
    assert said["uploaded"] == ["README.md"] and not said["created"] and len(hub.uploads) == uploads
    assert hub.files(REPO)["README.md"] == (small_model / "README.md").read_bytes()


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(hub, push, small_model):
    push(small_model)
    whole = SupraForCausalLM.from_pretrained(small_model)
    for file in small_model.glob("model*.safetensors*"):
        file.unlink()
    whole.save_pretrained(small_model)
    said = json.loads(push(small_model, "--json").stdout)
    assert {name for name in hub.files(REPO) if "safetensors" in name} == {"model.safetensors"}
    assert "model.safetensors.index.json" in said["deleted"]


def test_an_interrupted_upload_goes_on_with_what_is_missing(hub, push, small_model, tmp_path):
    keys = {name: hashlib.sha256((small_model / name).read_bytes()).hexdigest() for name in large(small_model)}
    last = sorted(keys)[-1]
    hub.stalling.add(keys[last])
    command = [sys.executable, "-m", "rnnzoo_command", "push", str(small_model), REPO, "--no-code"]
    own = hub.environment(tmp_path / "home", "hf_alice")
    stopped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own)
    # It cannot end while one of its files hangs: however long the others take, the kill comes in the middle.
    assert hub.stalled.wait(GUARD)
    assert all(hub.arrived.acquire(timeout=GUARD) for _ in range(len(keys) - 1))
    stopped.send_signal(signal.SIGKILL)  # as a crash: nothing can be put in order
    stopped.communicate()
    assert {key for key, _ in hub.uploads} == set(keys.values()) - {keys[last]}
    assert len(hub.repositories[REPO].commits) == 1, "no part of the model is to be seen"

    hub.stalling.clear()
    hub.uploads.clear()
    push(small_model)
    assert [key for key, _ in hub.uploads] == [keys[last]]
    assert hub.files(REPO)[last] == (small_model / last).read_bytes() and len(hub.repositories[REPO].commits) == 2


def test_a_connection_that_breaks_in_a_large_file_is_made_again(hub, push, small_model):
    hub.fail("PUT", "/lfs/", 0)
    push(small_model)
    assert hub.files(REPO).keys() >= large(small_model)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, push, small_model):
    hub.fail("POST", "/commit/", 0, after=True)
    said = json.loads(push(small_model, "--json").stdout)
    repo = hub.repositories[REPO]
    assert len(repo.commits) == 2 and said["commit"] == repo.branches["main"] and "config.json" in said["uploaded"]


def test_a_busy_hub_is_asked_again_after_the_time_that_it_names(hub, push, small_model):
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "2"})
    hub.fail("POST", "/repos/create", 503)
    hub.fail("GET", f"/api/models/{REPO}$", 500)
    hub.fail("POST", "/preupload/", 502)
    started = time.monotonic()
    done = push(small_model)
    assert "the Hub answers 429; trying again in 2 s" in done.stderr and time.monotonic() - started > 2
    assert "the Hub answers 503; trying again in 1 s" in done.stderr
    assert hub.files(REPO).keys() >= large(small_model) and len(hub.repositories[REPO].commits) == 2


def test_tags_and_branches_stand_on_the_commit(hub, push, small_model):
    push(small_model, "--tag", "v1")
    repo = hub.repositories[REPO]
    assert repo.tags == {"v1": repo.branches["main"]}
    push(small_model, "--tag", "v1")
    (small_model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    refused = push(small_model, "--tag", "v1", code=1)
    assert "error: alice/tiny has a tag v1 already, on another commit" in refused.stderr
    assert len(repo.commits) == 2, "refused before anything was sent"
    said = json.loads(push(small_model, "--tag", "v2", "--branch", "next", "--json").stdout)
    assert repo.tags["v2"] == repo.branches["next"] == said["commit"] != repo.branches["main"]
    assert hub.files(REPO, "v2")["README.md"] == (small_model / "README.md").read_bytes()


def test_a_pull_request_proposes_and_changes_nothing(hub, push, small_model):
    hub.create("bob/theirs")
    said = json.loads(push(small_model, "--pr", "--json", repo="bob/theirs").stdout)
    assert said["pull_request"] == f"{hub.url}/bob/theirs/discussions/1"
    assert set(hub.files("bob/theirs")) == {".gitattributes"}
    assert hub.files("bob/theirs", "refs/pr/1").keys() >= {"config.json", *large(small_model)}
    refused = push(small_model, "--pr", "--tag", "v1", code=2)
    assert "--tag does not go with --pr" in refused.stderr


def test_a_name_alone_is_in_the_tokens_own_space(hub, push, small_model):
    assert json.loads(push(small_model, "--json", repo="tiny").stdout)["repo"] == REPO
    assert hub.files(REPO).keys() >= large(small_model)


def test_a_repository_made_by_somebody_else_in_the_same_moment_is_used(hub, push, small_model):
    hub.create(REPO)
    hub.fail("GET", f"/api/models/{REPO}$", 404, headers={"X-Error-Code": "RepoNotFound"})
    push(small_model)
    assert ("POST", "/api/repos/create") in hub.requests and hub.files(REPO).keys() >= large(small_model)
