"""What a report says: the figures of every arm, what it warns of, and which arms miss what was asked of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..comparison import FEWEST, TIMED, WORKS, ArmFigures, figures_of, is_rival, verdict
from ..reference import AGREE
from ..results import Line
from .lines import Results

MANY = 10
"""Verdicts from which on some are to be expected by chance alone."""

LISTED = 8
"""Names that a warning lists, before it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the pages are written from.

    Attributes:
        results: the lines.
        arms: their figures: dense runs by steps, then the others as they first appear.
        settings: arm -> a line of it, which tells what ran.
        prompts: clip -> its prompt, clips in order.
        minimums: metric -> what every arm's mean must reach.
        warnings: what a reader should know before believing the figures.
    """

    results: Results
    arms: tuple[ArmFigures, ...]
    settings: Mapping[str, Line]
    prompts: Mapping[int, str]
    minimums: Mapping[str, float]
    warnings: tuple[str, ...]

    @property
    def works(self) -> dict[str, str]:
        """Key -> in words, of the kinds of work, and time where it was measured, by which arms are made equal."""
        return {key: words for key, words in (WORKS | TIMED).items() if any(key in arm.means for arm in self.arms)}

    def mean(self, arm: ArmFigures, metric: str) -> float:
        """Return an arm's mean of one of `METRICS`."""
        return arm.psnr.mean if metric == "psnr" else arm.means[metric]

    def is_dense(self, arm: ArmFigures) -> bool:
        """Whether an arm is a dense run of the best solver, which others are held against."""
        return is_rival(self.settings[arm.name])


def report_of(results: Results, minimums: Mapping[str, float]) -> Report:
    """Return the report of result lines."""
    lines = results.lines
    settings = {line["arm"]: line for line in reversed(lines)}
    listed = list(dict.fromkeys(line["arm"] for line in lines if not is_rival(line)))
    arms = tuple(figures_of(lines, listed))
    prompts = {line["clip"]: line["prompt"] for line in sorted(lines, key=lambda line: line["clip"])}
    warnings = tuple(_warnings(results, arms, prompts))
    return Report(results=results, arms=arms, settings=settings, prompts=prompts, minimums=minimums, warnings=warnings)


def judged(report: Report) -> list[ArmFigures]:
    """Return the arms of which something is asked: all but the dense runs, or those if there are no others."""
    return [arm for arm in report.arms if not report.is_dense(arm)] or list(report.arms)


def misses(report: Report) -> list[str]:
    """Return a sentence for every arm and metric that is under what was asked."""
    found = []
    for metric, least in report.minimums.items():
        for arm in judged(report):
            mean = report.mean(arm, metric)
            if mean < least:
                found.append(f"{arm.name} has a mean {metric} of {mean:.4g}, asked were {least:g}")
    return found


def quantile_clips(lines: Sequence[Line]) -> tuple[Line, Line]:
    """Return an arm's worst line by PSNR, and its median one."""
    ranked = sorted(lines, key=lambda line: line["psnr"])
    return ranked[0], ranked[len(ranked) // 2]


def _warnings(results: Results, arms: Sequence[ArmFigures], prompts: Mapping[int, str]) -> Iterator[str]:
    lines = results.lines
    if results.cut:
        yield "The last line of the results was cut off and is left out; the run may have been stopped."
    listed = {line["arm"] for line in lines if not is_rival(line)}
    lacking = [f"{arm.name} ({arm.clips} of {len(prompts)})" for arm in arms
               if arm.name in listed and arm.clips < len(prompts)]  # fmt: skip
    if lacking:
        yield f"Clips are missing, so means are not over the same prompts: {_some(lacking)}."
    apart = {line["clip"]: line for line in lines if line["reference_agreement"] < AGREE}
    if apart:
        told = [f"clip {clip} ({line['reference_steps']} steps, {line['reference_agreement']:.1f} dB)"
                for clip, line in sorted(apart.items())]  # fmt: skip
        yield f"References that did not converge to {AGREE:g} dB, and blur what is held against them: {_some(told)}."
    if len(prompts) < FEWEST:
        yield f"With {len(prompts)} clips there is no verdict; it takes {FEWEST}."
    keys = [key for key in (*WORKS, *TIMED) if any(key in arm.ahead for arm in arms)]
    for key in keys:
        held = [arm for arm in arms if key in arm.ahead and arm.clips >= FEWEST]
        open_ = [arm.name for arm in held if verdict(arm.ahead[key], arm.clips) == "open"]
        words = (WORKS | TIMED)[key]
        if open_:
            yield f"Intervals that include zero at equal {words}, so neither better nor worse than fewer steps: " \
                  f"{_some(open_)}."  # fmt: skip
    verdicts = sum(arm.clips >= FEWEST for arm in arms if arm.ahead)
    if verdicts >= MANY:
        yield f"{verdicts} arms are judged at 95 % each; about {verdicts * 0.05:.0f} of such verdicts come by chance."
    for key in ("torch", "diffusers", "dit_accel"):
        versions = sorted({str(line[key]) for line in lines if key in line})
        if len(versions) > 1:
            yield f"The runs are of several versions of {key}: {', '.join(versions)}."


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def worst_first(report: Report) -> list[int]:
    """Return the clips, those first at which the arms' mean PSNR is lowest."""
    names = {arm.name for arm in judged(report)}
    means = {
        clip: float(np.mean([line["psnr"] for line in report.results.lines
                             if line["clip"] == clip and line["arm"] in names] or [np.inf]))
        for clip in report.prompts
    }  # fmt: skip
    return sorted(means, key=lambda clip: means[clip])
