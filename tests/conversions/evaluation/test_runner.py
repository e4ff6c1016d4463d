"""evaluate(): all columns into results.json and plots, nothing measured twice, other sections kept."""

from __future__ import annotations

import contextlib
import gzip
import io
import json

import pytest
import torch
from rich.console import Console

from rnnzoo.conversions.evaluation import Dataset, Limits, environment, evaluate, measures, show
from rnnzoo.conversions.evaluation.columns import StateSize
from rnnzoo.conversions.evaluation.parity import parity
from rnnzoo.conversions.evaluation.scoring import Stream
from rnnzoo.conversions.evaluation.store import Store, read_json, write_json
from rnnzoo.conversions.evaluation.texts import load, load_all
from rnnzoo.kernels.errors import RnnzooError
from rnnzoo.zoo.supra.configuration_supra import SupraConfig
from rnnzoo.zoo.supra.modeling_supra import SupraForCausalLM

from ..tiny import tiny_teacher, tiny_tokenizer

SMALL = Limits(
    windows=(64,),
    strided=((64, 32),),
    perplexity_tokens=400,
    task_items=4,
    position_tokens=1024,
    distances=(64, 128),
    facts=2,
    streams=1,
    recall_contexts=(200,),
    context_distances=(64,),
    ablation_tokens=128,
    contexts=(32, 64),
    decode_steps=2,
    sample_tokens=4,
    chunk=64,
)
PAIRS = [{"sentence_good": "It is in.", "sentence_bad": "It in is."}, {"sentence_good": "on", "sentence_bad": "no"}]
WORDS = [{"context": "the best of", "target": "them"}] * 3


def student(folder, **changes):
    settings = dict(
        vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, max_position_embeddings=512
    )
    SupraForCausalLM(SupraConfig(**(settings | changes))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "prose.txt").write_text("The king went to the hill and it was on the way. " * 60)
    for name, items in (("pairs", PAIRS), ("words", WORDS)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(item) + "\n" for item in items)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def measured(tmp_path_factory, files):
    base = tmp_path_factory.mktemp("run")
    folder = student(base / "student")
    write_json(folder / "results.json", {"schema": 1, "conversion": {"tokens": 5}, "teacher": {"licence": "mit"}})
    teacher = tiny_teacher("llama", base)
    seen = []
    results = evaluate(
        folder, teacher=teacher, datasets=files, limits=SMALL, progress=lambda *call: seen.append(call[0])
    )
    return folder, teacher, results, seen


def test_every_measure_has_every_column(measured):
    _, _, results, seen = measured
    evaluation = results["evaluation"]
    for part, rows in (
        ("perplexity", 6),
        ("tasks", 6),
        ("recall", 6),
        ("decode", 6),
        ("by_position", 3),
        ("recall_by_context", 3),
    ):
        assert len(evaluation[part]) == rows, part
        assert {row["column"] for row in evaluation[part]} == {"student", "teacher", "window"}
    assert {"dataset", "window", "stride", "value", "stderr", "bits_per_byte", "n_tokens", "n_windows"} <= set(
        evaluation["perplexity"][0]
    )
    assert {f"{column}: recall" for column in ("student", "teacher", "window")} <= set(seen)
    assert len(results["samples"]) == 3


def test_the_example_of_the_card_was_run(measured):
    found = measured[2]["snippet"]
    printed = io.StringIO()
    with contextlib.chdir(measured[0]), contextlib.redirect_stdout(printed):
        exec(found["code"], {})
    assert found["output"] == printed.getvalue() and "max_new_tokens=4" in found["code"]


def test_reading_at_once_and_token_by_token_agree(measured):
    (row,) = measured[2]["evaluation"]["parity"]
    assert row["column"] == "student" and row["n"] == 64 and row["context"] == 448 and row["dtype"] == "bfloat16"
    assert (
        0 <= row["max_probability"] < 0.05
        and 0 <= row["max_abs"] < 0.5
        and 0 <= row["mean_kl"] < 0.01
        and row["same_token"] > 0.8
    )


