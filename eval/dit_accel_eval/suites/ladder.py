"""The ladder of rivals: at each number of steps the dense run that came nearest on clips kept for choosing.

A suite is held against fewer steps of one solver at the model's own noise shift unless it names such a file, with
``rivals = "../results/rivals-wan-tiny.toml"``. `eval/studies/best_rival.py` makes them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.solvers import check_solver

from dit_accel import ConfigError

from ..runs.results import TUNED
from .arms import Arm, check_kinds, read_table

VERSION = 1

KINDS = {
    "model": str, "first_clip": int, "clips": int, "reference_steps": int, "call": dict, "rung": list,
    "confirmed_on": list,
}  # fmt: skip
"""Key of a file -> what it must be."""

RUNG_KINDS = {
    "num_inference_steps": int, "solver": str, "flow_shift": (int, float), "psnr": float, "tried": dict,
    "confirming": dict,
}  # fmt: skip
"""Key of a rung -> what it must be."""

LOOSE = 0.5  # decibels below the best of those that ran on the confirming clips, beyond which a rung is not confirmed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """The best dense run of so many steps."""

    num_inference_steps: int
    solver: str
    psnr: float
    flow_shift: float | None = None
    tried: Mapping[str, float] = field(default_factory=dict)  # solver and shift in words -> the mean PSNR of each run
    confirming: Mapping[str, float] = field(
        default_factory=dict
    )  # of the best of these, over clips that did not choose

    @property
    def best_elsewhere(self) -> tuple[str, float] | None:
        """What came nearest on the confirming clips, and its mean PSNR there; None: nothing ran there."""
        return max(self.confirming.items(), key=lambda item: item[1]) if self.confirming else None

    @property
    def confirmed(self) -> bool:
        """Whether prompts that did not choose the rung find none that is better by more than `LOOSE`."""
        psnr, best = self.confirming.get(setting_words(self.solver, self.flow_shift)), self.best_elsewhere
        return psnr is not None and best is not None and psnr >= best[1] - LOOSE

    def __str__(self) -> str:
        return f"{self.num_inference_steps} {setting_words(self.solver, self.flow_shift)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """What the arms of a suite are held against: rungs by steps, chosen on so many held-out clips of a model."""

    model: str
    first_clip: int
    clips: int
    rungs: tuple[Rung, ...]
    reference_steps: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    confirmed_on: tuple[int, ...] = ()

    @property
    def loose(self) -> str:
        """Which rungs other prompts do not confirm, in a sentence; "" where they confirm all."""
        steps = [str(rung.num_inference_steps) for rung in self.rungs if not rung.confirmed]
        return f"Not confirmed on prompts that did not choose: the rungs of {', '.join(steps)} steps." if steps else ""

    def arm(self, steps: int) -> Arm:
        """Return the dense run of so many steps, by the rung of the nearest number of them, of two alike the lower."""
        rung = min(self.rungs, key=lambda rung: abs(math.log(rung.num_inference_steps / steps)))
        return Arm(name=f"{TUNED} {steps}", num_inference_steps=steps, solver=rung.solver, flow_shift=rung.flow_shift)

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.rungs))}, chosen on clips {clip_words(self.first_clip, self.clips)}"


def setting_words(solver: str, flow_shift: float | None) -> str:
    """Return a solver and a noise shift in words, None: the model's own."""
    return solver if flow_shift is None else f"{solver} shift {flow_shift:g}"


def clip_words(first: int, count: int) -> str:
    """Return a range of clips in words."""
    return str(first) if count == 1 else f"{first} to {first + count - 1}"


def read_ladder(path: Path) -> Ladder:
    """Read a ladder of rivals."""
    remedy = "no rivals at {}; make them with python eval/studies/best_rival.py, or leave rivals out"
    data = read_table(path, VERSION, KINDS, remedy)
    missing = [key for key in ("model", "first_clip", "clips", "rung") if data.get(key) in (None, [])]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; make it anew with best_rival.py")
    for rung in data["rung"]:
        check_kinds(rung, RUNG_KINDS, str(path))
        if not {"num_inference_steps", "solver", "psnr"} <= {*rung} or rung["num_inference_steps"] < 1:
            raise ConfigError(f"{path} has a rung {dict(rung)}, which needs steps from 1, solver and psnr; correct it")
        try:
            check_solver(rung["solver"])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    rungs = tuple(Rung(**rung) for rung in data.pop("rung"))
    return Ladder(**{**data, "confirmed_on": tuple(data.get("confirmed_on", ()))}, rungs=rungs)
