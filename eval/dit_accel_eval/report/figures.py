"""What a report says: the figures of every arm, what it warns of, and which arms miss what was asked of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_accel import ConfigError
from dit_accel.methods.base import Phase
from dit_accel.methods.registry import handlers

from ..runs.results import Line
from ..statistics import EXACT, holm
from ..suites.comparison import FEWEST, TIMED, WORKS, ArmFigures, figures_of, is_rival, verdict
from ..suites.reference import AGREE
from .lines import ALWAYS, Results, better_of, further_metrics

LEVEL = 0.05
"""Share of wrong verdicts that all arms together may have."""

LISTED = 8
"""Names that a warning lists, before it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the pages are written from.

    Attributes:
        arms: their figures: dense runs by steps, then the others as they first appear.
        settings: arm -> a line of it, which tells what ran.
        prompts: clip -> its prompt, clips in order.
        minimums: metric -> what every arm's mean must reach.
        warnings: what a reader should know before believing the figures.
        holm: (arm, kind of work) -> the p-value of its difference to fewer steps, corrected for the number of arms.
    """

    results: Results
    arms: tuple[ArmFigures, ...]
    settings: Mapping[str, Line]
    prompts: Mapping[int, str]
    minimums: Mapping[str, float]
    warnings: tuple[str, ...]
    holm: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def further(self) -> list[str]:
        """The metrics besides PSNR, SSIM and the score."""
        return further_metrics(self.results.lines)

    @property
    def works(self) -> dict[str, str]:
        """Key -> in words, of the kinds of work, and time where it was measured, by which arms are made equal."""
        return {key: words for key, words in (WORKS | TIMED).items() if any(key in arm.means for arm in self.arms)}

    def mean(self, arm: ArmFigures, metric: str) -> float:
        """Return an arm's mean of a metric; nan where it has none."""
        if metric in arm.metrics:
            return arm.metrics[metric].mean
        return arm.psnr.mean if metric == "psnr" else arm.means.get(metric, math.nan)

    def reaches(self, arm: ArmFigures, metric: str) -> bool:
        """Whether an arm's mean is as good as what is asked: at least that, or at most where less is better."""
        mean, requested = self.mean(arm, metric), self.minimums[metric]
        return mean <= requested if better_of(metric) == "less" else mean >= requested

    def lines_of(self, arm: ArmFigures) -> list[Line]:
        """Return the lines of an arm."""
        return [line for line in self.results.lines if line["arm"] == arm.name]

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
    known = {*ALWAYS, *further_metrics(lines)} - ({"score"} if any("score" not in line for line in lines) else set())
    if "score" in minimums and "score" not in known:
        why = next((line.get("skipped", {}).get("score") for line in lines if "score" not in line), None)
        raise ConfigError(f"{results.path} has no score: {why or 'its lines tell none'}; ask for another metric")
    missing = [metric for metric in minimums if metric not in known]
    if missing:
        text = " and no ".join(missing)
        raise ConfigError(f"{results.path} has no {text}; name it among the suite's metrics and run again")
    corrected: dict[tuple[str, str], float] = {}
    for key in (*WORKS, *TIMED):  # each kind of work asks one question of every arm
        values = holm({arm.name: arm.p[key] for arm in arms if key in arm.p})
        corrected |= {(name, key): p for name, p in values.items()}
    warnings = tuple(_warnings(results, arms, prompts, corrected))
    return Report(
        results=results, arms=arms, settings=settings, prompts=prompts, minimums=minimums, warnings=warnings,
        holm=corrected,
    )  # fmt: skip


def judged(report: Report) -> list[ArmFigures]:
    """Return the arms of which something is asked: all but the dense runs, or those if there are no others."""
    return [arm for arm in report.arms if not report.is_dense(arm)] or list(report.arms)


def misses(report: Report) -> list[str]:
    """Return a sentence for every arm and metric that is under what was asked."""
    found = []
    for metric, least in report.minimums.items():
        for arm in judged(report):
            if not report.reaches(arm, metric):
                requested = f"at most {least:g}" if better_of(metric) == "less" else f"{least:g}"
                found.append(
                    f"{arm.name} has a mean {metric} of {report.mean(arm, metric):.4g}, asked were {requested}"
                )
    return found


