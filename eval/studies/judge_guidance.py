"""Judges guidance at equal forwards, for suites with ``judge = "../studies/judge_guidance.py"``.

Guidance changes what is sought, so no converged run is the measure: each clip is judged by itself, by how near it
comes to its prompt and by its sharpness. An arm is held, clip by clip, against the plain arm that `rival_of` names.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from dit_accel_assets import model_closeness, model_score
from dit_accel_eval.metrics.motion import sharpness
from dit_accel_eval.runs.model import ModelRun, SuiteModel
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.statistics import judge
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.suite import Suite
from judging import held_arms

EQUAL = 1.25
"""Forwards up to which plain arms count as equal: whole steps seldom give the very same number."""


def measures(model: SuiteModel, clip: int, run: ModelRun) -> Line:
    """Return what a line says of a clip."""
    return {
        "forwards": run.counts.blocks / model.family.layers,
        "score": model_score(model.name, clip, run.frames),
        "closeness": model_closeness(model.name, clip, run.frames),
        "sharpness": sharpness(run.frames),
    }


def rival_of(suite: Suite, arm: Arm, lines: Sequence[Line]) -> Arm | None:
    """Return the plain arm that an arm is held against: of those with its forwards, the one nearest its prompts.

    Those have its forwards or up to `EQUAL` times as many; where none has, the fewest beyond. Plain arms have none.
    """
    if not arm.methods:
        return None
    means = {other.name: _mean(lines, other, "forwards") or 0.0 for other in suite.arms}
    forwards = means[arm.name]
    plain = [other for other in suite.arms if not other.methods and means[other.name] >= forwards]
    most = max(EQUAL * forwards, min((means[other.name] for other in plain), default=0.0))
    plain = [other for other in plain if means[other.name] <= most]
    return max(plain, key=lambda other: _mean(lines, other, "closeness") or 0.0, default=None)


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: one row per arm."""
    heads = "arm | guidance | steps | forwards | answers right | closeness | sharpness x 1000 | against"
    return markdown_table(f"{heads} | closeness gained, points (median)", _rows(suite, lines))


def _rows(suite: Suite, lines: Sequence[Line]) -> Iterator[Sequence[object]]:
    names = ("forwards", "score", "closeness", "sharpness")
    held = list(held_arms(suite, lines, rival_of))
    judged = judge({
        arm.name: [100 * (clips[clip]["closeness"] - plain[clip]["closeness"])
                   for clip in sorted({*clips} & {*plain})]
        for arm, clips, _, plain in held
    })  # fmt: skip
    for arm, clips, rival, _ in held:
        forwards, score, close, sharp = (float(np.mean([line[name] for line in clips.values()])) for name in names)
        call = next(iter(clips.values()))["call"]
        scale = call.get("guidance_scale", call.get("true_cfg_scale", ""))
        yield (
            arm.name, scale, arm.num_inference_steps, f"{forwards:.1f}", f"{score:.0%}", f"{close:.3f}",
            f"{1000 * sharp:.2f}", rival.name if rival else "", judged[arm.name].judged() if arm.name in judged else "",
        )  # fmt: skip


def _mean(lines: Sequence[Line], arm: Arm, name: str) -> float | None:
    values = [line[name] for line in lines if line["arm"] == arm.name]
    return float(np.mean(values)) if values else None
