"""The table of a suite: every arm against dense runs that cost as much, clip by clip.

These are the runs of a ladder of rivals where the suite names one (`ladder`), else of the best solver at the model's
own noise shift.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from dit_accel_pipelines.generation.solvers import BEST

from dit_accel.methods.base import Phase
from dit_accel.methods.registry import handlers

from ..metrics.registered import described
from ..runs.model import OWN
from ..runs.results import Line, latest, markdown_table
from ..statistics import FEWEST, Estimate, Judged, estimate, judge
from .arms import TUNED, is_rival
from .ladder import setting_words
from .reference import AGREE, CONFIRMED, is_converged
from .suite import Suite

WORKS = {"work": "own work", "work_real": "work at a = .72"}
"""Key of a line -> in words, by which arms and dense runs are made equal; timed lines add ``steps_in_time``."""
TIMED = {"steps_in_time": "time"}
NOTHING = "saved nothing"
"""What stands in place of a lead of an arm whose methods left nothing out: it is the dense run, at its cost."""

NEGLIGIBLE = 1e-3
"""Share of the steps' work by which a run may differ from them and still save nothing."""

SAVING = (Phase.LISTS, Phase.PATTERNS, Phase.SELECTIONS, Phase.CACHES)
"""Phases of the methods that are there to leave something out."""

MEANS = (*WORKS, *TIMED, "ssim", "score", "seconds", "dense_seconds")
"""Keys of a line of which there are means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """What the clips of one arm say.

    Attributes:
        means: mean of ``work``, ``work_real``, ``ssim`` and, where clips have one, ``score``; where timed,
            ``steps_in_time``, ``seconds`` and ``dense_seconds``.
        psnr: PSNR to the reference in dB.
        ahead: key of `WORKS` or `TIMED` -> how far the arm is ahead of the dense run of equal work or time, in dB; all
            arms are judged together.
        metrics: metric besides those -> its mean over the clips that have it.
        differences: metric besides those -> its difference to the dense run of equal own work, clip by clip; all arms
            and metrics are judged together.
        saved_nothing: whether its methods left nothing out on any clip; it is judged by none of these.
    """

    name: str
    clips: int
    means: Mapping[str, float]
    psnr: Estimate
    ahead: Mapping[str, Judged] = field(default_factory=dict)
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    differences: Mapping[str, Judged] = field(default_factory=dict)
    saved_nothing: bool = False


def rival_steps(line: Line) -> set[int]:
    """Return the steps of the dense runs between which an arm's line is held: below and above its work and time."""
    amounts = [line[key] for key in (*WORKS, *TIMED) if line.get(key) is not None]
    return {max(1, round_(amount)) for amount in amounts for round_ in (math.floor, math.ceil)}


def figures(suite: Suite, lines: Sequence[Line]) -> list[ArmFigures]:
    """Return the figures of every arm that ran: dense runs by steps, then the suite's others."""
    return figures_of(lines, [arm.name for arm in suite.arms if not arm.is_dense])


def rival_kind(lines: Sequence[Line]) -> str:
    """Return what the dense runs are called that these lines' arms are held against: a ladder's if there are any."""
    return TUNED if any(is_rival(line) and line["arm"].startswith(f"{TUNED} ") for line in lines) else BEST


def idle_arms(lines: Sequence[Line]) -> set[str]:
    """Return the arms that computed on all of these clips as much as without methods, though some are there to save."""
    known, idle = handlers(), {line["arm"] for line in lines}
    for line in lines:
        saving = any(name in known and known[name].phase in SAVING for name in line.get("methods", ()))
        whole = abs(line["work"] - line["num_inference_steps"]) <= NEGLIGIBLE * line["num_inference_steps"]
        if not whole or not (saving or line.get("rival")):
            idle.discard(line["arm"])
    return idle


