"""Judges clips longer than trained, for suites with ``judge = "longer"``.

No clip has a reference, so each is judged by itself: the judge's score for its prompt, motion, sharpness, how near a
later stretch comes to the opening one, and how much of a loop it is.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from dit_accel_assets import model_defaults, model_score

from .metrics.loops import loop, repetition
from .metrics.motion import motion
from .metrics.sharpness import sharpness
from .model import Run, SuiteModel
from .paired import bootstrap
from .results import Line
from .suite import Suite


def measures(model: SuiteModel, clip: int, made: Run) -> Line:
    """Return what a line says of a clip."""
    trained = int(model_defaults(model.name)["num_frames"])
    return {
        "frames": len(made.frames),
        "score": model_score(model.name, clip, made.frames),
        "motion": motion(made.frames),
        "sharpness": sharpness(made.frames),
        "repetition": repetition(made.frames, trained),
        "loop": loop(made.frames, trained),
    }


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: one row per arm, each against the plain arm of its length and steps."""
    return "\n".join(_rows(suite, lines))


def _rows(suite: Suite, lines: Sequence[Line]) -> Iterator[str]:
    yield (
        "| arm | clips | frames | score | motion x 1000 | sharpness x 1000 | repetition RMS | loop | pairs computed "
        "| against | paired difference, points of the score | of the loop |"
    )
    yield "|---" * 12 + "|"
    by_arm = {arm.name: {line["clip"]: line for line in lines if line["arm"] == arm.name} for arm in suite.arms}
    for arm in suite.arms:
        clips = by_arm[arm.name]
        if not clips:
            continue
        names = ("frames", "score", "motion", "sharpness", "repetition", "loop", "attended")
        frames, score, *rest = (float(np.mean([line[name] for line in clips.values()])) for name in names)
        plain = suite.plain(arm)
        others = by_arm[plain.name] if plain else {}
        both = sorted(set(clips) & set(others))
        paired = [100 * (clips[clip]["score"] - others[clip]["score"]) for clip in both]
        loops = [clips[clip]["loop"] - others[clip]["loop"] for clip in both]
        cells = (
            arm.name,
            len(clips),
            f"{frames:.0f}",
            f"{score:.0%}",
            f"{1000 * rest[0]:.2f}",
            f"{1000 * rest[1]:.2f}",
            f"{rest[2]:.3f}",
            f"{rest[3]:.2f}",
            f"{rest[4]:.0%}",
            plain.name if plain else "",
            bootstrap(paired) if paired else "",
            bootstrap(loops) if loops else "",
        )
        yield f"| {' | '.join(map(str, cells))} |"