def test_parity_finds_a_state_that_is_wrong(measured, monkeypatch):
    model = SupraForCausalLM.from_pretrained(measured[0])
    right = parity(model, tiny_tokenizer(), steps=8)
    assert right.max_probability <= right.max_abs < 1e-4 and right.same_token == 1
    advance = Stream.advance
    monkeypatch.setattr(Stream, "advance", lambda self, ids: advance(self, ids.flip(1) if ids.shape[1] > 1 else ids))
    assert parity(model, tiny_tokenizer(), steps=8).max_abs > 100 * right.max_abs


def test_the_window_column_has_at_most_the_students_bytes(measured):
    evaluation = measured[2]["evaluation"]
    by = {(row["column"], row["context"]): row["state_bytes"] for row in evaluation["decode"]}
    assert by["student", 32] == by["student", 64] == evaluation["window_baseline"]["state_bytes"]
    assert by["window", 64] <= by["student", 64] and by["teacher", 64] > by["teacher", 32]


def test_other_sections_are_kept_and_files_are_whole(measured):
    folder, _, results, _ = measured
    assert read_json(folder / "results.json") == results
    assert results["conversion"] == {"tokens": 5} and results["teacher"]["licence"] == "mit"
    assert results["teacher"]["sha"] and results["model"]["model_type"] == "rnnzoo-supra"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_plots_are_there(measured):
    names = {path.name for path in (measured[0] / "plots").iterdir()}
    assert names == {
        "perplexity_by_position.png",
        "recall_by_distance.png",
        "decode_speed.png",
        "state_bytes.png",
        "layers.png",
    }
    assert all(path.stat().st_size > 5000 for path in (measured[0] / "plots").iterdir())


def test_the_same_call_again_measures_nothing(measured, files, monkeypatch):
    folder, teacher, results, _ = measured
    for name in ("perplexity", "recall", "decode", "by_position", "last_word", "minimal_pairs", "sample"):
        monkeypatch.setattr(measures, name, lambda *_, **__: pytest.fail("measured again"))
    again = evaluate(folder, teacher=teacher, datasets=files, limits=SMALL)
    assert again["evaluation"] == results["evaluation"]


@pytest.mark.parametrize(
    ("changed", "again"),
    [("rnnzoo", {"perplexity", "decode"}), ("torch", {"decode"}), ("backend", {"perplexity", "decode"})],
)
def test_what_another_version_or_backend_has_measured_is_measured_again(tmp_path, monkeypatch, changed, again):
    """Speeds depend on all versions and the backend, qualities on rnnzoo's own and the backend; old rows go."""
    folder = student(tmp_path / "student")
    limits = Limits(windows=(64,), distances=(), contexts=(16,), decode_steps=1, position_tokens=64, sample_tokens=0)
    text, other = (Dataset.of_texts(name, ["It is in the hill. " * 40]) for name in ("held out", "other"))
    before = evaluate(folder, datasets=[text, other], limits=limits)
    if changed == "backend":
        monkeypatch.setenv("RNNZOO_BACKEND", "chunked")
    else:
        version = environment._version
        monkeypatch.setattr(environment, "_version", lambda name: "9.9" if name == changed else version(name))
    called = []
    for name in ("perplexity", "decode"):
        whole = getattr(measures, name)
        monkeypatch.setattr(
            measures, name, lambda *a, name=name, whole=whole, **k: called.append(name) or whole(*a, **k)
        )
    results = evaluate(folder, datasets=[text], limits=limits)
    assert set(called) == again
    assert results["environment"][changed] != before["environment"][changed]
    kept = {"held out"} if "perplexity" in again else {"held out", "other"}
    assert {row["dataset"] for row in results["evaluation"]["perplexity"]} == kept
    assert len(results["evaluation"]["decode"]) == 1


def test_a_later_call_without_the_teacher_keeps_its_rows(measured, files):
    folder, _, results, _ = measured
    again = evaluate(folder, datasets=files[:1], limits=SMALL)
    rows = {part: sorted(map(str, again["evaluation"][part])) for part in ("perplexity", "tasks", "recall")}
    assert rows == {part: sorted(map(str, results["evaluation"][part])) for part in rows}


