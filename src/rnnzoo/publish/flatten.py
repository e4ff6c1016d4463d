"""Modules that import each other, made one: what is reached from some names, in the order in which imports run."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .model_source import with_short_docstrings
from .modules import External, Module, Source, Symbol
from .reflow import WIDTH, reflow
from .scopes import Reference
from .source_edits import Edit, Offsets, apply, lines_of, replacing

__all__ = ["DETAILS", "Flat", "flatten"]

DETAILS = ("full", "paragraph", "sentence", "public", "compact")
"""How much of the docstrings stays, from most to least; "public": a sentence, where a name has no underscore;
"compact": so, and one empty line between definitions."""


@dataclass
class Flat:
    """What goes into the file.

    Attributes:
        modules: in the order of the file. symbols: what is reached. externals: imports from other packages.
        names: of the symbols in the file.
    """

    source: Source
    modules: list[Module] = field(default_factory=list)
    symbols: dict[Symbol, None] = field(default_factory=dict)
    externals: dict[str, External] = field(default_factory=dict)
    names: dict[Symbol, str] = field(default_factory=dict)

    def text(self, detail: str) -> str:
        """The code below the imports, module by module.

        Args:
            detail: of the docstrings, one of DETAILS.
        """
        parts = [self.module_text(module, detail) for module in self.modules]
        return ("\n" if detail == "compact" else "\n\n").join(part for part in parts if part)

    def imports(self) -> str:
        """Import statements, one for each module."""
        plain = sorted({e for e in self.externals.values() if e.name is None}, key=lambda e: e.module)
        lines = [f"import {e.module}" + (f" as {e.local}" if e.local != e.module else "") for e in plain]
        by_module: dict[str, set[str]] = {}
        for external in self.externals.values():
            if external.name is not None:
                alias = f" as {external.local}" if external.local != external.name else ""
                by_module.setdefault(external.module, set()).add(external.name + alias)
        for module, names in sorted(by_module.items()):
            line = f"from {module} import {', '.join(sorted(names))}"
            lines.append(line if len(line) <= WIDTH else f"from {module} import ({', '.join(sorted(names))})")
        return reflow("\n".join(lines) + "\n")

    def module_text(self, module: Module, detail: str) -> str:
        """What goes into the file of one module."""
        offsets = Offsets(module.text)
        kept = [s for s in module.tree.body if self._is_kept(module, s)]
        if not kept:
            return ""
        parts: list[str] = []
        for before, statement in zip([None, *kept], kept, strict=False):
            code = self._statement_text(module, statement, offsets)
            code = reflow(code if detail == "full" else with_short_docstrings(code, detail))
            small = before is not None and _is_small(before) and _is_small(statement)
            apart = "\n" if detail == "compact" else "\n\n"
            parts.append(("" if small else apart) + code.strip("\n") + "\n")
        return self._heading(module, detail) + "".join(parts).lstrip("\n")

    def _heading(self, module: Module, detail: str) -> str:
        path = module.name.replace(".", "/")
        about = (ast.get_docstring(module.tree) or "").strip()
        # The equations of the recurrences are in the modules' docstrings.
        if detail in ("public", "compact"):  # the equations
            about = "\n\n".join(about.split("\n\n")[:2])
        tells = _is_mixer(module) or (detail == "full" and module.name.startswith("kernels."))
        lines = _comment(about) if tells else []
        return "\n".join([f"# {f'--- {path} ':-<118}", *lines]) + ("\n\n" if lines else "\n")

    def _is_kept(self, module: Module, statement: ast.stmt) -> bool:
        names = [name for name, statements in module.definitions.items() if statement in statements]
        return any(Symbol(module.name, name) in self.symbols for name in names)

    def _statement_text(self, module: Module, statement: ast.stmt, offsets: Offsets) -> str:
        edits = [Edit(*lines_of(s, offsets), "") for s in _inner_imports(statement)]
        for reference in module.references(statement):
            target, node = self._target(module, reference)
            if not isinstance(target, Symbol):
                continue
            if target not in self.symbols:
                assert reference.annotation is not None, f"{target} is not reached"
                edits.append(replacing(reference.annotation, self._known_part(module, reference.annotation), offsets))
                continue
            name = self.names[target]
            assert name == reference.node.id or name not in reference.shadows, f"{name} means two things"
            edits.append(replacing(node, name, offsets))
        start, stop = lines_of(statement, offsets)
        own = [Edit(e.start - start, e.stop - start, e.text) for e in edits]
        text = apply(module.text[start:stop], own)
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            name = self.names[Symbol(module.name, statement.name)]
            text = re.sub(rf"^(class|def) {statement.name}\b", rf"\1 {name}", text, count=1, flags=re.MULTILINE)
        return re.sub(r"\n\n(\s*\n)+", "\n\n", text)

    def _target(self, module: Module, reference: Reference) -> tuple[Symbol | External | str | None, ast.expr]:
        """What a reference stands for, and the node that says so."""
        target = self.source.resolve(module.name, reference.node.id)
        if isinstance(target, str) and reference.attribute is not None:
            return self.source.resolve(target, reference.attribute.attr), reference.attribute
        return target, reference.node

    def _known_part(self, module: Module, annotation: ast.expr) -> str:
        """Those members of a union that are in the file; what is only named in annotations is not."""

        def is_known(part: ast.expr) -> bool:
            names = [n.id for n in ast.walk(part) if isinstance(n, ast.Name)]
            targets = [self.source.resolve(module.name, name) for name in names]
            return all(target in self.symbols for target in targets if isinstance(target, Symbol))

        parts = [annotation]
        while isinstance(parts[0], ast.BinOp):
            parts[:1] = [parts[0].left, parts[0].right]
        return " | ".join(ast.unparse(part) for part in parts if is_known(part)) or "object"

    def reach(self, symbol: Symbol) -> None:
        """Takes in a symbol and everything that it refers to."""
        waiting = [symbol]
        while waiting:
            symbol = waiting.pop()
            if symbol in self.symbols:
                continue
            self.symbols[symbol] = None
            module = self.source.module(symbol.module)
            waiting += [Symbol(module.name, name) for name in _decorated_by(module, symbol.name)]
            for statement in module.definitions[symbol.name]:
                for reference in module.references(statement):
                    target, _ = self._target(module, reference)
                    if isinstance(target, Symbol) and reference.annotation is None:
                        waiting.append(target)
                    elif isinstance(target, External):
                        known = self.externals.setdefault(target.local, target)
                        assert known == target, f"{target.local} is imported from two places"

    def order(self, roots: Iterable[str]) -> None:
        """Puts the modules in the order in which Python would run them."""
        done: set[str] = set()

        def visit(name: str) -> None:
            if name in done:
                return
            done.add(name)
            module = self.source.module(name)
            for other in module.imports:
                if self.source.path(other) is not None and other in used:
                    visit(other)
            if name in used:
                self.modules.append(module)

        used = {symbol.module for symbol in self.symbols}
        for root in [*roots, *sorted(used)]:
            visit(root)

    def choose_names(self) -> None:
        """Every symbol keeps its name where it is the first to have it; the public face of a kernel comes first."""
        places = {module.name: i for i, module in enumerate(self.modules)}

        def rank(symbol: Symbol) -> tuple:
            path = self.source.path(symbol.module)
            return path is None or path.name != "__init__.py", places[symbol.module]

        taken = set(self.externals)
        for symbol in sorted(self.symbols, key=rank):
            *_, parent, stem = ["", *symbol.module.split(".")]
            suffixes = ("", f"_{stem.rstrip('_')}", f"_{parent}_{stem.rstrip('_')}")
            name = next((name for suffix in suffixes if (name := symbol.name + suffix) not in taken), None)
            assert name is not None, f"two symbols are called {symbol.name}"
            taken.add(name)
            self.names[symbol] = name


def flatten(source: Source, roots: Iterable[Symbol]) -> Flat:
    """Everything that `roots` refer to, directly or not."""
    flat, roots = Flat(source), list(roots)
    for root in roots:
        flat.reach(root)
    flat.order(dict.fromkeys(root.module for root in roots))
    flat.choose_names()
    return flat


def _comment(about: str) -> list[str]:
    """A docstring as comments: prose filled to the width, equations as they stand."""
    lines = []
    for paragraph in about.split("\n\n") if about else []:
        is_prose = not paragraph.startswith(" ")
        body = textwrap.wrap(paragraph, WIDTH - 2) if is_prose else [line[2:] for line in paragraph.splitlines()]
        lines += ["#", *(f"# {line}".rstrip() for line in body)]
    return lines[1:]


def _is_small(statement: ast.stmt) -> bool:
    return not isinstance(statement, (ast.FunctionDef, ast.ClassDef))


def _is_mixer(module: Module) -> bool:
    return module.name.startswith("zoo.") and not module.name.startswith("zoo.core.") and "modeling_" in module.name


def _decorated_by(module: Module, name: str) -> Iterator[str]:
    """Functions that say with `@name.register_...` what they are for."""
    for statement in module.tree.body:
        if isinstance(statement, ast.FunctionDef):
            owners = [d.value for d in statement.decorator_list if isinstance(d, ast.Attribute)]
            if any(isinstance(owner, ast.Name) and owner.id == name for owner in owners):
                yield statement.name


def _inner_imports(statement: ast.stmt) -> Iterator[ast.stmt]:
    """Imports of rnnzoo's own modules inside a statement."""
    for node in ast.walk(statement):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node
