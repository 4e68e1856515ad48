"""README, documentation and examples run from their text: Python on tiny models, commands that take no weights."""

import ast
import contextlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from some_cases import some
from tiny_stock import stock_pipeline
from typer.testing import CliRunner

import dit_accel
from dit_accel import methods
from dit_accel.adapters.installed import families
from dit_accel.cli.app import app
from dit_accel.methods import registry

ROOT = Path(__file__).resolve().parents[2]
SPEC: Any = importlib.util.spec_from_file_location("examples_run", ROOT / "examples" / "run.py")
run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run)
PAGES = [Path("README.md"), *(path.relative_to(ROOT) for path in sorted(ROOT.glob("docs/**/*.md")))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)

ELSEWHERE = {
    "docs/adding-a-method.md": "tests/core/test_extension_pages.py",
    "docs/adding-a-model.md": "tests/core/test_extension_pages.py",
    "docs/masks.md": "tests/kernels/test_masks_page.py",
    "docs/metrics.md": "tests/eval/test_metrics.py",
    "docs/scaling.md": "tests/pipelines/test_context_parallel.py",
    **{f"docs/methods/{path.name}": "tests/eval/test_method_pages.py" for path in ROOT.glob("docs/methods/*.md")},
}
"""Page -> the test that runs its Python."""

FITTED = {
    'heads="L3H1, L5"': 'heads="L3H1"',
    'layers="L13"': 'layers="L1"',
    "SLG()": 'SLG(layers="L1")',
    'layers="L7-9"': 'layers="L1"',
    'weak="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': "weak_transformer=weak",
    'heads="golden-hour"': 'heads="L1H0"',
    "ProfilingCache()": 'ProfilingCache(blocks="1-3")',
    'torch.Generator("cuda")': "torch.Generator()",
}
"""What belongs to a released model -> what takes its place on a tiny one."""


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall((ROOT / page).read_text("utf-8")) if language in languages]


CODE = [page for page in PAGES if blocks(page, "python") and page.as_posix() not in ELSEWHERE]
QUICK = ("README.md", "docs/adding-a-kernel.md", "docs/own-loops.md")


def prepared(page: Path) -> dict[str, Any]:
    """What a page takes for granted, from one to the next block: a pipeline, and the parts of a loop."""
    from diffusers import FluxPipeline, WanPipeline

    pipe: Any = (FluxPipeline if page == Path("docs/longer.md") else WanPipeline).from_pretrained("any")
    latents, text = torch.zeros(1, 12, 5, 8, 8), torch.zeros(1, 32, getattr(pipe.transformer.config, "text_dim", 1))
    weak = type(pipe.transformer).from_config({**pipe.transformer.config, "num_layers": 1})
    return {
        "torch": torch, "dit_accel": dit_accel, "pipe": pipe, "transformer": pipe.transformer, "weak": weak,
        "latents": latents, "x": latents, "timestep": torch.tensor([500]), "prompt": text, "negative": text,
        "text": text, "timesteps": torch.tensor([[900], [500]]), "sigmas": [0.9, 0.5], "embeds": text[:, :8],
    }  # fmt: skip


@contextlib.contextmanager
def stable_diffusion():
    """Let Stable Diffusion 3 be loaded as a tiny one."""
    from diffusers import StableDiffusion3Pipeline

    def load(*_: Any, **__: Any) -> Any:
        pipe, arguments = stock_pipeline("StableDiffusion3Pipeline")
        kind, original = type(pipe), type(pipe).__call__
        call = {"__call__": lambda self, *_, **__: original(self, **arguments)}
        pipe.__class__ = type(kind.__name__, (kind,), call)
        return pipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion3Pipeline, "from_pretrained", load)
        yield


def test_every_page_with_python_is_run_here_or_where_it_is_named():
    assert {Path(page) for page in ELSEWHERE} <= set(PAGES)
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())
    assert {Path(page) for page in QUICK} <= set(CODE)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=() if page.as_posix() in QUICK else pytest.mark.slow) for page in CODE], ids=str
)
def test_the_python_of_a_page_runs(page):
    with run.folder(), run.tiny(), stable_diffusion(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = prepared(page)
        for text in blocks(page, "python"):
            for real, tiny in FITTED.items():
                text = text.replace(real, tiny)
            names["pipe"] = loose(names["pipe"])
            for part in parts(text):
                loose(names["pipe"])
                exec(compile(part, str(page), "exec"), names)
        loose(names["pipe"])


def parts(text: str) -> list[str]:
    """A block that shows several ways to attach, each to be run by itself behind what comes before them."""
    head, *ways = re.split(r"^(?=dit_accel\.attach\()", text, flags=re.M)
    return [head + way for way in ways] or [text]


def loose(pipe: Any) -> Any:
    if (attachment := dit_accel.attachment_of(pipe)) is not None:
        attachment.detach()
    return pipe


FILES = ("prompts.txt", "p.txt", "first.png", "clips/1", "lora/1", "schedule.toml", "fast.toml")
"""What command lines name that must exist."""

WITHOUT_WEIGHTS = ("plan", "recommend", "methods", "describe")
"""Commands that run as they stand; of the others it is seen that they are understood."""


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, without comments."""
    lines = []
    for text in blocks(page, "", "bash", "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if "dit-accel " not in line and "dit_accel " not in line:
                continue  # what a command prints may hold an apostrophe
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            if "dit-accel" in words[:1]:
                lines.append(words[1:])
            elif "dit_accel" in words:
                lines.append(words[words.index("dit_accel") + 1 :])
    return lines


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page) and page != Path("docs/adding-a-method.md")], ids=str
)
def test_the_command_lines_of_a_page_are_understood(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a\n" if name.endswith(".txt") else "")
    for words in commands(page):
        understood(words)
        if words[0] in WITHOUT_WEIGHTS:
            ran = CliRunner().invoke(app, words)
            assert ran.exit_code == 0, (words, ran.output)


def understood(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    context = command.make_context("dit-accel", list(words))
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)


def test_the_models_page_names_sizes_that_plan_knows():
    rows = re.findall(r"^\| [\w.-]+ \| `\w[^|]* \| `([\w.-]+)`", (ROOT / "docs/models.md").read_text(), re.M)
    assert len(rows) > 25
    assert {*rows} <= {*families()}


# Examples: short, of public names alone, true in the speed that they promise

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
QUICK_EXAMPLES = ("hunyuan_video_fast.py", "own_cache.py")


@pytest.fixture
def own_methods():
    """Forget the methods that an example registers."""
    yield
    registry._registered.clear()
    registry.handlers.cache_clear()


def test_there_are_twelve_and_the_page_tells_of_each():
    assert {*MADE} == {path.name for path in EXAMPLES.glob("*.py")} - {"run.py"}
    lengths = dict(re.findall(r"^\| \[(\w+\.py)\].*\| (\d+) \|$", (EXAMPLES / "README.md").read_text(), re.M))
    assert lengths == {name: str(len((EXAMPLES / name).read_text().splitlines())) for name in MADE}
    assert all(int(lines) < 40 for lines in lengths.values())


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


@pytest.mark.parametrize("name", some([name for name in MADE if name not in ALONE], *QUICK_EXAMPLES))
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
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = str([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    words = ("measured speed-up", "why not faster", "easycache and the window", "8 dense steps")
    assert all(word in outputs for word in words)
    assert (tmp_path / "check.png").exists()
