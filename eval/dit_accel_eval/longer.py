"""Judges clips longer than trained, for suites with ``judge = "longer"``.

No clip has a reference, so each is judged by itself: the judge's score for its prompt, motion, sharpness, how near a
later stretch comes to the opening one, and how much of a loop it is.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from dit_accel_assets import longest_trained, model_closeness, model_defaults, model_path_error, model_score

from .metrics.loops import loop, repetition
from .metrics.metric import Clip
from .metrics.motion import motion
from .metrics.sharpness import sharpness
from .model import Run, SuiteModel
from .paired import bootstrap
from .results import Line
from .suite import Suite

STRETCHES = "closeness_by_stretch"
"""What a line calls how near each stretch comes to the prompt."""


def measures(model: SuiteModel, clip: int, made: Run) -> Line:
    """Return what a line says of a clip."""
    trained = int(model_defaults(model.name)["num_frames"])
    return {
        "frames": len(made.frames),
        "score": model_score(model.name, clip, made.frames),
        "path_error": model_path_error(model.name, clip, made.frames),
        STRETCHES: by_stretch(model.name, clip, made.frames),
        "motion": motion(made.frames),
        "sharpness": sharpness(made.frames),
        "repetition": repetition(made.frames, trained),
        "loop": loop(made.frames, trained),
        "loop_seconds": round(made.seconds, 2),
    }


def by_stretch(name: str, clip: int, frames: Clip) -> list[float]:
    """Return how near each stretch of a clip comes to the prompt, 0 to 1; the first and the last frames are among them.

    A stretch has the frames of the longest clips that the model was trained on.

    Args:
        name: of the embedded model.
        clip: its number.
        frames: [F, H, W, 3] in [0, 1].
    """
    long = longest_trained(name)
    starts = np.linspace(0, max(0, len(frames) - long), max(1, round(len(frames) / long))).round().astype(int)
    return [model_closeness(name, clip, frames, first=int(start), end=int(start) + long) for start in starts]


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: one row per arm, each against the plain arm of its length and steps."""
    return "\n".join(_rows(suite, lines))


def _rows(suite: Suite, lines: Sequence[Line]) -> Iterator[str]:
    yield (
        "| arm | clips | frames | score | closeness by stretch | path error, px | motion x 1000 | sharpness x 1000 | "
        "repetition RMS | loop | pairs computed | denoising, s | against | "
        "paired difference, points of the score | of the loop | of the path error |"
    )
    yield "|---" * 16 + "|"
    by_arm = {arm.name: {line["clip"]: line for line in lines if line["arm"] == arm.name} for arm in suite.arms}
    for arm in suite.arms:
        clips = by_arm[arm.name]
        if not clips:
            continue
        plain = suite.plain(arm)
        others = by_arm[plain.name] if plain else {}
        both = sorted(set(clips) & set(others))

        def mean(name: str, scale: float = 1.0, clips: dict[int, Line] = clips) -> float:
            return scale * float(np.nanmean([line.get(name, np.nan) for line in clips.values()]))

        def against(
            name: str, scale: float = 1.0, both: list[int] = both, clips: dict[int, Line] = clips,
            others: dict[int, Line] = others,
        ) -> str:  # fmt: skip
            paired = [scale * (clips[clip].get(name, np.nan) - others[clip].get(name, np.nan)) for clip in both]
            paired = [value for value in paired if np.isfinite(value)]
            if len(paired) < 2:  # one clip has no interval
                return "".join(f"{value:.2f}" for value in paired)
            return str(bootstrap(paired))

        stretches = [line[STRETCHES] for line in clips.values() if STRETCHES in line]  # runs of before don't say
        cells = (
            arm.name,
            len(clips),
            f"{mean('frames'):.0f}",
            f"{mean('score'):.0%}",
            " ".join(f"{value:.2f}" for value in np.mean(stretches, 0)) if stretches else "",
            f"{mean('path_error'):.1f}" if stretches else "",
            f"{mean('motion', 1000):.2f}",
            f"{mean('sharpness', 1000):.2f}",
            f"{mean('repetition'):.3f}",
            f"{mean('loop'):.2f}",
            f"{mean('attended'):.0%}",
            f"{mean('loop_seconds'):.1f}" if all("loop_seconds" in line for line in clips.values()) else "",
            plain.name if plain else "",
            against("score", 100),
            against("loop"),
            against("path_error"),
        )
        yield f"| {' | '.join(map(str, cells))} |"
