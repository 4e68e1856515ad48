"""The pages for authors of methods and models: their own files are installed, run and counted as a reader would."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dit_accel.adapters import Adapter
from dit_accel.testing import check_adapter

ROOT = Path(__file__).resolve().parents[2]
FILES = re.compile(r"^`([\w.]+\.(?:py|toml))`[^\n]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
LONGEST = {"window.py": 20, "stillcache.py": 25, "smoothed.py": 30, "my_video.py": 15}
"""The most lines that a file of the pages may have, imports, docstrings and blank lines counted."""


def files_of(page: str) -> dict[str, str]:
    """The files that a page shows, by the name that stands above each."""
    return dict(FILES.findall((ROOT / "docs" / page).read_text(encoding="utf-8")))


def run_page(page: str, folder: Path, *command: str, install: bool = True) -> str:
    """Write a page's files to a folder, install them, and run a command there; what it prints."""
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
    (info / "entry_points.txt").write_text("\n".join(groups) if install else "")
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])])
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PROPOSED = re.compile(r"prints .*?^```\n(Adapter\(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["adding-a-method.md", "adding-a-model.md"])
def test_files_of_a_page_are_as_short_as_promised(page):
    files = files_of(page)
    for name in LONGEST.keys() & files:
        assert len(files[name].splitlines()) <= LONGEST[name], name
    assert len(LONGEST.keys() & files) == {"adding-a-method.md": 3, "adding-a-model.md": 1}[page]


def test_the_proposal_for_the_model_is_what_the_page_shows(tmp_path):
    (shown,) = PROPOSED.findall((ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8"))
    assert run_page("adding-a-model.md", tmp_path, "propose.py", install=False) == shown


QUICK = """
from dit_accel.testing import check_adapter
from my_video import MY_VIDEO
from tiny import TINY
print(set(check_adapter(MY_VIDEO, TINY, only=["places", "neutral", "full", "layout", "blocks", "rope"])
          ["MyVideoTransformer3DModel 0"].values()))
"""


@pytest.mark.slow
def test_the_model_of_the_page_passes_the_quick_checks(tmp_path):
    assert run_page("adding-a-model.md", tmp_path, "-c", QUICK) == "{'passed'}\n"


@pytest.mark.slow
def test_the_model_of_the_page_passes_every_check(tmp_path):
    verdicts = ast.literal_eval(run_page("adding-a-model.md", tmp_path, "check.py"))["MyVideoTransformer3DModel 0"]
    told = {name: verdict for name, verdict in verdicts.items() if verdict != "passed"}
    assert told.keys() <= {"signal", "padding", "refused"}, told


def test_without_a_tiny_model_nothing_would_be_checked():
    adapter = Adapter(name="any", transformers=("AnyTransformer",), self_attention=("blocks.*.attn",))
    with pytest.raises(AssertionError, match=r"TinyModel.*AnyTransformer"):
        check_adapter(adapter, only=["places"])


PLAN = ("-m", "dit_accel", "plan", "--family", "wan2.1-1.3b", "--window", "--set", "window.frames=1", "--json")


def test_a_plan_knows_what_the_mask_of_the_page_saves(tmp_path):
    saving = json.loads(run_page("adding-a-method.md", tmp_path, *PLAN))
    assert 0 < saving["density"] < 0.2


def test_the_methods_of_the_page_pass_their_own_checks(tmp_path):
    said = run_page("adding-a-method.md", tmp_path, "check.py")
    all_kinds = {"neutral", "active", "runs", "branches", "batch", "not a number", "gradients", "toml"}
    for line, kind in zip(said.splitlines(), ("planned", "skips", "free"), strict=True):
        (kept,) = ast.literal_eval(line).values()
        assert {*kept} - {"beside guidance"} == {*all_kinds, kind}
