"""A model for suites that takes no time: its error is known by its steps, solver and methods."""

from typing import ClassVar

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.model import Run


class FakeModel:
    """Stands in for an embedded model: its dense runs of n steps are 100 / n grey levels off, methods half of that."""

    name, own_share, weights, dtype = "wan-plain", 0.5, "w", None
    call: ClassVar = {"num_frames": 3}
    shipped = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made: ClassVar[list] = []

    def __init__(self, name, call):
        pass

    def prompt(self, clip):
        return f"prompt {clip}"

    def seed(self, clip):
        return clip

    def run(self, clip, *, steps, solver, flow_shift=None, methods=()):
        self.made.append((clip, steps, solver, len(methods)))
        base = np.random.default_rng(clip).random((3, 16, 16, 3), dtype=np.float32) / 2
        error = (2.0 if solver == "euler" else 1.0) / steps**2 / (2 if methods else 1)
        frames = np.clip(base + error, 0, 1)
        return Run(frames=frames, counts=Counts(blocks=12 * steps, attention=12 * steps),
                   attended=0.5 if methods else 1.0, seconds=steps * (0.75 if methods else 1.0))  # fmt: skip