def quantile_clips(lines: Sequence[Line]) -> tuple[Line, Line]:
    """Return an arm's worst line by PSNR, and its median one."""
    ranked = sorted(lines, key=lambda line: line["psnr"])
    return ranked[0], ranked[len(ranked) // 2]


def _warnings(
    results: Results,
    arms: Sequence[ArmFigures],
    prompts: Mapping[int, str],
    corrected: Mapping[tuple[str, str], float],
) -> Iterator[str]:
    lines = results.lines
    if results.cut:
        yield "The last line of the results was cut off and is left out; the run may have been stopped."
    listed = {line["arm"] for line in lines if not is_rival(line)}
    missing = [f"{arm.name} ({arm.clips} of {len(prompts)})" for arm in arms
               if arm.name in listed and arm.clips < len(prompts)]  # fmt: skip
    if missing:
        yield f"Clips are missing, so means are not over the same prompts: {_some(missing)}."
    unconverged = {line["clip"]: line for line in lines if line["reference_agreement"] < AGREE}
    if unconverged:
        text = [f"clip {clip} ({line['reference_steps']} steps, {line['reference_agreement']:.1f} dB)"
                for clip, line in sorted(unconverged.items())]  # fmt: skip
        yield f"References that did not converge to {AGREE:g} dB, and blur what is held against them: {_some(text)}."
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
    yield from _after_holm(arms, corrected)
    yield from _guided(lines)
    yield from _unmeasured(lines)
    for key in ("torch", "diffusers", "dit_accel"):
        versions = sorted({str(line[key]) for line in lines if key in line})
        if len(versions) > 1:
            yield f"The runs are of several versions of {key}: {', '.join(versions)}."


def _after_holm(arms: Sequence[ArmFigures], corrected: Mapping[tuple[str, str], float]) -> Iterator[str]:
    """Say which verdicts are left when all arms together may be wrong in 5 % of the cases."""
    judged = [arm for arm in arms if arm.ahead and arm.clips >= FEWEST]
    if len(judged) < 2:
        return
    for key, words in (WORKS | TIMED).items():
        held = [arm for arm in judged if key in arm.ahead]
        yield from _hopeless(held, words)
        decided = [arm.name for arm in held if verdict(arm.ahead[key], arm.clips) != "open"]
        lost = [name for name in decided if corrected[name, key] >= LEVEL]
        if decided:
            left = f"do not stand after Holm's correction for that number: {_some(lost)}." if lost else \
                "all stand after Holm's correction for that number."  # fmt: skip
            yield f"{len(held)} arms are judged at 95 % each. Of {len(decided)} verdicts at equal {words} {left}"


def _hopeless(held: Sequence[ArmFigures], words: str) -> Iterator[str]:
    """Say where so few clips are held against so many arms that no verdict could stand, whatever the figures."""
    clips = min((arm.clips for arm in held), default=EXACT)
    least = 2.0 ** (1 - clips)  # all differences of one sign
    if clips <= EXACT and least * len(held) >= LEVEL:
        needed = math.ceil(1 + math.log2(len(held) / LEVEL))
        text = (
            f"With {clips} clips and {len(held)} arms no verdict at equal {words} could stand after Holm's correction"
        )
        yield f"{text}, since p is {least:.3g} at least; it takes {needed} clips."


def _guided(lines: Sequence[Line]) -> Iterator[str]:
    """Name the arms of which PSNR is no measure."""
    seeking = {name for name, handler in handlers().items() if handler.phase == Phase.GUIDANCE}
    arms = dict.fromkeys(
        line["arm"] for line in lines if seeking & {*line["methods"]} or {"guider", "arm_call"} & {*line}
    )
    if arms:
        text = _some([*arms])
        yield f"Guidance seeks other clips than the converged run; judge these by their prompts, not by PSNR: {text}."


def _unmeasured(lines: Sequence[Line]) -> Iterator[str]:
    """Say which metrics are missing, and why."""
    found: dict[tuple[str, str], set[int]] = {}
    for line in lines:
        for key in ("skipped", "unavailable"):
            for name, reason in line.get(key, {}).items():
                found.setdefault((name, reason), set()).add(line["clip"])
    together: dict[tuple[str, int], list[str]] = {}
    for (name, reason), clips in found.items():
        together.setdefault((reason, len(clips)), []).append(name)
    for (reason, count), names in together.items():
        was, on = "was" if len(names) == 1 else "were", "1 clip" if count == 1 else f"{count} clips"
        yield f"{_some(names)} {was} skipped on {on}: {reason}."


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
