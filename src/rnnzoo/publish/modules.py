"""The modules of rnnzoo as sources: what each defines, and where each of its names comes from."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .folding import Facts, fold
from .kernel_source import with_one_backend
from .model_source import for_running
from .scopes import Reference, bound_names, references

__all__ = ["COMPILED", "COMPILED_FILE", "External", "Module", "Source", "Symbol"]

ROOT = Path(__file__).resolve().parent.parent
# What a module imports from one on the left, it gets from the one on the right.
SUBSTITUTES = {
    "zoo.core.registry": "publish.flat.registry",
    "kernels.dispatch": "publish.flat.dispatch",
    "kernels.sources": "publish.flat.sources",
    "kernels.losses": "publish.flat.losses",
}


# What the file with the model imports from the file with its kernels.
COMPILED = "publish.flat.compiled"
COMPILED_FILE = "kernels_rnnzoo.py"


@dataclass(frozen=True)
class Symbol:
    """A name defined in a module of rnnzoo."""

    module: str
    name: str


@dataclass(frozen=True)
class External:
    """A name from another package: `import module as local`, or `from module import name as local`.

    From `COMPILED_FILE`, `home` is the module of rnnzoo that has it.
    """

    module: str
    name: str | None
    local: str
    home: str | None = None


@dataclass
class Module:
    """A parsed module.

    Attributes:
        name: dotted, below rnnzoo. text: its source as it goes into the file.
        definitions: name -> the statements that define or change it, in order.
        bindings: name -> what an import gives it: a Symbol, an External, or a module's dotted name.
        imports: modules of rnnzoo that it imports, in order.
    """

    name: str
    text: str
    tree: ast.Module
    definitions: dict[str, list[ast.stmt]]
    bindings: dict[str, Symbol | External | str]
    imports: list[str]
    _references: dict[ast.stmt, list[Reference]] = field(default_factory=dict)

    def references(self, statement: ast.stmt) -> list[Reference]:
        """Uses of the module's names in one of its statements."""
        if statement not in self._references:
            self._references[statement] = references(statement)
        return self._references[statement]


class Source:
    """Reads and keeps modules of the installed package.

    Args:
        facts: module -> what is known of it; what it then does without is left out.
        elsewhere: modules and packages whose names are imported from `COMPILED_FILE`.
    """

    def __init__(self, facts: Callable[[str], Facts], elsewhere: tuple[str, ...] = ()) -> None:
        self._facts, self._elsewhere = facts, elsewhere
        self._modules: dict[str, Module] = {}

    def path(self, name: str) -> Path | None:
        """The file of a module, None where there is none."""
        place = ROOT.joinpath(*name.split("."))
        return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)

    def module(self, name: str) -> Module:
        """The module of a dotted name below rnnzoo."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def resolve(self, module: str, name: str) -> Symbol | External | str | None:
        """What a module's name stands for, through re-exports; None where the module does not have it (builtins)."""
        found = self.module(module)
        if name in found.definitions:
            return Symbol(module, name)
        target = found.bindings.get(name)
        if isinstance(target, Symbol):
            return self.resolve(target.module, target.name)
        return target

    def _read(self, name: str) -> Module:
        path = self.path(name)
        assert path is not None, f"rnnzoo has no module {name}"
        text = _prepared(path, name.startswith("kernels.") and path.name == "__init__.py")
        facts = self._facts(name).about(text)
        # Configurations differ in few modules.
        key = name, repr((facts, self._elsewhere))
        if (module := _KNOWN.get(key)) is None:
            module = _KNOWN[key] = self._parsed(name, fold(text, facts), path.name == "__init__.py")
        return module

    def _parsed(self, name: str, text: str, is_package: bool) -> Module:
        tree = ast.parse(text)
        module = Module(name, text, tree, {}, {}, [])
        # Names that the module imports come before those of its functions.
        for statement in sorted(tree.body, key=lambda s: isinstance(s, ast.FunctionDef)):
            for names in self._imports(statement):
                self._bind(module, names, is_package)
        for statement in tree.body:
            for target in _defined(statement) or _called_for(statement) & module.definitions.keys():
                module.definitions.setdefault(target, []).append(statement)
        return module

    def _imports(self, statement: ast.stmt) -> Iterator[ast.Import | ast.ImportFrom]:
        """Imports in a statement, those inside functions and under TYPE_CHECKING too."""
        for node in ast.walk(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", None) != "__future__":
                yield node

    def _bind(self, module: Module, node: ast.Import | ast.ImportFrom, is_package: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                module.bindings[alias.asname or whole] = External(whole, None, alias.asname or whole)
            return
        for alias in node.names:
            local = alias.asname or alias.name
            if not node.level:
                module.bindings.setdefault(local, External(node.module or "", alias.name, local))
                continue
            base = module.name.split(".")
            base = base[: len(base) - node.level + int(is_package)]
            source = ".".join([*base, *([node.module] if node.module else [])])
            source = SUBSTITUTES.get(source, source)
            if any(source == name or source.startswith(f"{name}.") for name in self._elsewhere):
                stem = COMPILED_FILE.removesuffix(".py")
                module.bindings.setdefault(local, External(f".{stem}", alias.name, local, source))
                continue
            inner = f"{source}.{alias.name}"
            is_module = self.path(inner) is not None
            module.bindings.setdefault(local, inner if is_module else Symbol(source, alias.name))
            module.imports.append(inner if is_module else source)


def _defined(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement defines or changes; none for imports and texts."""
    if isinstance(statement, (ast.Import, ast.ImportFrom, ast.If, ast.Expr)):
        return set()
    return bound_names([statement]) - {"__all__"}


def _called_for(statement: ast.stmt) -> set[str]:
    """What a call for its effect belongs to: its arguments, and `operator` of `operator.register_fake(...)`."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call):
        return set()
    owner = [call.func.value] if isinstance(call.func, ast.Attribute) else []
    return {node.id for node in (*call.args, *owner) if isinstance(node, ast.Name)}


_KNOWN: dict[tuple[str, str], Module] = {}
"""Modules by name, and what is known of them."""


@functools.cache
def _prepared(path: Path, is_kernel: bool) -> str:
    """A module's source for running models, whatever their configuration."""
    text = path.read_text(encoding="utf-8")
    return for_running(with_one_backend(text) if is_kernel else text)
