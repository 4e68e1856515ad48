"""What a run would only fail at when it is over is looked at before its model is loaded: one sentence, and no file."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import dit_accel_pipelines.generation.generate as generation
import pytest
from dit_accel_eval.suites import running
from dit_accel_pipelines.generation import side_by_side, ui
from dit_accel_pipelines.generation.media import SUFFIXES, expected_size, write_media
from skimage import data
from typer.testing import CliRunner

from dit_accel import files
from dit_accel.attachment import check
from dit_accel.cli.app import app

PROMPT = "a red circle"
MP4 = ["generate", PROMPT, "-o", "a.mp4"]
PAGE = ["eval", "compare", "--easycache", "--prompt", PROMPT, "-o", "a.html"]
SUITE = """
version = 2
name = "s"
model = "wan-plain"
clips = 1

[[arm]]
name = "a"
solver = "euler"
num_inference_steps = 2
"""

Break = Callable[[pytest.MonkeyPatch, Path], object]


class ReachedError(Exception):
    """The model would have been loaded."""


def no_encoder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent")


def encoder(script: str, mode: int = 0o755) -> Break:
    def lay(patch: pytest.MonkeyPatch, folder: Path) -> None:
        path = folder.parent / "ffmpeg"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(mode)
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return lay


def little_room(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50_000))


def peft(found: str) -> Break:
    return lambda patch, folder: patch.setattr(importlib.metadata, "version", lambda name: found)


def no_drawing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(check, "drawing", lambda name: None)


FAULTS: dict[str, tuple[list[str], Break, str]] = {
    "no encoder": (MP4, no_encoder, "a.mp4 needs ffmpeg with libx264 (/nonexistent: No such file or directory); pi"),
    "an encoder that may not run": (MP4, encoder("exit 0", 0o644), "/ffmpeg: Permission denied); pip install imageio"),
    "an encoder without H.264": (
        MP4, encoder("echo \"Unknown encoder 'libx264'\" >&2; exit 1"), "1 and wrote no video: Unknown encoder 'libx2"
    ),
    "a page's encoder": (PAGE, no_encoder, "the page's clips need ffmpeg with libx264"),
    "the ui's encoder": (["ui"], no_encoder, "the page needs ffmpeg with libx264"),
    "the ui's drawing": (["ui"], no_drawing, "check needs a package that compares clips"),
    "a full disk": (MP4, little_room, "the output takes about 86.4 kB, and "),
    "a disk too small for all prompts": (
        ["generate", "--prompt-file", "p.txt", "-o", "a.gif"], little_room, "5 outputs take about 676 kB, and "
    ),
    "no room for results": (
        ["eval", "run", "s.toml", "--out", "s.jsonl"], little_room, "a dense run, which is kept in 16 bits, takes about"
    ),
    "no room for frames": (PAGE, little_room, "the frames of 1 run take about 139 kB, and "),
    "the ui's room": (["ui"], little_room, "the clips of a run take about "),
    "an old peft": ([*MP4, "--lora", "a.safetensors"], peft("0.16.2"), "a LoRA needs peft 0.17 or newer, found 0.16.2"),
    "a kernel backend": ([*MP4, "--radial", "--backend", "fa4"], lambda *_: None, "kernel backend 'fa4' needs "),
    "a method": ([*MP4, "--model", "flux-tiny", "--radial"], lambda *_: None, "radial makes no sense on flux"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_end_a_run_is_told_before_a_model_is_loaded(tmp_path: Path, monkeypatch, fault: str):
    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, text in (("p.txt", f"{PROMPT}\n" * 5), ("s.toml", SUITE), ("a.safetensors", "")):
        (here / name).write_text(text)
    for module, name in ((generation, "load_pipeline"), (side_by_side, "load_pipeline"), (running, "_loaded")):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(ui, "_require_gradio", lambda: None)
    arguments, break_it, message = FAULTS[fault]
    before = sorted(here.iterdir())
    break_it(monkeypatch, here)
    found = CliRunner().invoke(app, arguments)
    assert message in " ".join(found.stderr.split())
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1].startswith("error: ")
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_photographs_take_about_the_room_that_is_asked_for(tmp_path: Path, suffix: str):
    path, clip = tmp_path / f"a{suffix}", data.chelsea()[None, :224, :224]
    write_media(path, clip, fps=8)
    least = expected_size(path, frames=1, height=224, width=224)
    assert 0.5 * least < path.stat().st_size < 1.2 * least
