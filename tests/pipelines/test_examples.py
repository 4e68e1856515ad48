"""The examples: short, of public names alone, true in the speed that they promise; each runs on a tiny model."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from examples_runner import run

import dit_accel
from dit_accel import methods
from dit_accel.methods import registry

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATHS = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "pipelines", "eval", "assets"))
MADE = {
    "wan_long_24gb.py": ("long.mp4", "forwards"),
    "hunyuan_video_fast.py": ("cat.mp4", "easycache: 4 of 12"),
    "flux_4k.py": ("harbour.png", "18 x 18 tokens, trained on 12 x 12"),
    "flux_img2img_batch.py": ("redrawn/4.png", "easycache"),
    "lora_and_cache.py": ("boat-1.0.mp4", "LoRA at 1.0"),
    "torchao_and_preset.py": ("lighthouse.png", "easycache"),
    "two_gpus.py": ("kite.mp4", "sparse calls"),
    "prompts_of_a_file.py": ("004.mp4", "004.mp4 a yellow circle"),
    "own_mask.py": ("window.mp4", "sparse calls"),
    "own_cache.py": ("fox.png", "my-cache: 2 of 12"),
    "tune_to_a_target.py": ("kite.mp4", "easycache"),
    "compare_two_settings.py": ("cache-and-sparse.png", "same seed"),
}
"""Example -> a file that it writes, and what it prints."""

ALONE = ("two_gpus.py", "tune_to_a_target.py")
"""Those that run in processes of their own."""

NEEDED = {
    "torchao_and_preset.py": ["torchao"], "lora_and_cache.py": ["peft"], "tune_to_a_target.py": ["optuna"],
}  # fmt: skip
QUICK = ("hunyuan_video_fast.py", "own_cache.py")


@pytest.fixture
def own_methods():
    """Forget the methods that an example registers."""
    yield
    registry._registered.clear()
    registry.handlers.cache_clear()


def test_there_are_twelve_and_the_page_tells_of_each():
    assert {*MADE} == {path.name for path in EXAMPLES.glob("*.py")} - {"run.py"}
    told = dict(re.findall(r"^\| \[(\w+\.py)\].*\| (\d+) \|$", (EXAMPLES / "README.md").read_text(), re.M))
    assert told == {name: str(len((EXAMPLES / name).read_text().splitlines())) for name in MADE}
    assert all(int(lines) < 40 for lines in told.values())


def test_only_public_names_are_used():
    for tree in (ast.parse((EXAMPLES / name).read_text()) for name in MADE):
        assert ast.get_docstring(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_")
                if isinstance(node.value, ast.Name) and node.value.id == "dit_accel":
                    assert node.attr in dit_accel.__all__
            if isinstance(node, ast.ImportFrom):
                assert not any(part.startswith("_") for part in (node.module or "").split("."))
                known = methods.__all__ if node.module == "dit_accel.methods" else None
                assert known is None or {alias.name for alias in node.names} <= {*known}


def test_the_speed_up_that_is_promised_is_the_one_predicted():
    settings = dit_accel.recommend("hunyuan-video", hardware="80GB").settings
    (fast,) = [one for one in settings if one.name == "fast"]
    assert f"{fast.speedup:.1f} times as fast" in (EXAMPLES / "hunyuan_video_fast.py").read_text()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MADE if name not in ALONE],
)
def test_it_runs_on_a_tiny_model(name, capsys, own_methods):
    """It writes and prints what it should."""
    for needed in NEEDED.get(name, ()):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    with run.folder() as folder, run.tiny():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert (folder / MADE[name][0]).stat().st_size > 100
    assert MADE[name][1] in capsys.readouterr().out


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "no.py"])
    with pytest.raises(SystemExit, match=r"one example.*flux_4k\.py$"):
        run.main()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SystemExit, match=r"torchao, .* install torchao$"):
        runpy.run_path(str(EXAMPLES / "torchao_and_preset.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_those_of_several_processes_run_by_the_switch(name):
    for needed in NEEDED.get(name, ()):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "two_gpus.py" else []
    command = [sys.executable, *several, str(EXAMPLES / "run.py"), str(EXAMPLES / name)]
    environment = {**os.environ, run.SWITCH: "tiny", "PYTHONPATH": PATHS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert MADE[name][1] in done.stdout


NOTEBOOK = EXAMPLES / "first_hour.ipynb"


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    reason = "notebooks run by nbclient and ipykernel: pip install nbclient ipykernel"
    nbclient, nbformat = pytest.importorskip("nbclient", reason=reason), pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    monkeypatch.setenv("PYTHONPATH", PATHS)
    made = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(made, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = str([cell.outputs for cell in made.cells if cell.cell_type == "code"])
    words = ("measured speed-up", "why not faster", "easycache and the window", "8 dense steps")
    assert all(word in said for word in words)
    assert (tmp_path / "check.png").exists()
