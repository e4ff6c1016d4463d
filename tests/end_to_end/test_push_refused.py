"""What the Hub may refuse a `rnnzoo push`: each ends in one sentence, and no half of a model is there."""

from __future__ import annotations

import json
import subprocess

import pytest

from .test_push import large

REPO = "alice/tiny"


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one sentence of a failure; notes of waiting may stand before it."""
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in done.stderr
    return line


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "says"),
    [
        ("GET", "/api/models/", 429, {"Retry-After": "4000"}, "429: slow down): run the same command again in 4000 s"),
        ("POST", "/commit/", 409, {}, "was changed by somebody else during this push (409"),
        ("POST", "/commit/", 412, {}, "was changed by somebody else during this push (412"),
        ("POST", "/commit/", 403, {}, "The token may not write to alice/tiny (403"),
        ("POST", "/commit/", 400, {}, "The Hub refused the push to alice/tiny (400"),
        ("PUT", "/lfs/", 403, {}, "The token may not write to alice/tiny (403"),
    ],
)
def test_a_refusal_ends_in_one_sentence_and_no_commit(hub, push, small_model, method, path, status, headers, says):
    hub.fail(method, path, status, times=9, headers=headers, message="slow down")
    assert says in error_line(push(small_model, code=1))
    assert len(hub.repositories[REPO].commits if REPO in hub.repositories else []) <= 1


def test_a_hub_that_stays_in_trouble_is_given_up(hub, push, small_model):
    hub.fail("GET", "/api/models/", 503, times=99)
    assert "The Hub is in trouble (503): run the same command again later" in error_line(push(small_model, code=1))
    assert hub.requests.count(("GET", f"/api/models/{REPO}")) == 4


def test_tokens_and_names_that_do_not_go_are_said(hub, push, small_model):
    hub.add_token("hf_reader", "alice", write=False)
    hub.create("bob/theirs")
    assert "does not accept the token (401" in error_line(push(small_model, token="hf_wrong", code=1))
    assert "may not write to alice/tiny (403" in error_line(push(small_model, token="hf_reader", code=1))
    assert "may not write to bob/theirs (403" in error_line(push(small_model, repo="bob/theirs", code=1))
    assert "may not write to bob/new (403" in error_line(push(small_model, repo="bob/new", code=1))
    assert "There is no Hub token" in error_line(push(small_model, token=None, code=1))
    assert "is no name of a repository" in error_line(push(small_model, repo="alice/a/b", code=1))
    assert "no repository bob/none to propose" in error_line(push(small_model, "--pr", repo="bob/none", code=1))
    assert hub.blobs and not hub.uploads and REPO not in hub.repositories
    missing = error_line(push(small_model, "--branch", "refs/pr/7", repo="bob/theirs", code=1))
    assert "bob/theirs has no branch refs/pr/7 (404)" in missing


def test_offline_nothing_is_asked_and_a_dry_run_works(hub, push, small_model):
    assert "HF_HUB_OFFLINE is set" in error_line(push(small_model, code=1, HF_HUB_OFFLINE="1"))
    plan = json.loads(push(small_model, "--dry-run", "--json", token=None, HF_HUB_OFFLINE="1").stdout)
    sizes = {file["path"]: file["size"] for file in plan["files"]}
    assert {file["path"] for file in plan["files"] if file["lfs"]} == large(small_model)
    assert sizes == {path: (small_model / path).stat().st_size for path in sizes} and plan["bytes"] == sum(
        sizes.values()
    )
    assert set(plan["left_out"]) == {"checkpoint-5/x.bin", "evaluation.json", "train.log"}
    shown = push(small_model, "--dry-run").stdout
    assert "nothing was sent" in shown and "config.json" in shown and "LFS" in shown
    assert hub.requests == []
    closed = push(small_model, code=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert "The Hub at http://127.0.0.1:9 cannot be reached" in error_line(closed)


def test_private_is_private_or_refused(hub, push, small_model):
    push(small_model, "--private")
    assert hub.repositories[REPO].private
    push(small_model, "--private")
    hub.create("alice/open")
    assert "exists and is public" in error_line(push(small_model, "--private", repo="alice/open", code=1))
    assert set(hub.files("alice/open")) == {".gitattributes"}
