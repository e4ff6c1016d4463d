"""Which names of a statement are those of its module, and not of a function or class inside it."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

__all__ = ["Reference", "bound_names", "references"]

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Reference:
    """A use of a module's name.

    Attributes:
        node: the name. attribute: the `name.attribute` around it, if it stands in one. shadows: names of the functions
            around it, which a renamed global must not meet. annotation: of a function, in which it stands.
    """

    node: ast.Name
    attribute: ast.Attribute | None
    shadows: frozenset[str]
    annotation: ast.expr | None = None


@dataclass
class Scope:
    names: set[str]
    is_class: bool = False


def references(statement: ast.stmt) -> list[Reference]:
    """Every use of a module's name in a top-level statement, its own target included."""
    finder = _Finder()
    finder.visit(statement)
    return finder.found


def bound_names(body: list[ast.stmt]) -> set[str]:
    """Names that the statements bind, outside of functions and classes among them."""
    names: set[str] = set()
    for statement in body:
        _collect(statement, names)
    return names


def _collect(node: ast.AST, names: set[str]) -> None:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        names.add(node.name)
        return
    if isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        names.add(node.id)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ExceptHandler) and node.name:
        names.add(node.name)
    for child in ast.iter_child_nodes(node):
        _collect(child, names)


@dataclass
class _Finder(ast.NodeVisitor):
    scopes: list[Scope] = field(default_factory=list)
    found: list[Reference] = field(default_factory=list)
    annotation: ast.expr | None = None

    def visit_Name(self, node: ast.Name) -> None:
        self._note(node, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            self._note(node.value, node)
        else:
            self.visit(node.value)

    def _note(self, node: ast.Name, attribute: ast.Attribute | None) -> None:
        # A class's names are seen by its body alone, not by the functions in it.
        visible = [s.names for i, s in enumerate(self.scopes) if not s.is_class or i == len(self.scopes) - 1]
        shadows = frozenset().union(*visible)
        if node.id not in shadows:
            self.found.append(Reference(node, attribute, shadows, self.annotation))

    def _inside(self, scope: Scope, nodes) -> None:
        self.scopes.append(scope)
        for node in nodes:
            self.visit(node)
        self.scopes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        args = node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
        for part in filter(None, [*node.decorator_list, *args.defaults, *args.kw_defaults]):
            self.visit(part)
        for part in filter(None, [node.returns, *(a.annotation for a in every)]):
            self.annotation = part
            self.visit(part)
        self.annotation = None
        self._inside(Scope({a.arg for a in every} | bound_names(node.body)), node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        args = node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
        for part in filter(None, [*args.defaults, *args.kw_defaults]):
            self.visit(part)
        self._inside(Scope({a.arg for a in every}), [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in [*node.decorator_list, *node.bases, *node.keywords]:
            self.visit(part)
        self._inside(Scope(bound_names(node.body), is_class=True), node.body)

    def _comprehension(self, node) -> None:
        names: set[str] = set()
        for generator in node.generators:
            _collect(generator.target, names)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        # The first iterable belongs to the scope around it.
        self.visit(node.generators[0].iter)
        later = [part for g in node.generators for part in (g.target, *g.ifs)]
        later += [g.iter for g in node.generators[1:]]
        self._inside(Scope(names), [*later, *results])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension
