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
    code = "import sys; from dit_accel import attach; import torch; print(torch.cuda.is_initialized(), *sys.modules)"
    initialized, *loaded = run(code).split()
    assert initialized == "False"
    assert not {"diffusers", "triton", "transformers"} & set(loaded)


def test_the_python_that_is_asked_for_is_one_that_diffusers_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    floor = project["project"]["requires-python"].removeprefix(">=")
    theirs = metadata("diffusers")["Requires-Python"]
    assert theirs.startswith(f">={floor}")
    assert project["tool"]["ruff"]["target-version"] == f"py{floor.replace('.', '')}"
    assert project["tool"]["pyright"]["pythonVersion"] == floor
    assert f"Python {floor} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_and_functions_are_short():
    long = []
    for path in SOURCES:
        text = path.read_text()
        if len(text.splitlines()) > (40 if path.name == "__init__.py" else 400):
            long.append(f"{path.relative_to(ROOT)} has {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body  # options are no code
                size = (node.end_lineno or node.lineno) - body[0].lineno + 1
                if size > (150 if node.name.endswith("_kernel") else 60):
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {size} lines")
    assert not long


def lines_of(*rooms: str) -> int:
    """Count the lines of the Python files of some folders."""
    return sum(len(path.read_text().splitlines()) for room in rooms for path in (ROOT / room).rglob("*.py"))


def test_the_house_grows_no_heavier():
    assert lines_of("tests") <= 45_800  # 44,000, and what generate, the benchmark and the levers gained since
    assert lines_of("dit_accel", "eval", "pipelines") <= 50_450  # 46,850, and the same


def test_no_lines_are_saved_by_switching_the_formatter_off():
    """Rows of a table may stand so, and no more of them than there are."""
    files = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
    assert sum(len(re.findall(r"# fmt: (?:skip|off)", path.read_text())) for path in files) <= 665


def test_the_suite_stays_short(request):
    """Not more than these are collected, however much of the suite is run."""
    if "slow" not in request.config.option.markexpr.replace("not slow", ""):
        assert len(request.session.items) <= (5_500 if "not slow" in request.config.option.markexpr else 7_500)


def branches_of(function: ast.AST) -> int:
    """Count the ways through a function as cyclomatic complexity does."""
    split = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.comprehension, ast.Assert, ast.match_case)
    nodes = list(ast.walk(function))
    return (
        1
        + sum(isinstance(node, split) for node in nodes)
        + sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    )


def test_few_functions_have_many_branches():
    trees = {path: ast.parse(path.read_text()) for path in SOURCES if path.parts[len(ROOT.parts)] == "dit_accel"}
    dense = [
        f"{path.name}: {node.name}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and branches_of(node) >= 12
    ]
    assert len(dense) <= 60, dense


def test_a_method_without_words_overrides_a_documented_one():
    """Of the hooks of methods, which the linter lets stand without a docstring."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "dit_accel" / "methods").rglob("*.py")]
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def functions(name: str) -> list[ast.FunctionDef]:
        parts = classes[name].body if name in classes else []
        return [part for part in parts if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]

    def documented(name: str) -> set[str]:
        above = [ast.unparse(base) for base in classes[name].bases] if name in classes else []
        return {part.name for part in functions(name) if ast.get_docstring(part)}.union(*map(documented, above))

    silent = {name: {part.name for part in functions(name)} - documented(name) for name in classes}
    assert not {name: methods for name, methods in silent.items() if methods}


NAMES = {"dit_accel": "", "dit_accel_kernels": "kernels", "dit_accel_pipelines": "pipelines", "dit_accel_eval": "eval"}
NAMES |= {"dit_accel_comfyui": "comfyui", "dit_accel_assets": "assets"}
PACKAGES = {name: ROOT / room / name for name, room in NAMES.items()}


def test_a_public_name_means_one_thing():
    """Of functions and classes at the top of the packages' modules; a kernel's and a command's name may repeat."""
    places: dict[str, list[str]] = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(f"{package}/{path.relative_to(folder)}")
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert len(twice) <= 30, twice


def imports() -> dict[str, set[str]]:
    """Read module -> the modules that it imports anywhere, of all packages."""
    modules = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    reached: dict[str, set[str]] = {}
    for module, path in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                names |= inside or {node.module}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        reached[module] = (names & modules.keys()) - {module}
    return reached


def test_no_module_imports_itself_by_way_of_others():
    left = imports()
    while ends := [module for module, names in left.items() if not names & left.keys()]:
        for module in ends:
            del left[module]
    starts = dict(left)
    while ends := [m for m in starts if not any(m in names for names in starts.values())]:
        for module in ends:
            del starts[module]
    assert not starts


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
                for entry in getattr(rows, "elts", ()):
                    row = getattr(getattr(entry, "value", entry), "elt", entry)  # of rows that a generator gives
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
