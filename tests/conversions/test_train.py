"""Training from scratch: it learns, goes on after a stop, and leaves a model that transformers loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rnnzoo  # noqa: F401  (registers the Auto classes)
from rnnzoo import cli
from rnnzoo.cards import render_card
from rnnzoo.conversions import memory
from rnnzoo.conversions.byte_tokenizer import byte_tokenizer
from rnnzoo.conversions.from_scratch import rows_to_batch
from rnnzoo.conversions.train import TrainSettings, train
from rnnzoo.conversions.train_config import new_config, parse_settings
from rnnzoo.kernels.errors import RnnzooError

from ..end_to_end.conftest import write_documents

FIELDS = {"hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8}
SETTINGS = TrainSettings(context=64, batch_size=4, steps=60, learning_rate=1e-2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_documents(tmp_path_factory.mktemp("text") / "text.jsonl", 60))


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "model"
    train(out, [text], arch="supra", fields=FIELDS, settings=SETTINGS, evaluate=False)
    return out


def test_loss_falls_and_the_result_says_what_was_done(trained):
    results = json.loads((trained / "results.json").read_text())
    training, model = results["training"], results["model"]
    assert training["loss_last"] < 0.7 * training["loss_first"]
    assert abs(training["held_out_loss"] - training["loss_last"]) < 0.5
    assert training["tokens"] == 60 * 4 * 64 and training["perplexity"] > 1
    assert training["data"]["training"]["tokens"] <= training["tokens"]  # the text is read several times
    assert model["architecture"] == "supra" and model["state_bytes"] > 0
    card = render_card(trained).read_text()
    assert "trained from scratch" in card and "15,360" in card and "teacher" not in card


def test_auto_classes_load_model_and_tokenizer(trained):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    assert model.num_parameters() == json.loads((trained / "results.json").read_text())["model"]["parameters"]
    inputs = tokenizer("The old river", return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 14  # and the beginning of a document
    assert len(tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])) > 14
    assert model.config.use_cache


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("tokens", [3000, 11_000])
def test_a_stopped_run_goes_on_and_ends_at_the_same_weights(trained, text, tmp_path, tokens):
    """Stopped in the first and in a later pass over the text, between two checkpoints."""
    out = tmp_path / "model"

    def stop(stage, done, total, info):
        if stage == "train" and done >= tokens:
            raise Stopped

    own = dict(arch="supra", fields=FIELDS, settings=SETTINGS, evaluate=False)
    with pytest.raises(Stopped):
        train(out, [text], **own, progress=stop)
    newest = max((out / ".rnnzoo/train").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(newest, newest.with_name("checkpoint-59"), ignore=shutil.ignore_patterns("complete", "*.pt"))
    starts = []
    train(out, [text], **own, progress=lambda stage, done, total, info: starts.append(done))
    assert 0 < starts[0] <= tokens
    ours, theirs = load_file(out / "model.safetensors"), load_file(trained / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len((out / ".rnnzoo/train/metrics.jsonl").read_text().splitlines()) == 60
    with pytest.raises(RnnzooError, match="learning_rate was 0.01, is 0.02"):
        train(out, [text], **(own | {"settings": TrainSettings(64, 4, steps=60, learning_rate=2e-2)}))


def test_only_the_command_changes_how_the_process_keeps_memory(text, tmp_path, monkeypatch, capsys):
    """A library call leaves malloc as its caller has set it; the command, whose process is its own, sets it."""
    asked = []
    monkeypatch.setattr(memory, "_glibc", asked.append)
    settings = TrainSettings(context=64, batch_size=2, steps=1)
    train(tmp_path / "library", [text], arch="supra", fields=FIELDS, settings=settings, evaluate=False)
    assert "mallopt" not in asked
    small = ["--hidden-size", "16", "--layers", "1", "--context", "64", "--steps", "1", "--no-evaluate", "--quiet"]
    assert cli._run(["train", "--arch", "supra", "--data", text, "--out", str(tmp_path / "command"), *small]) == 0
    assert "mallopt" in asked


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resume_that_fails_deletes_nothing(text, tmp_path):
    """A damaged file of tokens is named, and everything else, checkpoints first, is still there."""
    out = tmp_path / "model"

    def stop(stage, done, total, info):
        if stage == "train" and done >= 5000:
            raise Stopped

    own = dict(arch="supra", fields=FIELDS, settings=SETTINGS, evaluate=False)
    with pytest.raises(Stopped):
        train(out, [text], **own, progress=stop)
    for name in ("evaluation", "training"):
        damaged = out / ".rnnzoo" / "data" / f"{name}.safetensors"
        damaged.write_bytes(b"damaged")
        before = contents(out)
        assert any("checkpoint-" in str(path) for path in before)
        with pytest.raises(RnnzooError, match=str(damaged)):
            train(out, [text], **own)
        assert before.items() <= contents(out).items()
        damaged.unlink()
    starts = []
    train(out, [text], **own, progress=lambda stage, done, total, info: starts.append(done) if stage == "train" else 0)
    assert starts[0] > 0


def test_a_restart_with_text_that_is_too_short_does_not_cost_the_old_model(trained, text, tmp_path):
    out, short = tmp_path / "model", tmp_path / "short.jsonl"
    shutil.copytree(trained, out)
    write_documents(short, 2)
    before = contents(out)
    own = dict(arch="supra", fields=FIELDS, settings=TrainSettings(context=100_000, steps=9), evaluate=False)
    with pytest.raises(RnnzooError, match="less than one sequence of 100000"):
        train(out, [str(short)], **own, restart=True)
    assert contents(out) == before
    train(out, [str(text)], arch="supra", fields=FIELDS, settings=SETTINGS, evaluate=False)
    assert contents(out).keys() == before.keys()


def test_documents_do_not_leak():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    batch = rows_to_batch([{"input_ids": torch.arange(6), "seq_ids": documents[0]}])
    assert batch["labels"].tolist() == [[0, 1, 2, -100, 4, -100]] and torch.equal(batch["seq_ids"], documents)
    assert "seq_ids" not in rows_to_batch([{"input_ids": torch.arange(6), "seq_ids": torch.zeros(6).long()}])


def test_byte_tokenizer_takes_any_text_and_survives_saving(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for again in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("plain", "Grüße\n\n 日本 😀\t\x00", " <|endoftext", "a\r\nb"):
            ids = again(text)["input_ids"]
            assert ids == [256, *text.encode()]
            assert again.decode(ids, skip_special_tokens=True) == text


def test_configurations_from_options_and_from_a_file(tmp_path):
    words = byte_tokenizer()
    config = new_config("mamba2", None, None, {**FIELDS, "ssm_state_size": 16}, words)
    assert (config.vocab_size, config.bos_token_id, config.pad_token_id) == (258, 256, 257)
    config.save_pretrained(tmp_path)
    again = new_config(None, tmp_path / "config.json", None, {}, words)
    assert again.to_dict() == config.to_dict()
    hybrid = new_config("mamba2", None, None, FIELDS | {"layer_types": ["mamba2", "hedgehog"], "num_sinks": 2}, words)
    assert hybrid.num_sinks == 2
    assert parse_settings(["qk_norm=true", "window_sizes=[[3]]"]) == {"qk_norm": True, "window_sizes": [[3]]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "mamba3"], "'mamba3' is no architecture; near it are"),
        (["--arch", "supra", "--size", "9T"], "'9T' is no size of supra"),
        (["--arch", "supra", "--set", "hiden_size=9"], "'hiden_size' is no setting of supra; near it are hidden_size"),
        (["--arch", "supra", "--set", "hidden_size"], "write --set field=value"),
        (["--arch", "supra", "--set", "hidden_size=wide"], "This supra model cannot be built"),
        (["--config", "absent.json"], "There is no configuration absent.json"),
        ([], "Say either which architecture"),
        (["--arch", "supra", "--tokens", "1k", "--steps", "3"], "Say either tokens or steps"),
        (["--arch", "supra", "--tokenizer", "no/where"], "no/where holds no tokenizer"),
        (["--arch", "supra", "--eval-fraction", "1.5"], "between 0 and 1"),
        (["--arch", "supra", "--data", "absent.txt"], "There is no file or folder absent.txt"),
        (["--arch", "supra", "--data", "EMPTY"], "is empty"),
        (["--arch", "supra", "--data", "SHORT"], "has 1 documents; at least 2 are needed"),
        (["--arch", "supra", "--context", "100000"], "less than one sequence of 100000"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, words, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("One line.\n")
    files = {"EMPTY": str(tmp_path / "empty.txt"), "SHORT": str(tmp_path / "short.txt")}
    arguments = [files.get(argument, argument) for argument in arguments]
    arguments += [] if "--data" in arguments else ["--data", text]
    assert cli._run(["train", *arguments, "--layers", "1", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert words in said, said
    assert not (tmp_path / "out").exists()


def test_command_line_trains_with_evaluation_and_card(text, tmp_path, capsys, few_tokens):
    out = tmp_path / "model"
    small = ["--hidden-size", "16", "--layers", "1", "--context", "64", "--batch-size", "2", "--steps", "4"]
    options = ["--set", "ssm_state_size=8", "--dtype", "bfloat16", "--accumulate", "2", "--eval-data", text, "--json"]
    other = str(write_documents(tmp_path / "other.jsonl", 30, seed=5))
    assert cli._run(["train", "--arch", "mamba2", "--data", other, "--out", str(out), *small, *options]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results["training"]["tokens"] == 4 * 4 * 64 and "train: " in captured.err
    assert results["evaluation"]["perplexity"][0]["column"] == "student"
    assert "## Training" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["ssm_state_size"] == 8


@pytest.mark.slow
def test_two_processes_train_one_model(text, tmp_path):
    """torchrun: each has its own batches, the first writes, and a second call finds all done."""
    out = tmp_path / "model"
    small = ["--layers", "1", "--hidden-size", "16", "--context", "64", "--batch-size", "2", "--no-evaluate"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*run, "-m", "rnnzoo", "train", "--arch", "supra", "--data", text, "--out", str(out), *small]
    for _ in range(2):
        done = subprocess.run([*command, "--steps", "6", "--json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["training"]["tokens"] == 6 * 2 * 2 * 64
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
