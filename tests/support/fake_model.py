"""Models for suites that take no time: one whose error is known by its steps, solver and methods, one that draws."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from dit_accel_assets.clips import clip_of, draw_plain
from dit_accel_eval.report.lines import read_results
from dit_accel_eval.report.report import SuiteReport, suite_report
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.model import ModelRun
from dit_accel_eval.suites import running
from typer.testing import CliRunner, Result

from dit_accel.cli.app import app

HEAD = 'version = 2\nname = "s"\nmodel = "wan-plain"\nclips = 1\n'
ARM = '[[arm]]\nname = "a"\nsolver = "euler"\nnum_inference_steps = 2\n'
LADDER = (
    'version = 1\nmodel = "wan-plain"\nfirst_clip = 0\nclips = 4\n'
    '[[rung]]\nnum_inference_steps = 3\nsolver = "dpm++"\nflow_shift = 8.0\npsnr = 20.0\n'
    '[[rung]]\nnum_inference_steps = 7\nsolver = "unipc"\npsnr = 30.0\n'
)
THIN = '[[arm]]\nname = "thin"\nnum_inference_steps = 10\nsol = {}\n'


EARLIER = Path(__file__).parents[1] / "eval" / "results" / "report-wan-tiny.jsonl"
"""An earlier report of wan-tiny, on eight clips, which stays as it is when the committed one is measured again."""


class FakeModel:
    """Stands in for an embedded model: dense runs of n steps are 1 / n^2 off, by Euler twice, with methods half that.

    Methods halve the work of attention, and take three quarters of the time; ``made`` notes each run.
    """

    name, own_share, weights, dtype = "wan-plain", 0.5, "w", None
    call: ClassVar = {"num_frames": 3}
    device = torch.device("cpu")
    shipped = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made: ClassVar[list] = []

    def __init__(self, name: str = "", call: Any = None) -> None:
        pass

    def prompt(self, clip: int) -> str:
        return f"prompt {clip}"

    def seed(self, clip: int) -> int:
        return clip

    def error(self, clip: int, steps: int, solver: str, flow_shift: Any, methods: Any) -> float:
        return (2.0 if solver == "euler" else 1.0) / steps**2 / (2 if methods else 1)

    def cost(self, steps: int, methods: Any) -> dict[str, Any]:
        counts = Counts(blocks=12 * steps, attention=12 * steps)
        return {"counts": counts, "attended": 0.5 if methods else 1.0, "seconds": steps * (0.75 if methods else 1.0)}

    def run(self, clip, *, steps, solver, flow_shift=None, methods=(), call=None) -> ModelRun:
        self.made.append((clip, steps, solver, tuple(method.name for method in methods)))
        base = np.random.default_rng(clip).random((3, 16, 16, 3), dtype=np.float32) / 2
        frames = np.clip(base + self.error(clip, steps, solver, flow_shift, methods), 0, 1)
        return ModelRun(frames=frames.astype(np.float32), **self.cost(steps, methods))


def drawn(seed: int = 3, frames: int = 9) -> np.ndarray:
    """Return a drawn held-out clip of wan-plain's world, uint8; of any number of frames."""
    _, scene, _ = clip_of(seed, frames=1, held_out=True)
    return draw_plain(scene, 4 * -(-frames // 4) + 1)[:frames]


class DrawnModel(FakeModel):
    """The base of one that tells its ``name`` and how it draws; ``made`` are (clip, call, number of methods)."""

    def draw(self, clip: int, call: dict[str, Any], plain: bool) -> np.ndarray:
        raise NotImplementedError

    def run(self, clip: int, *, steps: int, solver: Any, flow_shift: Any, methods: Any, call: Any) -> ModelRun:
        assert steps == 2
        self.made.append((clip, call, len(methods)))
        frames = self.draw(clip, call, not methods)
        return ModelRun(frames=frames, counts=Counts(blocks=1, attention=1), attended=1.0, seconds=1.0)


def faked(monkeypatch: pytest.MonkeyPatch, model: type = FakeModel) -> Iterator[type]:
    """Let suites of embedded models run on a fake, as a fixture does."""
    monkeypatch.setattr(running, "EmbeddedModel", model)
    monkeypatch.setattr(model, "made", [])
    running._loaded.cache_clear()
    yield model
    running._loaded.cache_clear()


def command(*arguments: Any) -> Result:
    """Return what `dit-accel eval` says to arguments."""
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def told(result: Result) -> str:
    """Return what a command wrote to stderr, on one line."""
    return " ".join(result.stderr.split())


def refuses(message: str, *arguments: Any) -> None:
    """Check that `dit-accel eval` ends with exit code 2 and says why."""
    result = command(*arguments)
    assert (result.exit_code, message in told(result)) == (2, True), (arguments, result.output)


def written(path: Any, lines: Any) -> Any:
    """Write JSON lines, and return their path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def report_of(path: Path) -> SuiteReport:
    """Return the report of a file of results."""
    return suite_report(read_results(path))
