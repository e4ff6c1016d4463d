"""A module's source without what only conversion, training of the zoo and its tables need."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

from .source_edits import Edit, Offsets, apply, docstring_of, lines_of, replacing

__all__ = ["first_paragraph", "for_running", "with_short_docstrings"]

# Methods that start a model from a teacher or run single layers, and what `rnnzoo list` shows of an architecture.
METHODS = {"init_from_attention", "mixing_matrix", "only", "set_decay", "student_fields"}
METHODS |= {"starts_from_attention", "filled_from_attention", "has_decay"}
METHODS |= {"AttentionProjections.load", "RecurrentModel.make_context"}
ATTRIBUTES = {"sizes", "kernel", "complexity", "branches", "decay_parameters"}


def for_running(text: str) -> str:
    """The module without conversion, and with classes where it calls `model_classes`."""
    tree: Any = ast.parse(text)
    offsets = Offsets(text)
    edits = []
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            edits += [Edit(*lines_of(s, offsets), "") for s in statement.body if _is_dropped(statement, s)]
        elif isinstance(statement, ast.Assign) and "model_classes(" in ast.unparse(statement.value):
            edits.append(replacing(statement, _class_imports(tree) + _classes(statement), offsets))
    return apply(text, edits)


def _is_dropped(owner: ast.ClassDef, statement: Any) -> bool:
    if isinstance(statement, ast.FunctionDef):
        return bool({statement.name, f"{owner.name}.{statement.name}"} & METHODS)
    if isinstance(statement, ast.Assign):
        return ast.unparse(statement.targets[0]) in ATTRIBUTES
    # Elsewhere an annotated name may be the field of a dataclass.
    declares = isinstance(statement, ast.AnnAssign) and owner.name in ("Mixer", "RecurrentConfig")
    return declares and ast.unparse(statement.target) in ATTRIBUTES


BASES = {
    "Model": "RecurrentModel",
    "ForCausalLM": "RecurrentForCausalLM",
    "ForSequenceClassification": "RecurrentForSequenceClassification",
}


def _classes(assignment: Any) -> str:
    """`XModel, ... = model_classes(XConfig)` as classes."""
    config = assignment.value.args[0].id
    names, stem = [element.id for element in assignment.targets[0].elts], config.removesuffix("Config")
    parts = [f"class {name}({BASES[name.removeprefix(stem)]}):\n    config_class = {config}\n" for name in names]
    return "\n\n".join(parts)


def _class_imports(tree: ast.Module) -> str:
    """The import of the bases, from where the module has `model_classes`."""
    imports = [s for s in tree.body if isinstance(s, ast.ImportFrom)]
    found = next(s for s in imports if any(alias.name == "model_classes" for alias in s.names))
    return f"from {'.' * found.level}{found.module} import {', '.join(BASES.values())}\n"


def first_paragraph(docstring: str) -> str:
    """The docstring up to its first empty line, the end of a sentence."""
    paragraph = docstring.strip().split("\n\n")[0]
    paragraph = re.split(r"\n\s*(?:Args|Returns|Raises|Attributes):", paragraph)[0].rstrip()
    return paragraph.rstrip(":;,") + ("." if paragraph[-1] in ":;," else "")


def first_sentence(docstring: str) -> str:
    """The docstring up to the first period or colon that ends a clause, on one line where it fits."""
    paragraph = " ".join(first_paragraph(docstring).split())
    return re.split(r"(?<!al)\.\s(?=[A-Z])|[:;]\s", paragraph)[0].rstrip(".") + "."


def with_short_docstrings(text: str, detail: str) -> str:
    """The docstrings of classes and functions reduced as `flatten.DETAILS` says."""
    tree, offsets = ast.parse(text), Offsets(text)
    shortened = first_paragraph if detail == "paragraph" else first_sentence
    edits = []
    for node in ast.walk(tree):
        docstring = docstring_of(node)
        if docstring is None or not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        if detail in ("public", "compact") and node.name.startswith("_") and len(node.body) > 1:
            edits.append(Edit(*lines_of(docstring, offsets), ""))
            continue
        short = shortened(docstring.value.value)
        if short != docstring.value.value.strip():
            indent = " " * docstring.col_offset
            fits = detail == "paragraph" and max(map(len, f"{indent}{short}".splitlines())) <= 114
            lines = [short] if fits else textwrap.wrap(short, 114 - len(indent))
            edits.append(replacing(docstring, f'"""{f"{chr(10)}{indent}".join(lines)}"""', offsets))
    return apply(text, edits)
