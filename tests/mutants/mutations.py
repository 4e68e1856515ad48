"""Small defects that could stand in the source: which there are in a file, and the file's text with one of them."""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
CALLED = {"any": "all", "all": "any", "min": "max", "max": "min", "ceil": "floor", "floor": "ceil", "amax": "amin"}
DROPPED = frozenset({"clone", "contiguous", "abs", "clamp", "round", "sorted", "detach"})
"""Calls in whose place their first operand can stand."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One defect."""

    file: str  # path from the repository's root
    line: int  # where what it changes begins, from 1
    where: str  # the function or class around it, such as ``Plan.scale``
    before: str
    after: str
    span: tuple[int, int, int, int]  # line, byte, last line and last byte of ``before``
    number: int = 1  # which of several such defects of one function it is

    @property
    def key(self) -> str:
        """What names it even after lines around it have moved."""
        place = f"{self.where}#{self.number}" if self.number > 1 else self.where
        return f"{self.file}:{place}: {self.before} -> {self.after}"


def mutations_of(file: str, text: str) -> list[Mutation]:
    """Return all defects that are drawn from in a file; none in messages, annotations, docstrings and GPU kernels."""
    lines = text.encode().splitlines(keepends=True)
    found: list[Mutation] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for where, node, after in _walk(ast.parse(text), ""):
        span = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
        before = " ".join(_cut(lines, span).decode().split())
        after = ast.unparse(after) if isinstance(after, ast.AST) else after
        seen[where, before, after] += 1
        found.append(Mutation(file, node.lineno, where, before, after, span, seen[where, before, after]))
    return found


def mutated(text: str, mutation: Mutation) -> str:
    """Return a file's text with the defect in it."""
    lines = text.encode().splitlines(keepends=True)
    first, begin, last, end = mutation.span
    after = mutation.after if mutation.after == "pass" else f"({mutation.after})"
    lines[first - 1 : last] = [lines[first - 1][:begin] + after.encode() + lines[last - 1][end:]]
    return b"".join(lines).decode()


def _cut(lines: list[bytes], span: tuple[int, int, int, int]) -> bytes:
    first, begin, last, end = span
    rows = lines[first - 1 : last]
    rows[-1] = rows[-1][:end]
    rows[0] = rows[0][begin:]
    return b"".join(rows)


def _walk(node: ast.AST, where: str) -> Iterator[tuple[str, ast.AST, ast.AST | str]]:
    """Yield (function or class around it, what is changed, what stands there instead)."""
    if isinstance(node, (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, ast.Raise):  # its message is no behaviour, but that it is raised is
        yield where, node, "pass"
        return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            return
        where = f"{where}.{node.name}" if where else node.name
    yield from ((where, node, after) for after in _variants(node))
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if isinstance(node, ast.Call) and field == "keywords":
            value = [one for one in value if one.arg not in ("stacklevel", "strict", "message")]
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_warning(child):
                yield from _walk(child, where)


def _is_warning(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"


def _variants(node: ast.AST) -> Iterator[ast.AST | str]:
    """Yield what could stand in place of one node."""
    changed = copy.copy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        changed.ops = [COMPARED[type(node.ops[0])](), *node.ops[1:]]
        yield changed
    elif isinstance(node, ast.BoolOp):
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield changed
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and not _is_text(node):
        changed.op = COMPUTED[type(node.op)]()
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 1.5 + (node.value == 0))
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Call):
        yield from _called(node)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _is_warning(node.value):
        yield "pass"


def _called(node: ast.Call) -> Iterator[ast.AST]:
    own = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if own in CALLED:
        changed = copy.copy(node)
        changed.func = copy.copy(node.func)
        setattr(changed.func, "attr" if isinstance(node.func, ast.Attribute) else "id", CALLED[own])
        yield changed
    elif own in DROPPED:
        if isinstance(node.func, ast.Attribute):
            yield node.func.value
        elif node.args:
            yield node.args[0]


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(one, (ast.JoinedStr, ast.Constant)) and not isinstance(getattr(one, "value", 0), (int, float))
               for one in (node.left, node.right))  # fmt: skip
