"""README and documentation run from their own text: Python on tiny models, commands where they take no weights."""

import contextlib
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from examples_runner import run
from tiny_stock import stock_pipeline
from typer.testing import CliRunner

import dit_accel
from dit_accel.cli.app import app

ROOT = Path(__file__).parents[2]
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


PICTURES = ("docs/longer.md",)
"""Pages whose pipeline makes pictures."""


def prepared(page: Path) -> dict[str, Any]:
    """What a page takes for granted, from one to the next block: a pipeline, and the parts of a loop."""
    from diffusers import FluxPipeline, WanPipeline

    pipe: Any = (FluxPipeline if page.as_posix() in PICTURES else WanPipeline).from_pretrained("any")
    latents, text = torch.zeros(1, 12, 5, 8, 8), torch.zeros(1, 32, getattr(pipe.transformer.config, "text_dim", 1))
    weak = type(pipe.transformer).from_config({**pipe.transformer.config, "num_layers": 1})
    return {
        "torch": torch, "dit_accel": dit_accel, "pipe": pipe, "transformer": pipe.transformer, "weak": weak,
        "latents": latents, "x": latents, "timestep": torch.tensor([500]), "prompt": text, "negative": text,
        "text": text,
        "timesteps": torch.tensor([[900], [500]]), "sigmas": [0.9, 0.5], "embeds": text[:, :8],
    }  # fmt: skip


@contextlib.contextmanager
def stable_diffusion():
    """Let Stable Diffusion 3 be loaded as a tiny one."""
    from diffusers import StableDiffusion3Pipeline

    def load(*_: Any, **__: Any) -> Any:
        pipe, given = stock_pipeline("StableDiffusion3Pipeline")
        kind, original = type(pipe), type(pipe).__call__
        call = {"__call__": lambda self, *_, **__: original(self, **given)}
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

WITHOUT_WEIGHTS = ("plan", "recommend", "methods", "models", "describe")
"""Commands that run as they stand; of the others it is seen that they are understood."""


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, without comments."""
    found = []
    for text in blocks(page, "", "bash", "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if "dit-accel " not in line and "dit_accel " not in line:
                continue  # what a command prints may hold an apostrophe
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            if "dit-accel" in words[:1]:
                found.append(words[1:])
            elif "dit_accel" in words:
                found.append(words[words.index("dit_accel") + 1 :])
    return found


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
    for family in rows:
        ran = CliRunner().invoke(app, ["plan", "--family", family, "--preset", "balanced", "--json"])
        assert ran.exit_code == 0, (family, ran.output)