def test_another_student_drops_the_old_rows(tmp_path, files):
    folder = student(tmp_path / "student")
    old = {"student_sha256": "other", "perplexity": [{"column": "teacher", "value": 1.0, "dataset": "x"}]}
    write_json(folder / "results.json", {"schema": 1, "evaluation": old})
    text = Dataset.of_texts("held out", ["It is in the hill. " * 40])
    limits = Limits(windows=(64,), distances=(), contexts=(), position_tokens=64, sample_tokens=0)
    results = evaluate(folder, datasets=[text], limits=limits)
    assert {row["column"] for row in results["evaluation"]["perplexity"]} == {"student"}
    assert results["evaluation"]["columns"] == ["student"]


def test_the_table_says_not_measured_where_it_was_not(measured):
    results = json.loads(json.dumps(measured[2]))
    results["evaluation"]["recall"] = [row for row in results["evaluation"]["recall"] if row["column"] != "window"]
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    show(results, console)
    text = console.export_text()
    assert "not measured" in text and "bits per byte" in text and "Decoding" in text


def test_state_size_of_a_hybrid_grows_by_its_attention_layers_only(tmp_path):
    config = SupraConfig(
        vocab_size=320,
        hidden_size=48,
        num_hidden_layers=3,
        layer_types=["supra", "full_attention", "sliding_attention"],
        sliding_window=24,
    )
    model = SupraForCausalLM(config).eval()
    size = StateSize(model)
    for length in (20, 100):
        stream = Stream(model)
        for _ in range(length):
            stream.advance(torch.zeros(1, 1, dtype=torch.long))
        # A sliding layer may keep one token less than its window: the next step brings its own.
        assert abs(size.at(length) - stream.state_bytes()) <= size.sliding


def test_fields_tell_what_a_file_holds(files, tmp_path):
    assert [d.kind for d in load_all(files)] == ["pairs", "text", "last_word"]
    book = tmp_path / "books.jsonl"
    book.write_text(json.dumps({"text": "a " * 60_000}) + "\n" + json.dumps({"text": "short"}) + "\n")
    assert load(book).kind == "long"
    assert load_all([files[0].parent])[1].sha256 == load(files[1]).sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", b"  \n", "is empty"),
        ("binary.txt", b"\xff\xfe\x00\x80", "not readable text"),
        ("cut.txt.gz", b"\x1f\x8b\x08", "not readable text"),
        ("bad.jsonl", b"{not json", "not JSON lines"),
        ("other.jsonl", b'{"question": 1}', "question"),
    ],
)
def test_bad_files_give_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RnnzooError, match=message) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model_and_an_unknown_column_are_refused(tmp_path):
    with pytest.raises(RnnzooError, match="holds no model"):
        evaluate(tmp_path)
    with pytest.raises(RnnzooError, match="Unknown column"):
        evaluate(tmp_path, columns=("pupil",))
    with pytest.raises(RnnzooError, match="Unknown evaluation size"):
        evaluate(tmp_path, limits="huge")
    assert not list(tmp_path.iterdir())


def test_lm_eval_says_what_to_install_where_it_is_missing(tmp_path, monkeypatch):
    from rnnzoo.conversions.evaluation import harness

    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RnnzooError, match="rnnzoo\\[eval\\]"):
        harness.lm_eval_tasks(None, None, ["piqa"])


def test_rows_of_lm_eval_keep_values_errors_and_n():
    from rnnzoo.conversions.evaluation.harness import _rows

    output = {
        "results": {"piqa": {"alias": "piqa", "acc,none": 0.6, "acc_stderr,none": 0.01, "acc_norm,none": 0.62}},
        "n-samples": {"piqa": {"original": 1838, "effective": 100}},
    }
    assert _rows(output) == [
        {"task": "piqa", "metric": "acc", "value": 0.6, "stderr": 0.01, "n": 100},
        {"task": "piqa", "metric": "acc_norm", "value": 0.62, "stderr": None, "n": 100},
    ]


def test_an_interrupted_store_goes_on(tmp_path):
    store = Store(tmp_path / "evaluation.json")
    assert store.get({"a": 1}, lambda: 5) == 5
    with pytest.raises(KeyboardInterrupt):
        store.get({"a": 2}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = Store(tmp_path / "evaluation.json")
    assert again.get({"a": 1}, lambda: 6) == 5 and again.get({"a": 2}, lambda: 7) == 7
