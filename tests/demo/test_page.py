"""The demo's page: what it shows is what was measured, escaped; it is local; and a missing Gradio is one sentence."""

from __future__ import annotations

import builtins
import json
import re
import socket
import urllib.request
from xml.etree import ElementTree

import pytest

from rnnzoo import cli
from rnnzoo.demo import drawing
from rnnzoo.demo.page import Answers, build_page, expect_free, import_gradio, serve
from rnnzoo.demo.streaming import Sampling, Snapshot, Speaker
from rnnzoo.kernels.errors import RnnzooError

from ..conversions.tiny import tiny_model, tiny_teacher, tiny_tokenizer
from .test_streaming import recurrent


@pytest.fixture(scope="module")
def speakers() -> list[Speaker]:
    student = Speaker("little <b>", "student", recurrent(), tiny_tokenizer())
    return [student, Speaker("large", "teacher", tiny_model("llama"), tiny_tokenizer())]


def parsed(text: str) -> ElementTree.Element:
    """As XML, which finds whatever is not closed or not escaped; control characters alone are none of it."""
    return ElementTree.fromstring(re.sub(r"[\x00-\x08\x0b-\x1f]", "", text))


def test_a_panel_shows_speed_memory_and_text(speakers):
    snapshot = Snapshot("answering", "1 < 2 & <script>alert(1)</script>", 20, 20, 11, 0.5, 2.0, 4_000_000)
    root = parsed(drawing.panel(speakers[0], snapshot))
    shown = "|".join(text.strip() for text in root.itertext())
    assert "5.0|tokens/s" in shown and "4 MB|state in memory" in shown and "31|tokens so far" in shown
    assert "1 < 2 & <script>alert(1)</script>" in shown and root.find(".//script") is None
    assert "answering: 11 tokens in 2.0 s; prompt of 20 tokens read in 0.5 s" in shown
    assert "student: recurrent, 2 layers" in shown and root.get("data-phase") == "answering"
    assert root.find(".//span[@class='zoo-caret']") is not None
    assert parsed(drawing.panel(speakers[1], Snapshot("end", "x"))).find(".//span[@class='zoo-caret']") is None


def test_a_hybrid_is_called_one():
    model = recurrent(num_hidden_layers=3, layer_types=["mamba2", "full_attention", "mamba2"])
    assert drawing.what_it_is(model).startswith("hybrid, 2 recurrent and 1 attention layers")


def test_the_chart_has_a_line_for_each_and_a_dot_where_it_is(speakers):
    now = (Snapshot(read_tokens=64, state_bytes=speakers[0].memory.at(64)), None)
    root = parsed(drawing.chart(speakers, now))
    lines = [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in root.iter("polyline")]
    flat, rising = ({y for _, y in line} for line in lines)
    assert len(flat) == 1 and len(rising) == len(lines[1])
    dots = list(root.iter("circle"))
    assert len(dots) == 1 and float(dots[0].get("cy")) == min(flat)
    assert (float(dots[0].get("cx")), min(flat)) == lines[0][2]  # 16, 32, 64 tokens
    for speaker in speakers:
        size = drawing.format_bytes(speaker.memory.at(32768))
        assert f"{speaker.role}: {size}" in "".join(root.itertext())


def test_labels_of_near_lines_do_not_overlap(speakers):
    root = parsed(drawing.chart([speakers[1], speakers[1]], (None, None)))
    places = [float(t.get("y")) for t in root.iter("text") if (t.text or "").startswith("teacher: ")]
    assert abs(places[0] - places[1]) >= 16


def test_what_is_drawn_ends_with_the_last_step_and_a_stop_is_for_one_page(speakers):
    answers = Answers(speakers)
    sampling = Sampling(temperature=0, max_new_tokens=5)
    *_, final = answers.ask("a", "the sea", sampling)
    assert [snapshot.phase for snapshot in final] == ["length", "length"]
    first, second = answers.ask("a", "the sea", sampling), answers.ask("b", "the sea", sampling)
    next(first), next(second)
    answers.stop("b")
    answers.stop("nobody")
    assert {snapshot.phase for snapshot in list(second)[-1]} == {"stopped"}
    assert {snapshot.phase for snapshot in list(first)[-1]} == {"length"}
    assert not answers._stops


def test_a_taken_port_and_an_unknown_host_are_one_sentence_before_anything_is_loaded(capsys, tmp_path):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RnnzooError, match=f"127.0.0.1, port {port} .*in use.*another --port"):
            expect_free("127.0.0.1", port)
        assert cli._run(["demo", str(tmp_path / "absent"), "--port", str(port)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "give another --port" in err
    with pytest.raises(RnnzooError, match="give another --port or --host"):
        expect_free("192.0.2.1", None)


def test_a_missing_gradio_is_one_sentence(capsys, monkeypatch, tmp_path):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli._run(["demo", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "error: The demo needs Gradio, which is not installed: pip install 'rnnzoo[demo]'.\n"
    )


def test_bad_folders_and_teachers_are_one_sentence(capsys, tmp_path):
    pytest.importorskip("gradio")
    assert cli._run(["demo", str(tmp_path), "--no-browser"]) == 1
    assert "there is no config.json" in capsys.readouterr().err
    folder = tiny_teacher("llama", tmp_path)
    assert cli._run(["demo", str(folder), "--teacher", str(tmp_path / "absent"), "--no-browser"]) == 1
    err = capsys.readouterr().err
    assert "There is no folder" in err and "loading" not in err, "found out before the student was loaded"


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_is_served_to_this_machine_and_names_nothing_outside(speakers, count):
    gradio = pytest.importorskip("gradio")
    page, address = serve(Answers(speakers[:count]), host="127.0.0.1", port=None, browser=False)
    try:
        assert address.startswith("http://127.0.0.1:") and page.share_url is None
        with urllib.request.urlopen(address) as answer:
            text, policy = answer.read().decode(), answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy
        assert not re.search(r"""(?:<script[^>]*src|<link[^>]*href)=["'](?:https?:)?//(?!127\.0\.0\.1)""", text)
        config = json.loads(urllib.request.urlopen(address + "config").read())
        assert config["analytics_enabled"] is False
        assert not any("google" in sheet for sheet in config.get("stylesheets") or [])
        shown = {part["props"].get("elem_id") for part in config["components"]}
        assert {"prompt", "run", "stop", "memory", "student"} <= shown and ("teacher" in shown) == (count == 2)
    finally:
        page.close(verbose=False)
    assert gradio is import_gradio()


def test_the_button_streams_panels_and_says_what_is_wrong(speakers):
    gradio = pytest.importorskip("gradio")
    page = build_page(Answers(speakers))
    ask = next(fn.fn for fn in page.fns.values() if fn.name == "ask")
    request = gradio.Request(session_hash="one")
    settings = (False, "", 0, 1.0, 0, 1.0, 3, 0)
    steps = list(ask("the sea", *settings, request))
    assert all(len(step) == 5 for step in steps)
    assert parsed(steps[-1][0]).get("data-phase") == parsed(steps[-1][1]).get("data-phase") == "length"
    with pytest.raises(gradio.Error, match="The prompt is empty"):
        list(ask(" ", *settings, request))
    with pytest.raises(gradio.Error, match="A setting is empty"):
        list(ask("the sea", *settings[:-1], None, request))
