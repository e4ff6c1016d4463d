"""`--data`: every format gives the same documents, the order is the seed's, splits are disjoint, nothing is lost."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import random

import pytest
import torch

from rnnzoo.conversions.data import (
    PackedTokens,
    TextHashes,
    check_sequence_length,
    corpus_from_texts,
    mixed_corpus,
    open_corpus,
    pack,
    split_of,
)
from rnnzoo.conversions.data import corpus as corpus_module
from rnnzoo.kernels.errors import RnnzooError

from .tiny import tiny_config, tiny_tokenizer

WORDS = (
    "river stone cloud paper market winter garden letter window bridge silver engine morning harbour lantern".split()
)


def documents(data, text_field="text", *, seed=0, tokenizer=None):
    return open_corpus(data, text_field, tokenizer=tokenizer).documents(seed=seed)


def prose(count: int, words: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) + f" number {i}." for i in range(count)]


def write_lines(path, texts, field="text"):
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    return path


# Sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "folder", "wrapped.json"]
)
def test_every_format_gives_the_same_documents(name, tmp_path):
    texts, path = prose(20), tmp_path / name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"text": texts, "n": list(range(20))}), path)
    elif name == "folder":
        (path / "deep" / "er").mkdir(parents=True)
        (path / ".hidden").mkdir()
        write_lines(path / "deep" / "er" / "b.jsonl", texts[:10])
        write_lines(path / "a.jsonl.gz", texts[10:])
        write_lines(path / ".hidden" / "c.jsonl", ["hidden"])
        (path / "picture.png").write_bytes(b"\x89PNG\0")
        (path / "empty.txt").write_text("")
    elif name == "wrapped.json":
        path.write_text(json.dumps({"version": 1, "data": [{"text": text} for text in texts]}))
    else:
        write_lines(path, texts)
    found = list(documents(path))
    assert sorted(found) == sorted(texts)
    assert found == list(documents(path)) != list(documents(path, seed=1))


def test_text_is_cut_between_paragraphs_and_where_wikitext_articles_begin(tmp_path):
    paragraphs = prose(400, 100)
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    pieces = list(documents(tmp_path / "a.txt"))
    assert len(pieces) > 10
    assert sorted(p for piece in pieces for p in piece.strip().split("\n\n")) == sorted(paragraphs)
    article = " = Title {} = \n \n Some words . \n \n = = Section = = \n \n More words . \n"
    with gzip.open(tmp_path / "wiki.txt.gz", "wt") as file:
        file.write("".join(article.format(i) for i in range(5)))
    assert sorted(documents(tmp_path / "wiki.txt.gz")) == [article.format(i) for i in range(5)]


def test_several_sources_are_mixed_in_proportion_to_their_size(tmp_path):
    write_lines(tmp_path / "large.jsonl", [f"large {text}" for text in prose(300)])
    write_lines(tmp_path / "small.jsonl", [f"small {text}" for text in prose(100)])
    corpus = open_corpus([tmp_path / "large.jsonl", tmp_path / "small.jsonl"])
    assert corpus.source == "large.jsonl, small.jsonl"
    first = [text.split()[0] for text in itertools.islice(corpus.documents(), 200)]
    assert 30 <= first.count("small") <= 70
    mixed = mixed_corpus([(corpus_from_texts(["a"] * 300, "A"), 3), (corpus_from_texts(["b"] * 100, "B"), 1)])
    assert mixed.source == "A; B"
    assert 30 <= list(itertools.islice(mixed.documents(), 200)).count("b") <= 70


def test_no_more_is_read_than_the_buffer_and_what_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "BUFFER_CHARACTERS", 2_000)
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield f"document {i} " + "x" * 90

    stream = corpus_module._shuffled(endless(), 0, 2_000)
    taken = [next(stream) for _ in range(10)]
    assert len(read) < 40
    assert taken != sorted(taken)


def test_chats_are_rendered_with_the_template_and_without_one_as_roles(tmp_path):
    chat = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    tokenizer = tiny_tokenizer()
    assert list(documents(tmp_path / "c.jsonl", tokenizer=tokenizer)) == [
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    ]
    assert list(documents(tmp_path / "c.jsonl")) == ["user: Hello?\n\nassistant: Yes."]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": ["broken"]}) + "\n")
    with pytest.raises(RnnzooError, match="line 1: its messages cannot be rendered"):
        list(documents(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"  \n \n", "holds no text"),
        ("a.txt", b"text\n\x00\x01binary", "a.txt is binary data.*line 2"),
        ("a.txt", "naïve".encode("latin-1"), "not UTF-8 text"),
        ("a.txt.gz", b"no gzip at all", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20], "not a whole gzip file"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x", "id": 3}\n', "no text in a field 'text'; its fields are body, id.*--text-field"),
        ("a.jsonl", b'{"text": 3}\n', "no text in a field 'text'"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is list, not an object"),
        ("a.parquet", b"PAR1 nonsense", "not a readable parquet file"),
        ("a.docx", b"x", "unknown format"),
    ],
)
def test_what_is_no_data_is_refused(name, content, says, tmp_path):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RnnzooError, match=says):
        list(open_corpus(tmp_path / name).documents())


def test_what_is_not_there_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "hub_reachable", lambda: False)
    with pytest.raises(RnnzooError, match="no file or folder missing.txt"):
        open_corpus("missing.txt")
    with pytest.raises(RnnzooError, match="holds no data file"):
        open_corpus(tmp_path)
    pytest.importorskip("datasets")
    with pytest.raises(RnnzooError, match="Hub dataset it cannot be reached"):
        open_corpus("some/dataset")


def test_another_text_field_can_be_named(tmp_path):
    write_lines(tmp_path / "a.jsonl", prose(5), field="body")
    assert sorted(documents(tmp_path / "a.jsonl", "body")) == sorted(prose(5))


# Splits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 40, 3000])
def test_splits_are_disjoint_complete_and_the_same_for_every_seed(count):
    corpus = corpus_from_texts(prose(count), "x")
    splits = {name: set(corpus.documents(name)) for name in ("evaluation", "calibration", "training")}
    assert set.union(*splits.values()) == set(prose(count))
    assert sum(map(len, splits.values())) == count
    assert all(splits.values())
    assert all(set(corpus.documents(name, seed=9)) == found for name, found in splits.items())
    assert len(splits["training"]) >= count * 0.87 or count == 3
    if count == 3000:
        assert all(split_of(text) == name for name, found in splits.items() for text in found)


def test_a_source_too_small_to_be_split_is_refused():
    with pytest.raises(RnnzooError, match="x has 2 documents; at least 3"):
        list(corpus_from_texts(prose(2) * 2, "x").documents("training"))


# Packing -------------------------------------------------------------------------------------------------------------


def test_packed_rows_hold_the_documents_in_order_with_their_boundaries():
    tokenizer, texts = tiny_tokenizer(), prose(30, 20)
    packed = pack(texts, tokenizer, 64, 1_000_000, source="here")
    ids = tokenizer(texts)["input_ids"]
    stream = list(itertools.chain(*ids))
    assert packed.input_ids.flatten().tolist() == stream[: len(stream) // 64 * 64]
    assert packed.num_tokens == len(packed) * packed.seq_len == len(stream) // 64 * 64
    ends = set(itertools.accumulate(map(len, ids)))
    starts = {0, *range(0, packed.num_tokens, 64), *ends}
    for row in range(len(packed)):
        item = packed[row]
        assert item["input_ids"].dtype == item["seq_ids"].dtype == torch.int64
        changes = [t for t in range(1, 64) if item["seq_ids"][t] != item["seq_ids"][t - 1]]
        assert changes == [t for t in range(1, 64) if row * 64 + t in starts]
        assert item["seq_ids"][0] == 0


def test_packing_stops_reading_when_there_is_enough_and_reports_progress():
    read, seen = [], []

    def stream():
        for text in prose(10_000, 200):
            read.append(text)
            yield text

    packed = pack(stream(), tiny_tokenizer(), 128, 5_000, progress=lambda done, total: seen.append((done, total)))
    assert packed.num_tokens == 39 * 128
    assert len(read) < 200
    assert seen[-1] == (39 * 128, 39 * 128)


def test_too_little_text_is_used_whole_with_a_warning_or_refused(caplog):
    with caplog.at_level(logging.WARNING):
        packed = pack(prose(3), tiny_tokenizer(), 64, 10_000, name="calibration")
    assert f"the calibration text has only {packed.num_tokens} of the 9984 tokens" in caplog.text
    with pytest.raises(RnnzooError, match=r"The training text \(here\) has \d+ tokens, less than one sequence of 5000"):
        pack(prose(3), tiny_tokenizer(), 5000, 10_000, source="here")


def test_one_large_document_does_not_crowd_out_the_others():
    book = "Z" * 12_800  # a token a letter
    packed = pack([book, *prose(400, 80, seed=1)], tiny_tokenizer(), 64, 12_800)
    of_book = (packed.input_ids == tiny_tokenizer()("Z")["input_ids"][0]).sum()
    assert of_book == packed.num_tokens // 16 // 64 * 64
    alone = pack([book], tiny_tokenizer(), 64, 12_800)
    assert alone.num_tokens == 12_800  # where there is nothing else, all of it is used


def test_long_documents_fill_whole_rows_before_short_ones_are_used():
    mixed = [text for pair in zip(prose(20, 30), prose(20, 300, seed=1), strict=True) for text in pair]
    packed = pack(mixed, tiny_tokenizer(), 256, 256 * 10, long_documents=True)
    assert (packed.seq_ids == 0).all()
    everything = pack(mixed, tiny_tokenizer(), 256, 10**6, long_documents=True)
    assert (everything.seq_ids > 0).any()
    total = sum(map(len, tiny_tokenizer()(mixed)["input_ids"]))
    assert total - 256 < everything.num_tokens <= total


def test_an_endless_stream_without_long_documents_ends():
    packed = pack((f"short text {i}" for i in itertools.count()), tiny_tokenizer(), 256, 1024, long_documents=True)
    assert packed.num_tokens == 1024


def test_the_same_documents_give_the_same_hash_and_other_boundaries_another(tmp_path):
    corpus, tokenizer = corpus_from_texts(prose(100), "x"), tiny_tokenizer()
    first, again = (pack(corpus.documents(seed=3), tokenizer, 64, 2000) for _ in range(2))
    assert first.sha256 == again.sha256 != pack(corpus.documents(seed=4), tokenizer, 64, 2000).sha256
    again.seq_ids[0, -1] += 1
    assert first.sha256 != again.sha256


def test_tokens_are_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    packed = pack(prose(50), tiny_tokenizer(), 64, 2000, name="training", source="here")
    packed.save(tmp_path / "tokens.safetensors")
    again = PackedTokens.load(tmp_path / "tokens.safetensors")
    assert again.record() == packed.record() == {"sha256": packed.sha256, "tokens": 1984, "source": "here"}
    assert again.hashes.sha256 == packed.hashes.sha256
    assert (again.hashes.name, again.hashes.overlap(packed.hashes).fraction) == ("training", 1.0)

    def full(*_, **__):
        (tmp_path / "b.safetensors.partial").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RnnzooError, match="disk is full"):
        packed.save(tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.safetensors"]
    (tmp_path / "tokens.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(RnnzooError, match="missing or damaged"):
        PackedTokens.load(tmp_path / "tokens.safetensors")


def test_documents_of_the_evaluation_are_left_out():
    texts = prose(60, 40)
    held = TextHashes.of(texts[:5], "evaluation")
    packed = pack(texts, tiny_tokenizer(), 64, 10**6, exclude=[held])
    assert packed.hashes.overlap(held).paragraphs == 0
    assert len(packed.hashes.paragraphs) == 55


def test_a_sequence_must_fit_the_teachers_positions():
    check_sequence_length(512, tiny_config())
    for length in (513, 1):
        with pytest.raises(RnnzooError, match=f"length of {length} does not suit tiny.*up to 512"):
            check_sequence_length(length, tiny_config(), "tiny")
