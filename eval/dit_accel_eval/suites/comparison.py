"""The table of a suite: every arm against dense runs of the best solver that cost as much, clip by clip."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..metrics.registered import metrics
from ..runs.results import Line, latest, markdown_table
from ..statistics import Interval, bootstrap, sign_flips
from .arms import dense_arm
from .suite import Suite

WORKS = {"work": "own work", "work_real": "work at a = .72"}
"""Key of a line -> in words, by which arms and dense runs are made equal; timed lines add ``steps_in_time``."""
TIMED = {"steps_in_time": "time"}


FEWEST = 6
"""Clips with which a verdict begins: all of fewer have one sign in more than 5 % of the draws by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """What the clips of one arm say.

    Attributes:
        means: mean of ``work``, ``work_real``, ``ssim`` and, where clips have one, ``score``; where timed,
            ``steps_in_time``.
        psnr: PSNR to the reference in dB.
        ahead: key of `WORKS` or `TIMED` -> how far the arm is ahead of the dense run of equal work or time, in dB.
        p: the same key -> the p-value of that difference by `sign_flips`, not corrected for other arms.
        metrics: metric besides those -> its mean over the clips that have it.
        differences: metric besides those -> its difference to the dense run of equal own work, clip by clip.
    """

    name: str
    clips: int
    means: Mapping[str, float]
    psnr: Interval
    ahead: Mapping[str, Interval]
    p: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Interval] = field(default_factory=dict)
    differences: Mapping[str, Interval] = field(default_factory=dict)


def rival_steps(line: Line) -> set[int]:
    """Return the steps of the dense runs between which an arm's line is held: below and above its work and time."""
    amounts = [line[key] for key in (*WORKS, *TIMED) if line.get(key) is not None]
    return {max(1, round_(amount)) for amount in amounts for round_ in (math.floor, math.ceil)}


def figures(suite: Suite, lines: Sequence[Line]) -> list[ArmFigures]:
    """Return the figures of every arm that ran: dense runs of the best solver by steps, then the suite's others."""
    return figures_of(lines, [arm.name for arm in suite.arms if not arm.is_dense])


def is_rival(line: Line) -> bool:
    """Whether a line is a dense run of the best solver, which suites call by its steps, and no other arm is called."""
    return line["arm"] == dense_arm(line["num_inference_steps"]).name


def figures_of(lines: Sequence[Line], listed: Sequence[str]) -> list[ArmFigures]:
    """Return the figures of every arm that ran: dense runs of the best solver by steps, then the others as listed."""
    known = latest(lines)
    clips = sorted({clip for _, clip in known})
    dense = {line["num_inference_steps"] for line in known.values() if line["arm"] not in listed}
    names = [*(dense_arm(steps).name for steps in sorted(dense)), *listed]
    found = []
    for name in names:
        own = [known[name, clip] for clip in clips if (name, clip) in known]
        if own:
            found.append(_figures(name, own, known))
    return found


def _figures(name: str, lines: Sequence[Line], known: Mapping[tuple[str, int], Line]) -> ArmFigures:
    keys = [key for key in (*WORKS, *TIMED) if all(line.get(key) is not None for line in lines)]
    scored = ("score",) if all("score" in line for line in lines) else ()
    ahead, p = {}, {}
    for key in () if is_rival(lines[0]) else keys:
        differences = _differences(lines, known, key, "psnr")
        if differences:
            ahead[key], p[key] = bootstrap(differences), sign_flips(differences)
    names = dict.fromkeys(metric for line in lines for metric in line.get("metrics", ()))
    held = {} if is_rival(lines[0]) else {metric: _differences(lines, known, keys[0], metric) for metric in names}
    values = {name: [value for line in lines if (value := value_of(line, name)) is not None] for name in names}
    return ArmFigures(
        name=name,
        clips=len(lines),
        means={key: float(np.mean([line[key] for line in lines])) for key in (*keys, "ssim", *scored)},
        psnr=bootstrap([line["psnr"] for line in lines]),
        ahead=ahead,
        p=p,
        metrics={name: bootstrap(found) for name, found in values.items() if found},
        differences={name: bootstrap(found) for name, found in held.items() if found},
    )


def value_of(line: Line, metric: str) -> float | None:
    """Return a line's value of a metric, None where it has none."""
    return line.get(metric) if metric in ("psnr", "ssim", "score") else line.get("metrics", {}).get(metric)


def _differences(lines: Sequence[Line], known: Mapping[tuple[str, int], Line], key: str, metric: str) -> list[float]:
    """Return an arm's values less those of the dense run of equal work, of the clips that have both."""
    found = [(value_of(line, metric), equal_value(known, line["clip"], line[key], metric)) for line in lines]
    return [own - rival for own, rival in found if own is not None and rival is not None]


def equal_value(known: Mapping[tuple[str, int], Line], clip: int, steps: float, metric: str) -> float | None:
    """Return a clip's metric after so many dense steps, linear between whole numbers; None where one is missing."""
    low, high = max(1, math.floor(steps)), max(1, math.ceil(steps))
    ends = [known.get((dense_arm(count).name, clip)) for count in (low, high)]
    values = [value_of(line, metric) for line in ends if line is not None]
    if len(values) < len(ends) or None in values:
        return None
    below, above = (value for value in values if value is not None)
    return below + (above - below) * (steps - low) if high > low else below


def verdict(difference: Interval, clips: int) -> str:
    """Return ``ahead`` or ``behind`` where the interval excludes 0, else ``open``, as it is below `FEWEST` clips.

    What is 0 as the table prints it is 0: a cache that skips nothing differs from dense by rounding alone.
    """
    if clips < FEWEST or round(difference.low, 2) <= 0 <= round(difference.high, 2):
        return "open"
    return "ahead" if difference.low > 0 else "behind"


def decimals_of(metric: str) -> int:
    """Return how many digits behind the point a metric is shown with; 3 for one that is not installed."""
    return metrics()[metric].decimals if metric in metrics() else 3


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: a row an arm, means over clips, intervals by paired bootstrap."""
    return table_of(figures(suite, lines), suite.clips)


def table_of(arms: Sequence[ArmFigures], clips: int | None = None) -> str:
    """Return the Markdown table of arms; those of fewer clips than ``clips``, None: than another, say how many."""
    whole = max((arm.clips for arm in arms), default=0) if clips is None else clips
    works = WORKS | (TIMED if any("steps_in_time" in arm.means for arm in arms) else {})
    against = [f"against UniPC at equal {words}, dB" for words in works.values()]
    scored = ["score"] if any("score" in arm.means for arm in arms) else []
    heads = ["arm", *works.values(), "PSNR to converged, dB", "SSIM", *scored, *against]
    named = [*dict.fromkeys(name for arm in arms for name in arm.metrics)]
    heads += named
    if any(arm.clips < whole for arm in arms):
        heads.insert(1, "clips")
    rows = []
    for arm in arms:
        cells = [arm.name, *([str(arm.clips)] if "clips" in heads else [])]
        cells += [f"{arm.means[key]:.2f}" if key in arm.means else "" for key in works]
        cells += [str(arm.psnr), f"{arm.means['ssim']:.3f}"]
        cells += [f"{arm.means[key]:.0%}" if key in arm.means else "" for key in scored]
        cells += [
            f"{arm.ahead[key]:+} {verdict(arm.ahead[key], arm.clips)}" if key in arm.ahead else "" for key in works
        ]
        cells += [f"{arm.metrics[name]:.{decimals_of(name)}f}" if name in arm.metrics else "" for name in named]
        rows.append(cells)
    return markdown_table(" | ".join(heads), rows)
