"""Judges clips longer than trained, for suites with ``judge = "../studies/judge_longer.py"``.

No clip has a reference, so each is judged by itself: the judge's score for its prompt, motion, sharpness, how near a
later stretch comes to the opening one, and how much of a loop it is.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from dit_accel_assets import longest_trained, model_closeness, model_defaults, model_path_error, model_score
from dit_accel_eval.metrics.loops import STRETCH, loop_rise
from dit_accel_eval.metrics.metric import Clip
from dit_accel_eval.metrics.motion import mean_motion
from dit_accel_eval.metrics.sharpness import sharpness
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


def measures(model: SuiteModel, clip: int, made: ModelRun) -> Line:
    """Return what a line says of a clip."""
    trained = int(model_defaults(model.name)["num_frames"])
    return {
        "frames": len(made.frames),
        "score": model_score(model.name, clip, made.frames),
        "path_error": model_path_error(model.name, clip, made.frames),
        STRETCHES: by_stretch(model.name, clip, made.frames),
        "motion": mean_motion(made.frames),
        "sharpness": sharpness(made.frames),
        "repetition": repetition(made.frames, trained),
        "loop": loop_rise(made.frames, trained),
        "loop_seconds": round(made.seconds, 2),
    }


def by_stretch(name: str, clip: int, frames: Clip) -> list[float]:
    """Return how near each stretch of a clip, as long as the longest trained ones, comes to the prompt, from 0 to 1."""
    long = longest_trained(name)
    starts = np.linspace(0, max(0, len(frames) - long), max(1, round(len(frames) / long))).round().astype(int)
    return [model_closeness(name, clip, frames, first=int(start), end=int(start) + long) for start in starts]


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's two Markdown tables: a row per arm, and each against the plain arm of its length and steps."""
    heads = (
        "arm | clips | frames | score | closeness by stretch | path error, px | motion x 1000 | sharpness x 1000 | "
        "repetition RMS | loop | pairs computed | denoising, s"
    )
    rows = ((arm.name, *_cells([*clips.values()])) for arm, clips, _, _ in held_arms(suite, lines))
    against = (
        "arm | against | paired difference of the score, points | of the loop | of the path error, px | "
        "of the motion x 1000 | of the sharpness x 1000 | of the repetition RMS x 1000 | times its denoising"
    )
    return f"{markdown_table(heads, rows)}\n\n{markdown_table(against, _differences(suite, lines))}"


def _cells(lines: list[Line]) -> tuple[str, ...]:

    def mean(name: str, scale: float = 1.0) -> float:
        return scale * float(np.nanmean([line[name] for line in lines]))

    text = sum(np.isfinite(line["path_error"]) for line in lines)
    path = f"{mean('path_error'):.1f}" if text else ""
    return (
        f"{len(lines)}",
        f"{mean('frames'):.0f}",
        f"{mean('score'):.0%}",
        " ".join(f"{value:.2f}" for value in np.mean([line[STRETCHES] for line in lines], 0)),
        path + (f" ({text})" if 0 < text < len(lines) else ""),
        f"{mean('motion', 1000):.2f}",
        f"{mean('sharpness', 1000):.2f}",
        f"{mean('repetition'):.3f}",
        f"{mean('loop'):.2f}",
        f"{mean('attended'):.0%}",
        f"{mean('loop_seconds'):.1f}",
    )


def _differences(suite: Suite, lines: Sequence[Line]) -> Iterator[Sequence[object]]:
    for arm, own, plain, others in held_arms(suite, lines):
        if plain is None:
            continue
        cell = functools.partial(paired_cell, own, others)
        yield (
            arm.name, plain.name, cell("score", scale=100), cell("loop"), cell("path_error"),
            cell("motion", scale=1000), cell("sharpness", scale=1000), cell("repetition", scale=1000),
            cell("loop_seconds", ratio=True),
        )  # fmt: skip
