"""Tables of the documentation site that come from the code itself: its errors and its models."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from dit_accel_eval.runs.results import markdown_table

from dit_accel.adapters.installed import adapters, not_supported
from dit_accel.errors import install
from dit_accel.methods.verdicts import refused_by, spell_refusal

RAISED = (
    "ConfigError", "MissingOption", "UnsupportedModel", "AttachError", "MissingBackend", "ProcessLost",
    "BackendUnavailableError",
)  # fmt: skip
"""What a user meets; kernels raise ValueError and TypeError besides."""

PIPELINES = "pipelines/dit_accel_pipelines"
ROOMS: dict[str, tuple[str, ...]] = {
    "attaching": ("dit_accel/attachment", "dit_accel/serving", "dit_accel/adapters", f"{PIPELINES}/families"),
    "options": ("dit_accel/methods",),
    "shapes": ("dit_accel/plan", "dit_accel/rules", "dit_accel/report", "dit_accel/testing"),
    "predicting": ("dit_accel/estimate", "dit_accel/cli"),
    "generating": (f"{PIPELINES}/generation", f"{PIPELINES}/processes"),
    "files": ("dit_accel/files.py", "dit_accel/errors.py", "dit_accel/public.py"),
    "finetuning": (f"{PIPELINES}/finetuning",),
    "evaluating": ("eval/dit_accel_eval",),
    "kernels": ("kernels/dit_accel_kernels",),
}
"""Table of docs/troubleshooting.md -> where its errors are raised; each file belongs to the first that holds it."""


def errors_list(root: Path, room: str) -> str:
    """All errors that are raised in a room, what differs from case to case as ``<name>``, the advice beneath each."""
    further = ("ValueError", "TypeError") if room == "kernels" else ()
    advices: dict[str, str] = {}
    for path in _files(root, room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for text in _texts(tree, {*RAISED, *further}, _strings(tree.body)):
            what, _, advice = text.rpartition("; ")
            if what:
                advices.setdefault(what, advice)
            elif len(text.split()) > 3:
                advices.setdefault(text, "")
    entries = []
    for what, advice in sorted(advices.items()):
        advice = _words("see what it lists" if advice == "<...>" else advice).replace("<", "&lt;")
        if any(word.isalpha() for word in what.split()):
            entries.append(f"- `{_words(what)}`" + (f"<br>{advice}" if advice else ""))
    return "\n".join(entries)


def _words(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")


def _files(root: Path, room: str) -> list[Path]:
    paths: list[Path] = []
    for place in ROOMS[room]:
        path = root / place
        paths += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return paths


def _texts(node: ast.AST, names: set[str], known: dict[str, str]) -> Iterator[str]:
    """The messages of all calls of an error's class, raised at once or made first."""
    if isinstance(node, ast.FunctionDef):
        known = known | _strings(ast.walk(node))
    if isinstance(node, ast.Call) and node.args and _called(node) in names:
        yield _text(node.args[0], known)
    for child in ast.iter_child_nodes(node):
        yield from _texts(child, names, known)


def _strings(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """The texts that have a name at a module's top or in a function, such as advice that several errors give."""
    return {
        target.id: _text(node.value, {})
        for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value, constants) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, constants) + _text(right, constants)
        case ast.FormattedValue(value=ast.Call(func=ast.Name(id="install"), args=[ast.Constant(value=str(part))])):
            return install(part)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.FormattedValue(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            return f"<{'class' if name == '__name__' else name.strip('_')}>"
    return "<...>"


def models_table(_: Path) -> str:
    """A row for each family: its transformer classes, the released models whose sizes are known, what it refuses."""
    rows = []
    for adapter in adapters().values():
        refused = refused_by(adapter)
        known = [family for family in adapter.families if not family.repo.startswith("embedded/")]
        named = [adapter.transformers, [family.name for family in known], refused]
        rows.append([adapter.name, *(", ".join(f"`{name}`" for name in some) or "-" for some in named)])
    return markdown_table("family | transformer classes | sizes known of | takes all but", rows)


def not_supported_table(_: Path) -> str:
    """The classes of diffusers that no adapter covers, those of one reason in a row."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in not_supported().items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    return markdown_table("class | why not", [[", ".join(names), reason] for reason, names in by_reason.items()])


def reasons_table(_: Path) -> str:
    """Why families refuse methods, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for adapter in adapters().values():
        for name, why in refused_by(adapter).items():
            reasons.setdefault((name, spell_refusal(why, adapter)), []).append(adapter.name)
    rows = [[f"`{name}`", why, "image models" if len(some) > 9 else ", ".join(some)]
            for (name, why), some in reasons.items()]  # fmt: skip
    return markdown_table("method | why not | families", rows)
