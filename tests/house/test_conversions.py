"""Conversions know architectures by what `Mixer` says of them, never by name."""

from __future__ import annotations

import re
from pathlib import Path

from rnnzoo.zoo.core.registry import architectures, config_class

ROOM = Path(__file__).resolve().parents[2] / "conversions"
ORDINARY = {"based", "transformer"}  # words of the language too


def named(text: str) -> list[str]:
    """Architectures, and classes of theirs, that a text names; titles of papers, in capitals, are none."""
    names = "|".join(re.escape(name) for name in architectures() if name not in ORDINARY)
    classes = "|".join(config_class(name).__name__.removesuffix("Config") for name in architectures())
    return re.findall(rf"(?<![a-z])(?:{names})(?![a-z0-9])|\b(?:{classes})(?:Mixer|Config|Model|For[A-Z]\w+)\b", text)


def test_no_architecture_is_named_in_conversions():
    files = sorted(ROOM.rglob("*.py"))
    assert len(files) > 50
    wrong = {str(file.relative_to(ROOM)): found for file in files if (found := named(file.read_text()))}
    assert not wrong, wrong


def test_the_rule_finds_names():
    assert named('if student == "hedgehog":') and named("HedgehogMixer(config)") and named("zoo.rwkv7.modeling_rwkv7")
    assert not named("based on The Mamba in the Llama, for a Transformer")
