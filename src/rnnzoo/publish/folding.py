"""Source without the branches that are never taken, given what some of its expressions always are."""

from __future__ import annotations

import ast
import operator
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .source_edits import Edit, Offsets, apply, lines_of, replacing, span_of

__all__ = ["Facts", "fold"]

UNKNOWN = object()
COMPARISONS = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.In: lambda a, b: a in b,
}


@dataclass(frozen=True)
class Facts:
    """What is known of a module.

    Attributes:
        values: an expression, as ast.unparse writes it, to what it always is. An argument of this name goes from
            signatures and from calls.
        members: methods and attributes that are left out, `Class.name`. calls: methods whose calls are left out where
            they stand as statements. targets: what is assigned to these, as ast.unparse writes it, is left out.
        rewritten: `Class.name` of an attribute -> the lines in its place.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    members: frozenset[str] = frozenset()
    calls: frozenset[str] = frozenset()
    targets: frozenset[str] = frozenset()
    rewritten: Mapping[str, str] = field(default_factory=dict)

    def about(self, text: str) -> Facts:
        """Those facts that a source may make use of, in one order."""
        names = {key: key.rpartition(".")[2] for key in sorted(self.values)}
        values = {key: self.values[key] for key, name in names.items() if not name.isidentifier() or name in text}
        return replace(self, values=values)

    def __or__(self, other: Facts) -> Facts:
        sets = (self.members | other.members, self.calls | other.calls, self.targets | other.targets)
        return Facts({**self.values, **other.values}, *sets, {**self.rewritten, **other.rewritten})


def fold(text: str, facts: Facts) -> str:
    """The source under the facts."""
    if facts == Facts():
        return text
    tree = ast.parse(text)
    folder = _Folder(facts, text, Offsets(text))
    return apply(text, [edit for statement in tree.body for edit in folder.statement(statement, "")])


@dataclass
class _Folder:
    facts: Facts
    text: str
    offsets: Offsets
    tests: set[ast.expr] = field(default_factory=set)  # of which only the truth counts

    def __post_init__(self) -> None:
        self.attributes = {key.rpartition(".")[2] for key in self.facts.values}
        self.has_longer = any(not key.replace(".", "").isidentifier() for key in self.facts.values)

    def value(self, node: ast.AST) -> Any:
        """What an expression always is, or UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if self._may_be_known(node) and (known := self.facts.values.get(ast.unparse(node), UNKNOWN)) is not UNKNOWN:
            return known
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self.value(node.operand)
            return value if value is UNKNOWN else not value
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            left, right = self.value(node.left), self.value(node.comparators[0])
            return UNKNOWN if UNKNOWN in (left, right) else COMPARISONS[type(node.ops[0])](left, right)
        if isinstance(node, ast.BoolOp):
            return self._decided(node)
        if isinstance(node, ast.IfExp):
            test = self.value(node.test)
            return UNKNOWN if test is UNKNOWN else self.value(node.body if test else node.orelse)
        return UNKNOWN

    def _may_be_known(self, node: ast.AST) -> bool:
        """A quick look before an expression is written out."""
        if isinstance(node, ast.Name):
            return node.id in self.facts.values and isinstance(node.ctx, ast.Load)
        if isinstance(node, ast.Attribute):
            return node.attr in self.attributes and isinstance(node.ctx, ast.Load)
        return isinstance(node, (ast.Compare, ast.Call)) and self.has_longer

    def _decided(self, node: ast.BoolOp) -> Any:
        """What `and` or `or` gives, also if an operand decides after an unknown one, where that is a boolean."""
        decides = isinstance(node.op, ast.Or)
        exact = True
        for part in node.values:
            value = self.value(part)
            if value is UNKNOWN:
                exact = exact and _is_boolean(part)
            elif bool(value) is decides:
                return value if exact else UNKNOWN
        values = [self.value(part) for part in node.values]
        return UNKNOWN if UNKNOWN in values else values[-1]

    def render(self, node: ast.expr) -> str:
        """The text of an expression under the facts."""
        start, stop = span_of(node, self.offsets)
        edits = [Edit(e.start - start, e.stop - start, e.text) for e in self.expression(node)]
        return apply(self.text[start:stop], edits)

    def expression(self, node: ast.AST) -> list[Edit]:
        """Edits inside an expression."""
        value = self.value(node)
        if value is not UNKNOWN and not isinstance(node, ast.Constant):
            return [replacing(node, repr(value), self.offsets)]
        if isinstance(node, ast.IfExp) and (test := self.value(node.test)) is not UNKNOWN:
            return [replacing(node, self.render(node.body if test else node.orelse), self.offsets)]
        if isinstance(node, ast.BoolOp):
            # The last operand may be the result, unless all are booleans.
            last = node.values[-1] if not all(map(_is_boolean, node.values)) and node not in self.tests else None
            left = [v for v in node.values if self.value(v) is UNKNOWN or v is last]
            if len(left) < len(node.values):
                word = " or " if isinstance(node.op, ast.Or) else " and "
                return [replacing(node, word.join(self.render(v) for v in left), self.offsets)]
        if isinstance(node, ast.Call):
            edits = self._call(node)
            children = [node.func, *node.args, *(k.value for k in node.keywords)]
            return edits + [e for child in children for e in self.expression(child)]
        if isinstance(node, ast.Dict) and (items := self._items(node)) is not None:
            return [replacing(node, "{" + ", ".join(items) + "}", self.offsets)]
        return [
            e
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.expr_context)
            for e in self.expression(child)
        ]

    def _call(self, node: ast.Call) -> list[Edit]:
        """Without the arguments that are known; those of a class, whose fields stay, only where they are named."""
        gone: list[ast.AST] = [
            k for k in node.keywords if k.arg in self.facts.values and self.value(k.value) is not UNKNOWN
        ]
        if not ast.unparse(node.func).rpartition(".")[2][0].isupper():
            gone += [a for a in node.args if isinstance(a, ast.Name) and a.id in self.facts.values]
        return [Edit(self._comma_before(start), stop, "") for start, stop in (span_of(a, self.offsets) for a in gone)]

    def _items(self, node: ast.Dict) -> list[str] | None:
        """Items of a dictionary of arguments without the known ones; None where it has none of them."""
        pairs = list(zip(node.keys, node.values, strict=True))
        left = [
            (key, value)
            for key, value in pairs
            if not (isinstance(key, ast.Constant) and key.value in self.facts.values) or self.value(value) is UNKNOWN
        ]
        if len(left) == len(pairs):
            return None
        return [
            f"{self.render(key)}: {self.render(value)}" if key else f"**{self.render(value)}" for key, value in left
        ]

    def _comma_before(self, place: int) -> int:
        before = self.text[:place].rstrip()
        return len(before) - 1 if before.endswith(",") else len(before)

    def block(self, body: list[ast.stmt], owner: str) -> list[Edit]:
        edits = []
        for i, statement in enumerate(body):
            edits += self.statement(statement, owner)
            if self._always_leaves(statement):
                edits += [Edit(*lines_of(s, self.offsets), "") for s in body[i + 1 :]]
                break
        return edits

    def _always_leaves(self, statement: ast.stmt) -> bool:
        """Whether what stands after a statement is never reached."""
        if not isinstance(statement, ast.If) or (test := self.value(statement.test)) is UNKNOWN:
            return isinstance(statement, (ast.Return, ast.Raise))
        chosen = statement.body if test else statement.orelse
        return bool(chosen) and self._always_leaves(chosen[-1])

    def _is_gone(self, statement: ast.stmt, owner: str) -> bool:
        """Whether a statement is left out as a whole."""
        facts = self.facts
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            return bool(owner) and f"{owner}.{statement.name}" in facts.members
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            name = ast.unparse(target).strip("()")
            return name in facts.targets or f"{owner}.{name}" in facts.members
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            function = statement.value.func
            return isinstance(function, ast.Attribute) and function.attr in facts.calls
        if isinstance(statement, ast.If):
            test = self.value(statement.test)
            if test is UNKNOWN:
                return not statement.orelse and all(self._is_gone(s, "") for s in statement.body)
            return all(self._is_gone(s, "") for s in (statement.body if test else statement.orelse))
        if isinstance(statement, ast.For):
            value = self.value(statement.iter)
            return value is not UNKNOWN and not value
        return False

    def statement(self, node: ast.stmt, owner: str) -> list[Edit]:
        """Edits of a statement; `owner`: the class that it stands in."""
        if self._is_gone(node, owner):
            return [Edit(*lines_of(node, self.offsets), "")]
        if isinstance(node, ast.ClassDef):
            return self.block(node.body, node.name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if (lines := self.facts.rewritten.get(f"{owner}.{ast.unparse(target)}")) is not None:
                return [Edit(*lines_of(node, self.offsets), lines)]
        if isinstance(node, ast.FunctionDef):
            edits = self._signature(node) + self.block(node.body, "")
            if all(self._is_gone(s, "") for s in node.body):
                start = lines_of(node.body[0], self.offsets)[0]
                edits.append(Edit(start, start, " " * node.body[0].col_offset + "pass\n"))
            return edits
        if isinstance(node, ast.If):
            return self._if(node)
        edits, blocks = [], []
        for name, part in ast.iter_fields(node):
            if name in ("body", "orelse", "finalbody"):
                blocks += part
            elif name != "annotation":
                parts = part if isinstance(part, list) else [part]
                edits += [e for p in parts if isinstance(p, (ast.expr, ast.withitem)) for e in self.expression(p)]
        return edits + self.block(blocks, "")

    def _if(self, node: ast.If) -> list[Edit]:
        self.tests.add(node.test)
        test = self.value(node.test)
        if test is UNKNOWN:
            rest = [] if node.orelse and all(self._is_gone(s, "") for s in node.orelse) else node.orelse
            edits = self.expression(node.test) + self.block(node.body, "") + self.block(rest, "")
            if node.orelse and not rest:
                stop = span_of(node.orelse[-1], self.offsets)[1]
                edits.append(Edit(span_of(node.body[-1], self.offsets)[1], stop, ""))
            return edits
        chosen = node.body if test else node.orelse
        start = lines_of(chosen[0], self.offsets)[0]
        stop = lines_of(chosen[-1], self.offsets)[1]
        edits = [Edit(e.start - start, e.stop - start, e.text) for e in self.block(chosen, "")]
        kept = apply(self.text[start:stop], edits)
        own = lines_of(node, self.offsets)
        if self.text[span_of(node, self.offsets)[0] :].startswith("elif"):
            assert test or not node.orelse, "an elif that is never true and has an else"
            head = " " * node.col_offset + "else:\n"
            return [Edit(*own, head + kept)]
        if chosen is node.orelse and len(chosen) == 1 and isinstance(chosen[0], ast.If):
            is_elif = self.text[span_of(chosen[0], self.offsets)[0] :].startswith("elif")
            if is_elif:
                return [Edit(*own, kept.replace("elif", "if", 1))]
        kept = textwrap.indent(textwrap.dedent(kept), " " * node.col_offset)
        return [Edit(*own, kept)]

    def _signature(self, node: ast.FunctionDef) -> list[Edit]:
        """Without the arguments that are known."""
        args = node.args
        edits = []
        positional = args.posonlyargs + args.args
        defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
        pairs = list(zip(positional, defaults, strict=True)) + list(zip(args.kwonlyargs, args.kw_defaults, strict=True))
        left = [a for a in args.kwonlyargs if a.arg not in self.facts.values]
        for argument, default in pairs:
            if argument.arg in self.facts.values:
                start, stop = span_of(argument, self.offsets)
                stop = stop if default is None else span_of(default, self.offsets)[1]
                edits.append(Edit(self._comma_before(start), stop, ""))
        if args.kwonlyargs and not left and not args.vararg:
            first = span_of(args.kwonlyargs[0], self.offsets)[0]
            star = self.text[:first].rstrip().rstrip(",").rstrip()
            edits.append(Edit(self._comma_before(len(star) - 1), first, ""))
        return edits


def _is_boolean(node: ast.expr) -> bool:
    """Whether an expression is True or False whatever happens."""
    if isinstance(node, ast.BoolOp):
        return all(map(_is_boolean, node.values))
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))
