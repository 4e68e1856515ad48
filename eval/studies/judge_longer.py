"""Judges clips longer than trained, for suites with ``judge = "../studies/judge_longer.py"``.

No clip has a reference, so each is judged by itself: the judge's score for its prompt, motion, sharpness, how near a
later stretch comes to the opening one, and how much of a loop it is.
"""

from collections.abc import Sequence

import numpy as np
from dit_accel_assets import longest_trained, model_closeness, model_defaults, model_path_error, model_score
from dit_accel_eval.metrics.metric import Clip
from dit_accel_eval.metrics.motion import STRETCH, loop_rise, mean_motion, sharpness
from dit_accel_eval.runs.model import ModelRun, SuiteModel
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.suites.suite import Suite
from judging import held_arms, paired_cell

STRETCHES = "closeness_by_stretch"
"""What a line calls how near each stretch comes to the prompt."""


def repetition(video: Clip, trained: int) -> float:
    """Return the least RMS difference between the opening frames and a later stretch as long; small: it repeats.

    After RIFLEx' NoRepeat (arXiv 2502.15894), without a theoretical period; a clip that stands still repeats.
    """
    starts = range(min(trained // 2, len(video) - STRETCH), len(video) - STRETCH + 1)
    differences = [np.sqrt(np.mean((video[:STRETCH] - video[start : start + STRETCH]) ** 2)) for start in starts]
    return float(min(differences))


def measures(model: SuiteModel, clip: int, run: ModelRun) -> Line:
    """Return what a line says of a clip."""
    trained = int(model_defaults(model.name)["num_frames"])
    subject = model.name, clip, run.frames
    return {
        "frames": len(run.frames), "score": model_score(*subject), "path_error": model_path_error(*subject),
        STRETCHES: by_stretch(*subject), "motion": mean_motion(run.frames), "sharpness": sharpness(run.frames),
        "repetition": repetition(run.frames, trained), "loop": loop_rise(run.frames, trained),
        "loop_seconds": round(run.seconds, 2),
    }  # fmt: skip


def by_stretch(name: str, clip: int, frames: Clip) -> list[float]:
    """Return how near each stretch of a clip, as long as the longest trained ones, comes to the prompt, from 0 to 1."""
    long = longest_trained(name)
    starts = np.linspace(0, max(0, len(frames) - long), max(1, round(len(frames) / long))).round().astype(int)
    return [model_closeness(name, clip, frames, first=int(start), end=int(start) + long) for start in starts]


MEANS: dict[str, tuple[str, float, str]] = {
    "frames": ("frames", 1, ".0f"), "score": ("score", 1, ".0%"), "closeness by stretch": (STRETCHES, 1, ""),
    "path error, px": ("path_error", 1, ".1f"), "motion x 1000": ("motion", 1000, ".2f"),
    "sharpness x 1000": ("sharpness", 1000, ".2f"), "repetition RMS": ("repetition", 1, ".3f"),
    "loop": ("loop", 1, ".2f"), "pairs computed": ("attended", 1, ".0%"), "denoising, s": ("loop_seconds", 1, ".1f"),
}  # fmt: skip
"""Head of the first table -> the measure of which it shows the mean, times what, and how."""

PAIRED: dict[str, tuple[str, float]] = {
    "paired difference of the score, points": ("score", 100), "of the loop": ("loop", 1),
    "of the path error, px": ("path_error", 1), "of the motion x 1000": ("motion", 1000),
    "of the sharpness x 1000": ("sharpness", 1000), "of the repetition RMS x 1000": ("repetition", 1000),
}  # fmt: skip
"""Head of the second table -> the measure of which it shows the difference to the plain arm, times what."""


def _mean(lines: Sequence[Line], name: str, scale: float, spec: str) -> str:
    """Return a cell of the mean over clips that have a value, and how many those are where some have none."""
    if name == STRETCHES:
        return " ".join(f"{value:.2f}" for value in np.mean([line[STRETCHES] for line in lines], 0))
    values = np.array([line[name] for line in lines], dtype=float)
    count = int(np.isfinite(values).sum())
    few = f" ({count})" if count < len(values) else ""
    return f"{scale * float(np.nanmean(values)):{spec}}{few}" if count else ""


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's two Markdown tables: a row per arm, and each against the plain arm of its length and steps."""
    rows, against = [], []
    for arm, clips, plain, rivals in held_arms(suite, lines):
        rows.append((arm.name, len(clips), *(_mean([*clips.values()], *column) for column in MEANS.values())))
        if plain is not None:
            cells = (paired_cell(clips, rivals, name, scale=scale) for name, scale in PAIRED.values())
            times = paired_cell(clips, rivals, "loop_seconds", ratio=True)
            against.append((arm.name, plain.name, *cells, times))
    first = markdown_table(" | ".join(["arm", "clips", *MEANS]), rows)
    second = markdown_table(" | ".join(["arm", "against", *PAIRED, "times its denoising"]), against)
    return f"{first}\n\n{second}"
