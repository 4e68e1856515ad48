"""Judges pictures larger than trained, for suites with ``judge = "../studies/judge_larger.py"``.

No picture has a reference, so each is judged by itself: objects too many or missing, the judge's score for its prompt
(whether the ground's texture is the requested one by itself), how much of it comes again at a distance, and sharpness.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from dit_accel_assets import model_defaults
from dit_accel_assets.judge import judge_clips
from dit_accel_assets.world import scene_of
from dit_accel_eval.metrics.metric import Clip
from dit_accel_eval.metrics.sharpness import sharpness
from dit_accel_eval.runs.model import ModelRun, SuiteModel
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.suites.suite import Suite
from judging import held_arms, paired_cell

NAMES = ("objects_wrong", "score", "ground_texture", "repetition", "sharpness")


def measures(model: SuiteModel, clip: int, made: ModelRun) -> Line:
    """Return what a line says of a picture."""
    return judged(made.frames, clip, int(model_defaults(model.name)["height"]))


def judged(picture: Clip, number: int, trained: int) -> dict[str, float]:
    """Return what is measured of a picture [1, height, width, 3] in [0, 1] for a held-out prompt's number."""
    scene = scene_of(0, number, height=96, width=96, held_out=True, still=True)
    verdict = judge_clips(picture, scene)
    return {
        "objects_wrong": float(verdict.answers["count"].value),
        "score": verdict.score,
        "ground_texture": float(verdict.answers["ground_texture"].passed),
        "repetition": repetition(picture[0], trained),
        "sharpness": sharpness(picture),
    }


def repetition(picture: np.ndarray, trained: int) -> float:
    """Return the highest correlation of a picture [height, width, 3] with itself, half the trained side and more apart.

    Of what differs from its mean colour, over at least half of each side; along rows, columns, and both alike.
    """
    away = picture.astype(np.float64) - picture.mean((0, 1))
    height, width, _ = away.shape
    best = 0.0
    most = {"down": height - height // 2, "right": width - width // 2}
    for step in range(trained // 2, max(most.values()) + 1):
        for down, right in ((step, 0), (0, step), (step, step)):
            if down > most["down"] or right > most["right"]:
                continue
            one, other = away[: height - down, : width - right], away[down:, right:]
            size = np.sqrt((one**2).sum() * (other**2).sum())
            best = max(best, float((one * other).sum() / size) if size > 0 else 1.0)
    return best


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: one row per arm, each against the plain arm of its size and steps."""
    heads = (
        "arm | pictures | objects too many or few | score | ground texture right | repetition | sharpness x 1000 "
        "| against | paired difference of the objects | of the score, points | of the ground texture, points "
        "| of the repetition | of the sharpness x 1000"
    )
    return markdown_table(heads, _rows(suite, lines))


def _rows(suite: Suite, lines: Sequence[Line]) -> Iterator[Sequence[object]]:
    scales = (1, 100, 100, 1, 1000)
    for arm, clips, plain, others in held_arms(suite, lines):
        wrong, score, ground, again, sharp = (float(np.mean([x[name] for x in clips.values()])) for name in NAMES)
        paired = [paired_cell(clips, others, name, scale=scale) for name, scale in zip(NAMES, scales, strict=True)]
        yield (
            arm.name, len(clips), f"{wrong:.2f}", f"{score:.0%}", f"{ground:.0%}", f"{again:.3f}",
            f"{1000 * sharp:.2f}", plain.name if plain else "", *paired,
        )  # fmt: skip