def figures_of(lines: Sequence[Line], listed: Sequence[str]) -> list[ArmFigures]:
    """Return the figures of every arm that ran: dense runs by steps, then the others as listed.

    Clips whose reference did not converge are left out, unless none did.
    """
    lines = [line for line in lines if is_converged(line)] or lines
    known, kind = latest(lines), rival_kind(lines)
    dense = sorted({line["num_inference_steps"] for line in known.values() if line["arm"] not in listed})
    ran: dict[str, list[Line]] = {f"{one} {steps}": [] for one in dict.fromkeys((BEST, kind)) for steps in dense}
    ran |= {name: [] for name in listed}
    for (name, _), line in sorted(known.items(), key=lambda one: one[0][1]):
        if name in ran:
            ran[name].append(line)
    ran = {name: own for name, own in ran.items() if own}
    idle = idle_arms(lines)
    held = {name: own for name, own in ran.items() if not is_rival(own[0]) and name not in idle}
    further = {name: dict.fromkeys(key for line in own for key in line.get("metrics", ())) for name, own in ran.items()}

    def ahead(own: Sequence[Line], key: str, metric: str) -> list[float]:
        found = [(value_of(line, metric), equal_value(known, line["clip"], line[key], metric, kind)) for line in own]
        return [value - rival for value, rival in found if value is not None and rival is not None]

    leads = {
        key: judge({name: ahead(own, key, "psnr") for name, own in held.items() if _all_have(key, own)})
        for key in (*WORKS, *TIMED)
    }
    others = judge({(name, one): ahead(own, "work", one) for name, own in held.items() for one in further[name]})
    values = {
        name: {one: [line["metrics"][one] for line in own if one in line.get("metrics", ())] for one in further[name]}
        for name, own in ran.items()
    }
    return [
        ArmFigures(
            name=name, clips=len(own), psnr=estimate([line["psnr"] for line in own]),
            means={key: float(np.mean([line[key] for line in own])) for key in MEANS if _all_have(key, own)},
            ahead={key: found[name] for key, found in leads.items() if name in found},
            metrics={one: estimate(found) for one, found in values[name].items()},
            differences={one: found for (arm, one), found in others.items() if arm == name},
            saved_nothing=name in idle,
        )
        for name, own in ran.items()
    ]  # fmt: skip


def _all_have(key: str, lines: Sequence[Line]) -> bool:
    return all(line.get(key) is not None for line in lines)


def value_of(line: Line, metric: str) -> float | None:
    """Return a line's value of a metric, None where it has none."""
    return line.get(metric) if metric in ("psnr", "ssim", "score") else line.get("metrics", {}).get(metric)


def equal_value(
    known: Mapping[tuple[str, int], Line], clip: int, steps: float, metric: str, kind: str = BEST
) -> float | None:  # fmt: skip
    """Return a clip's metric after so many dense steps, linear between whole numbers; None where one is missing.

    Args:
        kind: of the dense runs, as `rival_kind` gives it.
    """
    low, high = max(1, math.floor(steps)), max(1, math.ceil(steps))
    ends = [known.get((f"{kind} {count}", clip)) for count in (low, high)]
    values = [value_of(line, metric) for line in ends if line is not None]
    if len(values) < len(ends) or None in values:
        return None
    below, above = (value for value in values if value is not None)
    return below + (above - below) * (steps - low) if high > low else below


def decimals_of(metric: str) -> int:
    """Return how many digits behind the point a metric is shown with; 3 for one that is not installed."""
    found = described(metric)
    return found.decimals if found else 3


def table(suite: Suite, lines: Sequence[Line]) -> str:
    """Return the suite's Markdown table: a row an arm, means over clips, and below it by what rule they are judged.

    Dense runs that only some clips needed as rivals have no row.
    """
    arms = figures(suite, lines)
    most = max((arm.clips for arm in arms), default=0)
    shown = [arm for arm in arms if arm.ahead or arm.saved_nothing or arm.clips == most]
    lost = len({line["clip"] for line in lines if not is_converged(line)})
    below = filter(None, (
        rule_words(arms), rival_words(lines), suite.ladder.loose if suite.ladder else "",
        *(reference_words(lines) if lost else ()),
    ))  # fmt: skip
    return f"{table_of(shown, suite.clips - lost)}\n\n{' '.join(below)}"


