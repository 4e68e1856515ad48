"""Which cache comes nearest to the converged run within a budget of work, among the arms of several suites."""

from collections.abc import Iterator, Mapping, Sequence

from .comparison import ArmFigures, figures_of, verdict
from .results import Line
from .suite import Arm, Suite, dense_arm

BUDGETS = (8, 10, 12)
"""Steps' work, of the dense model's own, that a run may cost."""
SPREAD = 2
"""Steps' work by which an arm may stay below a budget to stand for it."""
SHOWN = 2
"""Caches that are shown for a budget, the nearest first."""


def table(measured: Sequence[tuple[Suite, Sequence[Line]]]) -> Iterator[str]:
    """Give the Markdown table: for each model and budget the caches whose arms came nearest to the converged run.

    Of each cache its nearest arm stands. Arms are compared on the clips that all suites of a model have.

    Args:
        measured: suites of one or several models, and what ran of each.
    """
    heads = ["model", "budget", "cache", "work", "PSNR to converged, dB", "UniPC at the budget", "at equal work, dB"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for model in dict.fromkeys(suite.model for suite, _ in measured):
        own = [(suite, lines) for suite, lines in measured if suite.model == model]
        arms = {arm.name: arm for suite, _ in own for arm in suite.arms if len(arm.methods) == 1}
        found = {arm.name: arm for arm in figures_of(_shared(own), [*arms])}
        for budget in BUDGETS:
            dense = found.get(dense_arm(budget).name)
            for arm in nearest(found, arms, budget):
                ahead = arm.ahead["work"]
                cells = [model, str(budget), arm.name, f"{arm.means['work']:.2f}", str(arm.psnr)]
                cells += [str(dense.psnr) if dense else "", f"{ahead:+} {verdict(ahead, arm.clips)}"]
                yield f"| {' | '.join(cells)} |"


def nearest(found: Mapping[str, ArmFigures], arms: Mapping[str, Arm], budget: int) -> list[ArmFigures]:
    """Return the nearest arms whose own work lies within a budget, or little below, one of each cache.

    Args:
        found: figures by arm.
        arms: those of one cache alone, by name.
        budget: in steps' work.
    """
    clips = max((arm.clips for arm in found.values()), default=0)
    within = [
        arm
        for name, arm in found.items()
        if name in arms and arm.clips == clips and "work" in arm.ahead and budget - SPREAD < arm.means["work"] <= budget
    ]
    chosen: dict[str, ArmFigures] = {}
    for arm in sorted(within, key=lambda arm: -arm.psnr.mean):
        (method,) = arms[arm.name].methods
        chosen.setdefault(f"{method.name} {method.to_dict().get('config', '')}", arm)
    return [*chosen.values()][:SHOWN]


def _shared(measured: Sequence[tuple[Suite, Sequence[Line]]]) -> list[Line]:
    """Return the lines of the clips that all suites have."""
    clips = set.intersection(*({line["clip"] for line in lines} for _, lines in measured))
    return [line for _, lines in measured for line in lines if line["clip"] in clips]
