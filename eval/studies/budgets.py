"""Which caches lead furthest over fewer steps within a budget of work, among the arms of several suites."""

from collections.abc import Mapping, Sequence

from dit_accel_eval.runs.results import markdown_table
from dit_accel_eval.statistics import FEWEST
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.figures import ArmFigures, figures_of
from dit_accel_eval.suites.lines import ResultLine
from dit_accel_eval.suites.suite import Suite

BUDGETS = (8, 10, 12, 16)
"""Steps' work, of the dense model's own, that a run may cost."""
SPREAD = 2
"""Steps' work by which an arm may stay below a budget to stand for it."""
SHOWN = 2
"""Caches that are shown for a budget, the furthest ahead first."""


def table(measured: Sequence[tuple[Suite, Sequence[ResultLine]]]) -> str:
    """Return the Markdown table: for each model and budget the caches that lead furthest over UniPC of equal work.

    Of each cache the arm with the largest lead stands. Leads are paired, clip by clip, so that arms of more and of
    fewer clips can stand beside each other.

    Args:
        measured: suites of one or several models, and what ran of each.
    """
    heads, rows = "model | budget | cache | clips | own work | PSNR to converged, dB (median)", []
    for model in dict.fromkeys(suite.model for suite, _ in measured):
        own = [(suite, lines) for suite, lines in measured if suite.model == model]
        arms = {arm.name: arm for suite, _ in own for arm in suite.arms if len(arm.methods) == 1}
        found = figures_of([line for _, lines in own for line in lines], [*arms])
        for budget in BUDGETS:
            for arm in leading(found, arms, budget):
                ahead = arm.ahead["work"]
                cells = (model, budget, arm.name, arm.clips, f"{arm.means['work']:.2f}", arm.psnr.cell())
                rows.append((*cells, ahead.judged()))
    return markdown_table(f"{heads} | against UniPC at equal work, dB (median)", rows)


def leading(found: Sequence[ArmFigures], arms: Mapping[str, Arm], budget: int) -> list[ArmFigures]:
    """Return the arms of the largest leads whose own work lies within a budget, or little below, one of each cache.

    Args:
        found: figures; those of too few clips for a verdict are left out.
        arms: those of one cache alone, by name.
        budget: in steps' work.
    """
    within = [
        arm
        for arm in found
        if arm.name in arms and arm.clips >= FEWEST and "work" in arm.ahead
        and budget - SPREAD < arm.means["work"] <= budget
    ]  # fmt: skip
    chosen: dict[str, ArmFigures] = {}
    for arm in sorted(within, key=lambda arm: -arm.ahead["work"].mean):
        (method,) = arms[arm.name].methods
        chosen.setdefault(f"{method.name} {method.to_dict().get('config', '')}", arm)
    return [*chosen.values()][:SHOWN]
