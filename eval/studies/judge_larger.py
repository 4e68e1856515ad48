"""Judges pictures larger than trained, for suites with ``judge = "../studies/judge_larger.py"``.

No picture has a reference, so each is judged by itself: objects too many or missing, the judge's score for its prompt
(whether the ground's texture is the requested one by itself), how much of it comes again at a distance, and sharpness.
"""

from collections.abc import Sequence

import numpy as np
from dit_accel_assets import model_defaults
from dit_accel_assets.judge import judge_clips
from dit_accel_assets.world import scene_of
from dit_accel_eval.metrics.metric import Clip
from dit_accel_eval.metrics.motion import sharpness
from dit_accel_eval.runs.model import ModelRun, SuiteModel
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.suites.suite import Suite
from judging import held_arms, paired_cell


def measures(model: SuiteModel, clip: int, run: ModelRun) -> Line:
    """Return what a line says of a picture."""
    return judged(run.frames, clip, int(model_defaults(model.name)["height"]))


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
            first, second = away[: height - down, : width - right], away[down:, right:]
            size = np.sqrt((first**2).sum() * (second**2).sum())
            best = max(best, float((first * second).sum() / size) if size > 0 else 1.0)
    return best


SHOWN: dict[str, tuple[str, float, str, str]] = {
    "objects_wrong": ("objects too many or few", 1, ".2f", "paired difference of the objects"),
    "score": ("score", 100, ".0%", "of the score, points"),
    "ground_texture": ("ground texture right", 100, ".0%", "of the ground texture, points"),
    "repetition": ("repetition", 1, ".3f", "of the repetition"),
    "sharpness": ("sharpness x 1000", 1000, ".2f", "of the sharpness x 1000"),
}
"""Measure -> its head, times what its difference is given, how its mean is, and the difference's head."""


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: one row per arm, each against the plain arm of its size and steps."""
    rows, (heads, _, _, paired) = [], zip(*SHOWN.values(), strict=True)
    for arm, clips, plain, rivals in held_arms(suite, lines):
        row = [arm.name, len(clips)]
        for name, (head, scale, spec, _) in SHOWN.items():
            mean = float(np.mean([line[name] for line in clips.values()]))
            row.append(f"{mean * (scale if 'x 1000' in head else 1):{spec}}")
        cells = (paired_cell(clips, rivals, name, scale=form[1]) for name, form in SHOWN.items())
        rows.append((*row, plain.name if plain else "", *cells))
    return markdown_table(" | ".join(["arm", "pictures", *heads, "against", *paired]), rows)
