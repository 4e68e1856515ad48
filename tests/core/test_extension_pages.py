"""The pages for authors of methods and models: their own files are installed, run and counted as a reader would."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = re.compile(r"^`([\w.]+\.(?:py|toml))`[^\n]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
LONGEST = {"window.py": 25, "stillcache.py": 15, "smoothed.py": 30, "my_video.py": 20}
"""The most lines of code that a file of the pages may have."""


def files_of(page: str) -> dict[str, str]:
    """The files that a page shows, by the name that stands above each."""
    return dict(FILES.findall((ROOT / "docs" / page).read_text(encoding="utf-8")))


def code_lines(text: str) -> int:
    """Lines that are no blank, no comment and no docstring."""
    strings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and at not in strings for at, line in lines)


def run_page(page: str, folder: Path, *command: str) -> str:
    """Install a page's files in a folder and run a command there; what it prints."""
    files = files_of(page)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"  # what pip install -e leaves
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])])
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["adding-a-method.md"])
def test_files_of_a_page_are_as_short_as_promised(page):
    files = files_of(page)
    for name in LONGEST.keys() & files:
        assert code_lines(files[name]) <= LONGEST[name], name
    assert len(LONGEST.keys() & files) == {"adding-a-method.md": 3, "adding-a-model.md": 1}[page]


def test_the_methods_of_the_page_pass_their_own_checks(tmp_path):
    said = run_page("adding-a-method.md", tmp_path, "check.py")
    assert said.splitlines() == [
        "{'WanTransformer3DModel 0': ['neutral', 'active', 'batch']}",
        "{'WanTransformer3DModel 0': ['cache']}",
        "{'WanTransformer3DModel 0': ['guidance']}",
    ]