def reference_words(lines: Sequence[Line]) -> list[str]:
    """Return in words which references did not converge, and which were confirmed afterwards."""
    found = {line["clip"]: line for line in lines if line.get("reference_agreement", AGREE) < AGREE}
    clips = sorted(found.items())
    lost = [f"clip {clip} ({line['reference_steps']} steps, {line['reference_agreement']:.1f} dB)"
            for clip, line in clips if not is_converged(line)]  # fmt: skip
    sure = [f"clip {clip} ({line['reference_steps']} steps, {line[CONFIRMED]['agreement']:.1f} dB to "
            f"{line[CONFIRMED]['steps']})" for clip, line in clips if is_converged(line)]  # fmt: skip
    return [
        *([f"Left out, since their references did not converge to {AGREE:g} dB: {', '.join(lost)}."] if lost else []),
        *([f"References that a run of twice as many steps confirmed: {', '.join(sure)}."] if sure else []),
    ]


def rule_words(arms: Sequence[ArmFigures]) -> str:
    """Return in words how many arms are judged together, and by what rule."""
    together = max((found.together for arm in arms for found in arm.ahead.values()), default=0)
    if not together:
        return f"No verdict: it takes {FEWEST} clips."
    number = "1 arm" if together == 1 else f"{together} arms"
    return f"Ahead and behind: after Holm's correction over {number}; else open."


def rival_words(lines: Sequence[Line]) -> str:
    """Return in words which dense runs arms are held against."""
    rivals = [line for line in lines if is_rival(line)]
    if rival_kind(lines) == BEST:
        return "Fewer steps are UniPC's at the model's own noise shift, not the best solver and shift for each number."
    solver = rivals[0]["reference"].partition(",")[0]
    if solver != BEST:
        whose = "the model's own scheduler" if solver == OWN else solver
        return f"The reference and fewer steps are runs of {whose}, not of the best solver and shift for each number."
    found = {
        line["num_inference_steps"]: setting_words(line["solver"], line["flow_shift"])
        for line in rivals if line["arm"].startswith(f"{TUNED} ")
    }  # fmt: skip
    settings = dict.fromkeys(found[steps] for steps in sorted(found))
    each = [f"{one} at {', '.join(str(steps) for steps in sorted(found) if found[steps] == one)}" for one in settings]
    return f"Fewer steps are the best dense runs of the ladder of rivals: {'; '.join(each)} steps."


def table_of(arms: Sequence[ArmFigures], clips: int | None = None) -> str:
    """Return the Markdown table of arms; those of fewer clips than ``clips``, None: than another, say how many."""
    whole = max((arm.clips for arm in arms), default=0) if clips is None else clips
    timed = any("seconds" in arm.means for arm in arms)
    works = WORKS | (TIMED if any("steps_in_time" in arm.ahead for arm in arms) else {})
    against = [f"against fewer steps at equal {words}, dB (median)" for words in works.values()]
    scored = ["score"] if any("score" in arm.means for arm in arms) else []
    columns = [*works.values(), *(["seconds, of dense"] if timed else [])]
    heads = ["arm", *columns, "PSNR to the reference, dB (median)", "SSIM", *scored, *against]
    named = [*dict.fromkeys(name for arm in arms for name in arm.metrics)]
    heads += named
    if any(arm.clips < whole for arm in arms):
        heads.insert(1, "clips")
    rows = []
    for arm in arms:
        cells = [arm.name, *([str(arm.clips)] if "clips" in heads else [])]
        cells += [f"{arm.means[key]:.2f}" if key in arm.means else "" for key in works]
        cells += [seconds_cell(arm)] if timed else []
        cells += [arm.psnr.cell(), f"{arm.means['ssim']:.3f}"]
        cells += [f"{arm.means[key]:.0%}" if key in arm.means else "" for key in scored]
        cells += [arm.ahead[key].judged() if key in arm.ahead else NOTHING * arm.saved_nothing for key in works]
        cells += [f"{arm.metrics[name]:.{decimals_of(name)}f}" if name in arm.metrics else "" for name in named]
        rows.append(cells)
    return markdown_table(" | ".join(heads), rows)


def seconds_cell(arm: ArmFigures) -> str:
    """Return an arm's seconds, and their share of those of the dense run of as many steps, "" if not timed."""
    if not {"seconds", "dense_seconds"} <= {*arm.means}:
        return ""
    return f"{arm.means['seconds']:.2f}, {arm.means['seconds'] / arm.means['dense_seconds']:.0%}"
