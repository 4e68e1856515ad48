"""Stands in for an embedded model where a suite is run: it draws what was asked for, and notes what that was."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_assets.clips import clip_of, draw_plain
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.model import ModelRun
from fake_model import FakeModel, command, faked

STUDIES = Path(__file__).parents[2] / "eval" / "studies"
"""Where this repository's judges of suites lie, ``judge_NAME.py``."""
standing_in = faked
run_suite = partial(command, "run")


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
