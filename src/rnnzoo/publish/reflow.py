"""Long statements on fewer lines: what stands one argument a line is packed into lines of full width."""

from __future__ import annotations

import ast
import io
import tokenize

__all__ = ["WIDTH", "reflow"]

WIDTH = 120
OPENING, CLOSING = "([{", ")]}"


def reflow(text: str) -> str:
    """The source with its broken logical lines packed; those with comments or long strings inside stay as they are."""
    lines = text.splitlines()
    done, next_line = [], 0
    for first, last in _broken_lines(text, lines):
        done += lines[next_line:first]
        done += _packed(lines[first : last + 1])
        next_line = last + 1
    if not done:
        return text
    result = "\n".join([*done, *lines[next_line:]]) + "\n"
    assert ast.dump(ast.parse(result)) == ast.dump(ast.parse(text)), "packing lines has changed what they say"
    return result


def _broken_lines(text: str, lines: list[str]) -> list[tuple[int, int]]:
    """First and last line, from 0, of each logical line that may be packed."""
    found, first, packable = [], None, True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            continue
        if token.type == tokenize.COMMENT:
            packable = packable and first is None
            continue
        if token.type == tokenize.NEWLINE:
            long = first is not None and len(lines[first]) > WIDTH
            if first is not None and packable and (token.end[0] - 1 > first or long):
                found.append((first, token.end[0] - 1))
            first, packable = None, True
            continue
        if first is None:
            first, packable = token.start[0] - 1, True
        packable = packable and token.start[0] == token.end[0]
    return found


def _packed(lines: list[str]) -> list[str]:
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    joined = lines[0].strip()
    for line in (line.strip() for line in lines[1:]):
        tight = joined[-1] in OPENING or line[0] in CLOSING
        if line[0] in CLOSING and joined.endswith(",") and not _one_element_tuple(joined, line):
            joined = joined[:-1]
        joined += line if tight else " " + line
    if len(indent + joined) <= WIDTH:
        return [indent + joined]
    return _split(indent, joined) or lines


def _one_element_tuple(joined: str, line: str) -> bool:
    """Whether the comma before a closing bracket is what makes a tuple."""
    if line[0] != ")":
        return False
    depth, commas = 0, 0
    for token in reversed(_tokens(joined)):
        depth += (token.string in CLOSING) - (token.string in OPENING)
        commas += depth == 0 and token.string == ","
        if depth < 0:
            return commas == 1
    return False


def _tokens(code: str) -> list[tokenize.TokenInfo]:
    """Tokens of code whose brackets need not be closed."""
    tokens = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.string:
                tokens.append(token)
    except tokenize.TokenError:
        pass
    return tokens


def _split(indent: str, code: str) -> list[str] | None:
    """Head with the opening bracket, the content packed, and the tail; None where that does not fit."""
    pairs, stack, commas = [], [], {}
    for token in _tokens(code):
        if token.string in OPENING:
            stack.append(token.start[1])
        elif token.string in CLOSING:
            pairs.append((stack.pop(), token.start[1], len(stack)))
        elif token.string == "," and stack:
            commas.setdefault(stack[-1], []).append(token.end[1])
    for opening, closing, _ in sorted((p for p in pairs if p[2] == 0), key=lambda p: p[0] - p[1]):
        head, tail = indent + code[: opening + 1], indent + code[closing:]
        edges = [opening + 1, *commas.get(opening, []), closing]
        parts = [code[a:b].strip() for a, b in zip(edges, edges[1:], strict=False)]
        content = _fill([part for part in parts if part], indent + "    ")
        if content and len(head) <= WIDTH and len(tail) <= WIDTH:
            return [head, *content, tail]
    return None


def _fill(parts: list[str], indent: str) -> list[str] | None:
    lines: list[str] = []
    for part in parts:
        if len(indent + part) > WIDTH:
            deeper = _split(indent, part)
            if deeper is None:
                return None
            lines += deeper
        elif lines and len(lines[-1]) + 1 + len(part) <= WIDTH and lines[-1].endswith(","):
            lines[-1] += " " + part
        else:
            lines.append(indent + part)
    return lines
