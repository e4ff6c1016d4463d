"""The `rnnzoo` command: quick help, exit codes 0, 1, 2 and 130, errors on one line, results for programs on stdout."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest

from rnnzoo import cli
from rnnzoo.cli.progress import ProgressReport
from rnnzoo.cli.quantities import BYTES, COUNT, format_bytes, format_count, format_seconds
from rnnzoo.kernels.errors import RnnzooError


def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rnnzoo_command", *arguments], capture_output=True, text=True, **kwargs
    )


def call(*arguments: str) -> int:
    """In this process, which has torch loaded already."""
    return cli._run(list(arguments))


@pytest.fixture
def convert_that(monkeypatch):
    """Puts a stand-in in the place of conversions.convert: what it returns or raises is the test's."""

    def put(function):
        module = types.ModuleType("rnnzoo.conversions.convert")
        module.convert = function
        monkeypatch.setitem(sys.modules, "rnnzoo.conversions.convert", module)

    return put


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_help_of_every_command_loads_neither_torch_nor_transformers():
    script = (
        "import os, sys; os.environ['RNNZOO_NO_REGISTER'] = '1'\n"
        "from rnnzoo import cli\n"
        "assert cli._run(['--help']) == 0\n"
        "for name in cli.COMMANDS: assert cli._run([name, '--help']) == 0\n"
        "loaded = {'torch', 'transformers', 'rich', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--state-budget" in done.stdout and "--against" in done.stdout


def test_console_script_shows_help_and_version_and_leaves_the_environment_alone():
    script = (
        "import os, sys, rnnzoo_command\n"
        "try: rnnzoo_command.main()\n"
        "finally: assert 'torch' not in sys.modules and 'RNNZOO_NO_REGISTER' not in os.environ"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RNNZOO_NO_REGISTER"}
    for flag, words in (("--help", "convert"), ("--version", cli.__name__.split(".")[0])):
        command = [sys.executable, "-c", script, flag]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and words in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["no-such-command"], "no-such-command"),
        (["convert", "--no-such-flag"], "--no-such-flag"),
        (["convert", "embedded"], "--out"),
        (["convert", "embedded", "--out", "x", "--state-budget", "much"], "4MB"),
        (["convert", "embedded", "--out", "x", "--tokens", "-3"], "500k"),
        (["generate", "x"], "PROMPT"),
        (["generate", "x", "  "], "empty"),
        (["card"], "DIR"),
    ],
)
def test_wrong_usage_is_exit_2_and_one_line(capsys, arguments, words):
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and words in err and "--help" in err


def test_failure_is_exit_1_and_one_line(capsys, convert_that, tmp_path):
    convert_that(raising(RnnzooError("BERT is an encoder.\nGive a decoder.")))
    assert call("convert", "bert", "--out", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: BERT is an encoder. Give a decoder.\n")


def test_debug_shows_the_traceback_and_the_line_after_it(capsys, convert_that, monkeypatch):
    monkeypatch.setenv("RNNZOO_DEBUG", "1")
    convert_that(raising(ZeroDivisionError("by zero")))
    assert call("convert", "--out", "x") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: ZeroDivisionError: by zero\n")


def test_unexpected_failure_is_one_line_and_tells_how_to_see_more(capsys, convert_that, monkeypatch):
    monkeypatch.delenv("RNNZOO_DEBUG", raising=False)
    convert_that(raising(ZeroDivisionError("by zero")))
    assert call("convert", "--out", "x") == 1
    assert capsys.readouterr().err == "error: ZeroDivisionError: by zero (RNNZOO_DEBUG=1 shows where)\n"


def test_full_disk_and_missing_permission_are_said_in_a_sentence(capsys, convert_that):
    convert_that(raising(OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")))
    assert call("convert", "--out", "x") == 1
    assert "disk is full at out/model.safetensors" in capsys.readouterr().err
    convert_that(raising(PermissionError(errno.EACCES, "Permission denied", "out")))
    assert call("convert", "--out", "x") == 1
    assert "No permission to write or read at out" in capsys.readouterr().err


def test_stopping_says_how_to_go_on_and_never_to_start_again(capsys, convert_that):
    convert_that(raising(KeyboardInterrupt()))
    assert call("convert", "embedded", "--restart", "--out", "my model") == 130
    assert "goes on from here: rnnzoo convert embedded --out 'my model'\n" in capsys.readouterr().err


def test_stdout_holds_the_json_document_and_nothing_else(capsys, convert_that):
    def convert(teacher, recipe, out, *, progress, **options):
        print("a library speaks")
        progress("align", 0, 100, {})
        progress("align", 100, 100, {"loss": 0.5})
        return {"schema": 1, "evaluation": {"perplexity": []}, "options": options, "nan": float("nan")}

    convert_that(convert)
    assert call("convert", "--out", "x", "--json", "--state-budget", "1.5MB", "--tokens", "500k") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["options"]["state_budget"] == 1_500_000 and document["options"]["tokens"] == 500_000
    assert document["nan"] is None
    assert "a library speaks" in err and "align: 100 of 100" in err and "loss 0.5" in err

    assert call("convert", "--out", "x", "--json", "--quiet") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema"] == 1 and err == ""


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "rnnzoo_command", "--help"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.stderr == ""


def test_generate_from_what_is_no_model_is_said_in_a_sentence(capsys, tmp_path):
    assert call("generate", str(tmp_path), "Hello") == 1
    assert "there is no config.json" in capsys.readouterr().err
    assert call("generate", str(tmp_path / "absent"), "Hello") == 1
    assert "There is no folder" in capsys.readouterr().err


def test_list_and_env_know_this_machine(capsys):
    assert call("list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"supra", "hedgehog", "mamba2"} <= set(listed["architectures"])
    assert {"rnnzoo", "supra", "mamba-in-llama"} <= set(listed["recipes"])
    assert {"reference", "chunked"} <= set(listed["kernels"]["gated_linear_attention"])

    assert call("env", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["packages"]["torch"] and shown["devices"]["cpu"]
    assert all(backend["available"] or backend["reason"] for table in shown["kernels"].values() for backend in table)

    assert call("list") == 0 and call("env") == 0
    words = capsys.readouterr().out
    assert "mamba-in-llama" in words and "chunked" in words


def test_bench_measures_every_backend_and_says_what_it_leaves_out(capsys, tmp_path):
    few = ("--operation", "short_conv", "--length", "8", "--length", "16", "--seconds", "0.001")
    assert call("bench", "kernels", *few, "--out", str(tmp_path), "--json") == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert shown == json.loads((tmp_path / "kernels.json").read_text())
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "kernels.png").exists() == drawn and ("no plot: " in captured.err) != drawn
    assert shown["machine"]["copy_bytes"] > 0
    modes = {(row["what"], row["mode"], row["time"]) for row in shown["rows"]}
    assert {("chunked", mode, time) for mode in ("forward", "forward+backward") for time in (8, 16)} <= modes
    assert ("chunked", "step", 1) in modes
    assert all(row["seconds"] > 0 and row["share"] > 0 for row in shown["rows"])
    assert "short_conv, silu: no triton (" in captured.err
    assert call("bench", "kernels", "--operation", "fast_conv") == 1
    assert "--operation 'fast_conv' is no recurrence; known are delta_rule," in capsys.readouterr().err
    assert call("bench", "kernels", *few, "--out", "/proc/nowhere") == 1
    words = capsys.readouterr().err
    assert "--out /proc/nowhere: the folder cannot be made" in words and "measuring" not in words
    assert call("bench", "kernels", "--seconds", "0") == 2


def test_env_kernels_compiles_and_tells_what_runs(capsys):
    assert call("env", "--kernels") == 0
    words = capsys.readouterr().out
    assert words.count("reference: available") >= 7 and "triton" in words


def test_env_says_in_a_line_for_each_operation_what_runs_here(capsys):
    assert call("env") == 0
    words = capsys.readouterr().out
    lines = [line.split() for line in words.splitlines()]
    assert ["long_conv", "chunked"] in lines and sum(line[:1] == ["delta_rule"] for line in lines) == 1
    assert "reference" not in words  # what does not run is for --kernels


def test_env_kernels_says_what_the_environment_chose(capsys, monkeypatch):
    monkeypatch.setenv("RNNZOO_BACKEND", "chunked")
    assert call("env", "--kernels") == 0
    words = capsys.readouterr().out
    assert words.count("chunked: chosen by RNNZOO_BACKEND") >= 7 and "first choice" not in words
    monkeypatch.setenv("RNNZOO_BACKEND", "cpu")
    assert call("env", "--kernels") == 0
    assert "RNNZOO_BACKEND asks for 'cpu', which cannot run here: chunked serves instead" in capsys.readouterr().out
    monkeypatch.setenv("RNNZOO_BACKEND", "fast")
    for options in ([], ["--kernels"]):
        assert call("env", *options) == 0
        assert "RNNZOO_BACKEND=fast: no operation has the backend 'fast'; known are" in capsys.readouterr().out


def test_quantities_read_and_write_units():
    assert BYTES.convert("4MB", None, None) == 4_000_000 and BYTES.convert("512KiB", None, None) == 2**19
    assert COUNT.convert("0.5M", None, None) == COUNT.convert("500k", None, None) == 500_000
    assert format_bytes(1_474_560) == "1.47 MB" and format_count(134_515_008) == "135M"
    assert format_seconds(3725) == "1 h 2 min" and format_seconds(59.7) == "1 min 0 s"
    shown = {0: "0 s", 3e-6: "under 0.001 s", 0.0342: "0.034 s", 1: "1 s", 9.94: "9.9 s", 9.96: "10 s", 12.3: "12 s"}
    assert {seconds: format_seconds(seconds) for seconds in shown} == shown


def test_speed_of_a_resumed_stage_counts_this_run_only(capsys, monkeypatch):
    clock = iter([100.0, 100.0, 100.0, 140.0, 140.0, 140.0])
    monkeypatch.setattr("rnnzoo.cli.progress.time.monotonic", lambda: next(clock))
    with ProgressReport() as progress:
        progress("distill", 90_000, 100_000, {})
        progress("distill", 94_000, 100_000, {"loss": 1.25})
    assert capsys.readouterr().err.splitlines()[-1] == "distill: 94k of 100k, 100/s, 1 min 0 s left, loss 1.25"
