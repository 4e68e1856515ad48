"""The house's own rules: what may be imported, how large things are, which names stay free."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "pipelines", "eval", "assets", "comfyui")
SOURCES = [
    path for room in ("dit_accel", *ROOMS) for path in sorted((ROOT / room).rglob("*.py")) if "runs" not in path.parts
]

VALUES = re.compile(r"'[^']*'(?!\w)")  # what an error quotes
WORD = r"[a-z]+(?:['-][a-z]+)*"
PROSE = re.compile(rf"(?<![\w\\.'-]){WORD}(?: {WORD}){{2,}}(?![\w\\']*\w)")  # three plain words in a row


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_room_folders_are_no_packages():
    found = [room for room in (*ROOMS, "tests") if (ROOT / room / "__init__.py").exists()]
    assert found == ["comfyui"]  # ComfyUI imports the folder itself, by a name of its own
    found = run("import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)").strip()
    assert not found.startswith(str(ROOT))


def test_nothing_imports_the_nodes_for_comfyui():
    assert not [path for path in SOURCES if "comfyui" not in path.parts and "dit_accel_comfyui" in path.read_text()]


def test_importing_is_light():
    loaded = run("import dit_accel, sys; print(*sys.modules)").split()
    assert not {"torch", "diffusers", "triton", "matplotlib", "transformers"} & set(loaded)
    loaded = run("import sys; from dit_accel import attach; print(*sys.modules)").split()
    assert not {"diffusers", "triton", "transformers"} & set(loaded)
    assert run("import torch, dit_accel.attachment; print(torch.cuda.is_initialized())").strip() == "False"


def test_the_python_that_is_asked_for_is_one_that_diffusers_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    floor = project["project"]["requires-python"].removeprefix(">=")
    theirs = metadata("diffusers")["Requires-Python"]
    assert theirs.startswith(f">={floor}")
    assert project["tool"]["ruff"]["target-version"] == f"py{floor.replace('.', '')}"
    assert project["tool"]["pyright"]["pythonVersion"] == floor
    assert f"Python {floor} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_public_face():
    import dit_accel

    assert all(getattr(dit_accel, name) is not None for name in dit_accel.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dit_accel.nothing  # noqa: B018


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= (40 if path.name == "__init__.py" else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body  # options are no code
            size = (node.end_lineno or node.lineno) - body[0].lineno + 1
            assert size <= (150 if node.name.endswith("_kernel") else 60), f"{node.name} has {size} lines"


def test_rooms_have_short_readmes():
    for room in ROOMS:
        readme = ROOT / room / "README.md"
        assert readme.exists(), readme
        assert len(readme.read_text().splitlines()) <= 40


def column(test: ast.FunctionDef, argument: str, tables: dict[str, ast.expr]) -> Iterator[ast.expr]:
    """Yield what `parametrize` gives an argument of a test."""
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parametrize":
            names = ast.literal_eval(mark.args[0])
            if argument in (names if isinstance(names, tuple) else (names,)):
                rows = tables.get(ast.unparse(mark.args[1]), mark.args[1])
                for row in getattr(rows, "elts", ()):
                    cells = row.args if isinstance(row, ast.Call) else getattr(row, "elts", (row,))
                    yield cells[names.index(argument) if isinstance(names, tuple) else 0]


def matches(tree: ast.Module) -> Iterator[str]:
    """Yield every `match=` of a test file, with 0 for what a test fills in."""
    tables = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    for test in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        for node in ast.walk(test):
            if isinstance(node, ast.keyword) and node.arg == "match":
                names = [part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)]
                for literal in (node.value, *(cell for name in names for cell in column(test, name, tables))):
                    parts = getattr(literal, "values", [literal])
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in parts)


@pytest.mark.parametrize("folder", [*ROOMS, "core"])
def test_errors_are_told_by_their_values_and_not_by_their_prose(folder):
    found = [text for path in (ROOT / "tests" / folder).glob("*.py") for text in matches(ast.parse(path.read_text()))]
    assert found
    assert not [text for text in found if PROSE.search(VALUES.sub("0", text))]
