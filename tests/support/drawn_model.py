"""Stands in for an embedded model where a suite is run: it draws what was asked for, and notes what that was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dit_accel_assets.clips import clip_of, draw_plain
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.model import ModelRun
from dit_accel_eval.suites import running
from typer.testing import CliRunner, Result

from dit_accel.cli.app import app

STUDIES = Path(__file__).parents[2] / "eval" / "studies"
"""Where this repository's judges of suites lie, ``judge_NAME.py``."""


def drawn(seed: int = 3, frames: int = 9) -> np.ndarray:
    """Return a drawn held-out clip of wan-plain's world, uint8; of any number of frames."""
    _, scene, _ = clip_of(seed, frames=1, held_out=True)
    return draw_plain(scene, 4 * -(-frames // 4) + 1)[:frames]


class DrawnModel:
    """The base of one that tells its ``name`` and how it draws; ``made`` are (clip, call, number of methods)."""

    name: str
    made: list[tuple[int, dict[str, Any], int]]

    def __init__(self, name: str, call: Any) -> None:
        pass

    def prompt(self, clip: int) -> str:
        return f"prompt {clip}"

    def seed(self, clip: int) -> int:
        return clip

    def draw(self, clip: int, call: dict[str, Any], plain: bool) -> np.ndarray:
        raise NotImplementedError

    def run(self, clip: int, *, steps: int, solver: Any, flow_shift: Any, methods: Any, call: Any) -> ModelRun:
        assert steps == 2
        self.made.append((clip, call, len(methods)))
        frames = self.draw(clip, call, not methods)
        return ModelRun(frames=frames, counts=Counts(blocks=1, attention=1), attended=1.0, seconds=1.0)


def standing_in(monkeypatch: pytest.MonkeyPatch, model: type[DrawnModel]) -> Iterator[None]:
    """Have suites run on it, as a fixture does."""
    monkeypatch.setattr(running, "EmbeddedModel", model)
    monkeypatch.setattr(model, "made", [], raising=False)
    running._loaded.cache_clear()
    yield
    running._loaded.cache_clear()


def run_suite(*arguments: Any) -> Result:
    """`dit-accel eval run` with some arguments."""
    return CliRunner().invoke(app, ["eval", "run", *map(str, arguments)])
