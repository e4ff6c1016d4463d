"""A kernel's public functions with one backend: checks of arguments go, the choice becomes a call of `chunked`.

Its C backend is found for a file of its own (`compiled_source.py`)."""

from __future__ import annotations

import ast
import re
from typing import Any

from .source_edits import Edit, Offsets, apply, docstring_of, lines_of, replacing, span_of

__all__ = ["backend_parts", "with_one_backend"]

CHECKS = re.compile(r"expect|expect_ndim|check_steps|_check\w*")
DISPATCHES = ("dispatch", "dispatch_alike")


def with_one_backend(text: str, backend: str = "chunked") -> str:
    """The source of `kernels/<operation>/__init__.py` with `run(<operation>, <function>, ...)` for each dispatch."""
    tree: Any = ast.parse(text)
    offsets = Offsets(text)
    edits, imports = [], {}
    for statement in tree.body:
        if _is_call(statement, "register"):
            edits.append(Edit(*lines_of(statement, offsets), ""))
            operation, name, importer = _registered(statement)
            if name == backend:
                imports[operation] = _implementation(tree, importer)
    lines = []
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and (operation := _dispatched(statement)):
            module, name = imports[operation]
            lines.append(f"from {module} import {name} as {operation}_{backend}\n")
            edits += _direct(statement, operation, f"{operation}_{backend}", offsets)
    lines += ["from ..dispatch import run\n"] if lines else []
    return apply(text, edits) + "".join(lines)


def backend_parts(text: str, backend: str) -> dict[str, tuple[tuple[str, str], str]]:
    """Operation -> module and name of a backend's function, and the name of the test of what it supports."""
    tree: Any = ast.parse(text)
    parts = {}
    for statement in tree.body:
        if _is_call(statement, "register"):
            operation, name, importer = _registered(statement)
            supports = next((k.value.id for k in statement.value.keywords if k.arg == "supports"), None)
            if name == backend and supports is not None:
                parts[operation] = _implementation(tree, importer), supports
    return parts


def _registered(statement: Any) -> tuple[str, str, str]:
    """Operation, backend and importer of a call of `register`."""
    first = statement.value.args
    operation, name, importer = first if len(first) == 3 else first[0].value.elts
    return operation.value, name.value, importer.id


def _is_call(statement: Any, name: str) -> bool:
    call = statement.value if isinstance(statement, (ast.Expr, ast.Return)) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name


def _implementation(tree: Any, importer: str) -> tuple[str, str]:
    """Module, as the import says it, and name of what `def importer(): from module import name; return name` gives."""
    function = next(s for s in tree.body if isinstance(s, ast.FunctionDef) and s.name == importer)
    statement = next(s for s in function.body if isinstance(s, ast.ImportFrom))
    return "." * statement.level + (statement.module or ""), statement.names[0].name


def _dispatched(function: Any) -> str | None:
    last = function.body[-1]
    return last.value.args[0].value if any(_is_call(last, name) for name in DISPATCHES) else None


def _direct(function: Any, operation: str, implementation: str, offsets: Offsets) -> list[Edit]:
    """Edits that make a public function call its implementation."""
    docstring = docstring_of(function)
    *body, last = [s for s in function.body if s is not docstring]
    items = _items(last.value.args[1], body)
    arguments = ", ".join(f"{key}={_text(value, offsets)}" for key, value in items.items())
    written = f'run("{operation}", {implementation}, {arguments})'
    call = ast.parse(written, mode="eval").body
    gathered = f"{ast.unparse(last.value.args[1])}["
    kept = [s for s in body if not _is_check(s) and not (_target(s) or "").startswith(gathered)]
    kept = _without_idle(kept, call)
    edits = [Edit(*lines_of(s, offsets), "") for s in body if s not in kept]
    return [
        *edits,
        replacing(last, f"return {written}", offsets),
        _without_backend(function, offsets),
    ]


def _text(node: ast.expr, offsets: Offsets) -> str:
    start, stop = span_of(node, offsets)
    return "".join(offsets.lines)[start:stop]


def _items(dictionary: Any, body: list[Any]) -> dict[str, ast.expr]:
    """Keys and values of a dictionary of arguments: a literal, a union of them, or a name that the statements fill."""
    if isinstance(dictionary, ast.BinOp):
        return _items(dictionary.left, body) | _items(dictionary.right, body)
    if isinstance(dictionary, ast.Name):
        items: dict[str, ast.expr] = {}
        for statement in body:
            if _target(statement) == dictionary.id:
                items |= _items(statement.value, body)
            elif (match := re.fullmatch(rf"{dictionary.id}\['(\w+)'\]", _target(statement) or "")) is not None:
                items[match[1]] = statement.value
        return items
    assert isinstance(dictionary, ast.Dict), f"arguments of a kernel in an unknown form: {ast.unparse(dictionary)}"
    items = {}
    for key, value in zip(dictionary.keys, dictionary.values, strict=True):
        items |= _items(value, body) if key is None else {ast.literal_eval(key): value}
    return items


def _is_check(statement: ast.stmt) -> bool:
    """Whether a statement does nothing but raise errors."""
    if isinstance(statement, (ast.If, ast.For)):
        raises = isinstance(statement.body[-1], ast.Raise) and not statement.orelse
        return raises or all(_is_check(s) for s in [*statement.body, *statement.orelse])
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and bool(CHECKS.fullmatch(call.func.id))


def _without_idle(body: list[Any], call: ast.expr) -> list[Any]:
    """The statements but those that set what nobody reads any more."""

    def names(nodes, context) -> set[str]:
        found = [n for node in nodes for n in ast.walk(node)]
        return {n.id for n in found if isinstance(n, ast.Name) and isinstance(n.ctx, context)}

    while True:
        idle = []
        for statement in (s for s in body if _target(s) is not None):
            # What only adds to the same name does not read it for anybody.
            alike = [s for s in body if s is not statement and _target(s) == _target(statement)]
            others = [s for s in (*body, call) if s is not statement and s not in alike]
            if not names([statement], ast.Store) & names([*others, *(s.value for s in alike)], ast.Load):
                idle.append(statement)
        if not idle:
            return body
        body = [s for s in body if s not in idle]


def _target(statement: ast.AST) -> str | None:
    """What an assignment sets, as it is written."""
    if isinstance(statement, ast.Assign):
        return ast.unparse(statement.targets[0])
    return ast.unparse(statement.target) if isinstance(statement, ast.AugAssign) else None


def _without_backend(function: ast.FunctionDef, offsets: Offsets) -> Edit:
    """The signature without its last argument, `backend`."""
    args = function.args
    assert args.kwonlyargs[-1].arg == "backend", f"the last argument of {function.name} is not backend"
    before = args.kwonlyargs[:-1] or args.args
    defaults = args.kw_defaults[:-1] if args.kwonlyargs[:-1] else args.defaults
    ends = [*before, *filter(None, defaults)]
    start = max(span_of(node, offsets)[1] for node in ends)
    return Edit(start, span_of(args.kw_defaults[-1], offsets)[1], "")
