"""Pages for authors: their files are installed and run as a reader would, and every room and public name is listed."""

import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dit_accel.adapters import Adapter, installed
from dit_accel.cli.app import app
from dit_accel.methods import registry
from dit_accel.testing import check_adapter

ROOT = Path(__file__).resolve().parents[2]
METHOD, MODEL = "adding-a-method.md", "adding-a-model.md"
FILES = re.compile(r"^`([\w.]+\.(?:py|toml))`[^\n]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROPOSED = re.compile(r"prints .*?^```\n(Adapter\(.*?)^```", re.MULTILINE | re.DOTALL)
LONGEST = {METHOD: {"window.py": 20, "stillcache.py": 25, "smoothed.py": 30}, MODEL: {"my_video.py": 15}}
"""The most lines that a file of the pages may have, imports, docstrings and blank lines counted."""


def text_of(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def forget_installed():
    for cached in (installed.adapters, installed.not_supported, registry.handlers):
        cached.cache_clear()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Return a function that writes a page's files to the folder where it stands, and installs them."""

    def write(page, install=True):
        files = dict(FILES.findall(text_of(page)))
        for name, text in files.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        project = tomllib.loads(files["pyproject.toml"])["project"]
        info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"  # as of pip install -e
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
        groups = [
            "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
            for group, entries in project["entry-points"].items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups) if install else "")
        forget_installed()

    before = {*sys.modules}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in {*sys.modules} - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    monkeypatch.undo()
    forget_installed()


def printed(file):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(file)
    return out.getvalue()


@pytest.mark.parametrize("page", LONGEST)
def test_files_of_a_page_are_as_short_as_promised(page):
    lengths = {name: len(text.splitlines()) for name, text in FILES.findall(text_of(page))}
    assert all(lengths[name] <= most for name, most in LONGEST[page].items()), lengths


def test_the_proposal_for_the_model_is_what_the_page_shows(reader):
    reader(MODEL, install=False)
    assert [printed("propose.py")] == PROPOSED.findall(text_of(MODEL))


@pytest.mark.slow
def test_the_model_of_the_page_passes_every_check(reader):
    reader(MODEL)
    verdicts = ast.literal_eval(printed("check.py"))["MyVideoTransformer3DModel 0"]
    others = {name: verdict for name, verdict in verdicts.items() if verdict != "passed"}
    assert others.keys() <= {"signal", "padding", "refused"}, others


def test_without_a_tiny_model_nothing_would_be_checked():
    adapter = Adapter(name="any", transformers=("AnyTransformer",), self_attention=("blocks.*.attn",))
    with pytest.raises(AssertionError, match=r"TinyModel.*AnyTransformer"):
        check_adapter(adapter, only=["places"])


def test_the_methods_of_the_page_can_be_planned_and_pass_their_own_checks(reader):
    reader(METHOD)
    words = "plan --family wan2.1-1.3b --window --set window.frames=1 --json"
    assert 0 < json.loads(CliRunner().invoke(app, words.split()).stdout)["density"] < 0.2
    all_kinds = {"neutral", "active", "runs", "branches", "batch", "not a number", "gradients", "toml"}
    for line, kind in zip(printed("check.py").splitlines(), ("planned", "skips", "free"), strict=True):
        (kept,) = ast.literal_eval(line).values()
        assert {*kept} - {"beside guidance"} == {*all_kinds, kind}


PUBLIC = "dit_accel dit_accel.methods dit_accel.adapters dit_accel.testing dit_accel_kernels dit_accel_eval.metrics"


def test_the_api_pages_name_every_public_name_once():
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    entries = [entry for page in pages for entry in re.findall(r"^::: ([\w.]+)\.(\w+)$", page.read_text(), re.M)]
    assert len(entries) == len(set(entries)) > 50
    listed = [getattr(importlib.import_module(module), name) for module, name in entries]
    for package in map(importlib.import_module, PUBLIC.split()):
        missing = {name for name in package.__all__ if not any(x is getattr(package, name) for x in listed)}
        assert missing <= {"__version__"}, package


def folders(base):
    """Names of a folder's folders that hold Python, or pages."""
    inner = (path for path in base.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
    return {path.name for path in inner if any(path.rglob("*.py")) or (path / "index.md").is_file()}


def test_every_room_stands_in_the_drawing():
    page = text_of("how-it-works.md")
    words = set(re.findall(r"[\w./]+", page[page.index("## The rooms") :].partition("```")[2].partition("```")[0]))
    words = {word.strip("/.") for word in words} | {word.partition("/")[2] for word in words}
    packages = ("", "dit_accel", "pipelines/dit_accel_pipelines", "eval/dit_accel_eval")
    rooms = {room for package in packages for room in folders(ROOT / package)}
    assert (rooms | {"studies"}) - {"build", "dist", "site"} <= words
