"""What a teacher's own card says goes into the record: licence, what it was made from, how to cite it."""

from __future__ import annotations

import pytest

from rnnzoo.conversions.teachers import resolve_teacher
from rnnzoo.conversions.teachers.card import stated_in_card

from .tiny import tiny_teacher

CARD = """---
license: other
license_name: own-terms
language: [en, de]
base_model: first/Base
---
# A teacher

```python
print("@not a citation")
```

```bibtex
@misc{theirs, title={Theirs}}
```
"""


def test_licence_origin_and_citation_are_recorded(tmp_path):
    folder = tiny_teacher("llama", tmp_path)
    (folder / "README.md").write_text(CARD)
    record = resolve_teacher(str(folder)).record()
    assert record["licence"] == "other" and record["licence_name"] == "own-terms"
    assert record["derived_from"] == ["first/Base"] and record["language"] == ["en", "de"]
    assert record["citation"] == "@misc{theirs, title={Theirs}}"


def test_a_teacher_without_a_card_has_nothing_of_it(tmp_path):
    record = resolve_teacher(str(tiny_teacher("llama", tmp_path))).record()
    assert record["licence"] is None and not {"derived_from", "citation"} & set(record)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\nbad: [\n---\n", {"licence": "mit"}),
        ("---\nlicense:\n- apache-2.0\n- mit\n---\n", {"licence": "apache-2.0"}),
        ("---\n- a list\n---\n", {}),
        ("no front matter", {}),
        ("```\n@article{a,\n}\n```\n", {"citation": "@article{a,\n}"}),
        ("```\n@misc{a, note={" + "x" * 7000 + "}}\n```\n", {}),
    ],
)
def test_cards_of_every_kind_are_read(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    assert stated_in_card(tmp_path) == expected
