"""A student generates as its teacher does: end tokens, sampling, penalties, and what ends a turn of a chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.kernels.errors import RnnzooError

from .tiny import tiny_teacher

SETTINGS = {"eos_token_id": [7, 9], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
SETTINGS |= {"repetition_penalty": 1.05, "stop_strings": ["User:"], "max_new_tokens": 77}


def settings_of(folder: Path, **tokenizer: Any) -> dict[str, Any]:
    """What a student of the teacher in `folder` is given, its tokenizer changed."""
    teacher = resolve_teacher(str(folder))
    found = teacher.tokenizer()
    for name, value in tokenizer.items():
        setattr(found, name, value)
    return teacher.generation(found)


@pytest.fixture
def teacher(tmp_path) -> Path:
    folder = tiny_teacher("llama", tmp_path)
    (folder / "generation_config.json").unlink()
    return folder


def write(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def test_all_settings_are_the_teachers(teacher):
    write(teacher, SETTINGS)
    found = settings_of(teacher, chat_template=None)
    assert found | {"transformers_version": None} == SETTINGS | {"pad_token_id": 0, "transformers_version": None}


@pytest.mark.parametrize("cache", [{"cache_implementation": "hybrid"}, {"cache_config": {"max_batch_size": 1}}])
def test_what_is_of_the_teachers_cache_stays_behind(teacher, cache):
    write(teacher, SETTINGS | cache)
    assert not cache.keys() & settings_of(teacher).keys()


def test_a_chat_ends_with_the_tokenizers_end_and_with_what_the_template_writes_behind_a_turn(teacher):
    write(teacher, SETTINGS)
    assert settings_of(teacher, eos_token="<|endoftext|>")["eos_token_id"] == [7, 9, 0, 2]
    (teacher / "generation_config.json").unlink()
    assert settings_of(teacher, eos_token="<|endoftext|>")["eos_token_id"] == [2, 0]
    refusing = "{{ raise_exception('no chats') }}"
    assert settings_of(teacher, eos_token="<|endoftext|>", chat_template=refusing)["eos_token_id"] == [2, 0]


def test_settings_in_an_older_teachers_configuration_are_taken(teacher):
    config = json.loads((teacher / "config.json").read_text()) | {"repetition_penalty": 1.3, "eos_token_id": [4, 6]}
    (teacher / "config.json").write_text(json.dumps(config))
    found = settings_of(teacher, chat_template=None)
    assert found["repetition_penalty"] == 1.3 and found["eos_token_id"] == [4, 6]


def test_settings_that_contradict_each_other_are_carried_as_they_are(teacher, tmp_path):
    write(teacher, {"do_sample": False, "temperature": 0.6, "eos_token_id": 3})
    write(tmp_path, settings_of(teacher))
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.6


def test_a_damaged_file_is_refused_in_a_sentence(teacher):
    for text in ("{", "3"):
        (teacher / "generation_config.json").write_text(text)
        with pytest.raises(RnnzooError, match=r"generation_config\.json is not readable JSON"):
            settings_of(teacher)
