"""What a suite's lines say of its arms and pairs, as figures and in tables: means, leads over dense runs, verdicts.

These dense runs are those of a ladder of rivals where the suite names one (`ladder`), else of the best solver at the
model's own noise shift. Commands, pages and studies all take their figures from here.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from dit_accel_pipelines.generation.solvers import BEST

from dit_accel.methods.base import Phase
from dit_accel.methods.registry import handlers

from ..metrics.registered import DYNAMICS, FLOOR, decimals_of
from ..runs.model import OWN
from ..runs.results import AGREE, TIMED, TUNED, WORKS, ResultLine, last_lines, markdown_table
from ..statistics import FEWEST, TOO_FEW, ClipMean, Judged, clip_mean, frontier, judge, p_words
from .suite import Pair, Suite, judge_of, setting_words

NEGLIGIBLE = 1e-3  # share of the steps' work by which a run may differ from them and still save nothing
SAVING = (Phase.LISTS, Phase.PATTERNS, Phase.SELECTIONS, Phase.CACHES)  # of methods that leave something out
MEANS = (*WORKS, *TIMED, "ssim", "score", "seconds", "dense_seconds")  # fields of a line of which there are means
NOTHING = "saved nothing"  # in place of a lead of an arm whose methods left nothing out, at the dense run's cost
EQUAL = 1.02  # time or work, of the other arm's, up to which an arm's counts as no more


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """What the clips of one arm say.

    Attributes:
        ahead: key of `WORKS` or `TIMED` -> how far it is ahead of the dense run of equal work or time, in dB.
        differences: further metric -> its difference to the dense run of equal own work; of clips in folders, time.
        dynamics: metric of `DYNAMICS` -> by how many points it is above the reference's, of arms that are no rivals.
        saved_nothing: whether its methods left nothing out on any clip; it is judged by none of these.
    """

    name: str
    clips: int
    means: Mapping[str, float]
    psnr: ClipMean
    ahead: Mapping[str, Judged] = field(default_factory=dict)
    metrics: Mapping[str, ClipMean] = field(default_factory=dict)
    differences: Mapping[str, Judged] = field(default_factory=dict)
    dynamics: Mapping[str, Judged] = field(default_factory=dict)
    saved_nothing: bool = False

    def dynamic_words(self, name: str) -> str:
        """Return what the arm does beside its references by a metric of `DYNAMICS`, else the verdict."""
        about, verdict = DYNAMICS[name], self.dynamics[name].verdict
        return {"ahead": about.above, "behind": about.below}.get(verdict, verdict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigures:
    """What the clips of both arms of a pair say."""

    pair: Pair
    ahead: Judged
    score: Judged | None
    costs: tuple[float, float]  # of the arm and of the other, as shares of the dense run's
    by: str  # what costs are: time; processor time, of runs on one thread beside other work; or counted work

    @property
    def verdict(self) -> str:
        """What is said of the pair, its margin and cost within."""
        verdict, margin, dearer = self.ahead.verdict, self.pair.margin, self.costs[0] > EQUAL * self.costs[1]
        words = {"ahead": f"ahead by more than {margin:g} dB", "behind": f"not {margin:g} dB ahead"} if margin else {}
        more = f", at more {self.by}" if dearer and verdict not in ("open", TOO_FEW) else ""
        return words.get(verdict, verdict) + more

    @property
    def shares(self) -> str:
        """The costs of both in words."""
        return "not known" if math.isnan(self.costs[0]) else f"{self.costs[0]:.2f} vs {self.costs[1]:.2f}"


class Comparison:
    """Lines whose reference converged, all where none did, beside the dense runs that cost as much."""

    def __init__(self, lines: Iterable[ResultLine]) -> None:
        every = list(lines)
        every = [line for line in every if line.is_converged] or every
        self.lines, self.kind, self.idle = last_lines(every), rival_kind(every), idle_arms(every)
        self.curve = _curve(self.lines.values())

    def of_arm(self, name: str) -> list[ResultLine]:
        """Return the lines of an arm, by clip."""
        return sorted((line for line in self.lines.values() if line.arm == name), key=lambda line: line.clip)

    def rival_value(self, clip: int, steps: float, metric: str) -> float | None:
        """Return a metric after so many dense steps, linear between whole numbers; None where one is missing.

        Of rivals in folders it is linear between those of the curve that took less and more time.
        """
        if self.curve:
            places, first, last = self.curve, min(self.curve.values()), max(self.curve.values())
            steps = min(max(steps, first), last) if first <= EQUAL * steps and steps <= EQUAL * last else steps
        else:
            steps = max(1.0, steps)
            places = {f"{self.kind} {count}": float(count) for count in (math.floor(steps), math.ceil(steps))}
        below = max((name for name in places if places[name] <= steps), key=places.__getitem__, default="")
        above = min((name for name in places if places[name] >= steps), key=places.__getitem__, default="")
        ends = [self.lines.get((name, clip)) for name in (below, above)]
        low, high = (None if line is None else line.value(metric) for line in ends)
        if low is None or high is None:
            return None
        return low if below == above else low + (high - low) * (steps - places[below]) / (places[above] - places[below])

    def place(self, line: ResultLine) -> float | None:
        """Return where a rival stands, in dense steps; None: arms are not compared with it."""
        if line.of_folder:
            return self.curve.get(line.arm)
        return line.num_inference_steps if line.arm == f"{self.kind} {line.num_inference_steps}" else None

    def leads(self, name: str, key: str, metric: str = "psnr") -> dict[int, float]:
        """Return clip -> how far an arm's metric is above that of the dense run of equal ``key``."""
        leads = {}
        for line in self.of_arm(name) if name not in self.idle else ():
            value, steps = line.value(metric), line.value(key)
            if value is not None and steps is not None and not line.is_rival:
                rival = self.rival_value(line.clip, steps, metric)
                leads |= {} if rival is None else {line.clip: value - rival}
        return leads

    def figures(self, listed: Sequence[str]) -> list[ArmFigures]:
        """Return the figures of every arm that ran: dense runs by steps, then the others as listed."""
        dense = sorted({line.num_inference_steps for line in self.lines.values() if line.arm not in listed})
        names = [*(f"{kind} {steps}" for kind in dict.fromkeys((BEST, self.kind)) for steps in dense), *listed]
        names = [*dict.fromkeys(line.arm for line in self.lines.values() if line.of_folder and line.is_rival), *names]
        cost = "work" if any(line.value("work") is not None for line in self.lines.values()) else "steps_in_time"
        arms = {name: lines for name in names if (lines := self.of_arm(name))}
        further = {name: _further(lines) for name, lines in arms.items()}
        ahead = {
            key: judge({name: [*self.leads(name, key).values()] for name in arms if _all_have(key, arms[name])})
            for key in (*WORKS, *TIMED)
        }
        differences = judge({
            (name, metric): [*self.leads(name, cost, metric).values()]
            for name, metrics in further.items() for metric in metrics if metric != FLOOR
        })  # fmt: skip
        moved = judge({
            (name, metric): [100 * (line.dynamics[metric][0] - line.dynamics[metric][1]) for line in each
                             if metric in line.dynamics and not line.is_rival]
            for name, each in arms.items() for metric in DYNAMICS
        })  # fmt: skip
        return [
            ArmFigures(
                name=name, clips=len(lines), psnr=clip_mean([line.psnr for line in lines]),
                means={key: float(np.mean([getattr(line, key) for line in lines]))
                       for key in MEANS if _all_have(key, lines)},
                ahead={key: judged[name] for key, judged in ahead.items() if name in judged},
                metrics={metric: clip_mean(values) for metric, values in further[name].items()},
                differences={metric: judged for (arm, metric), judged in differences.items() if arm == name},
                dynamics={metric: judged for (arm, metric), judged in moved.items() if arm == name},
                saved_nothing=name in self.idle,
            )
            for name, lines in arms.items()
        ]  # fmt: skip


def _curve(lines: Iterable[ResultLine]) -> dict[str, float]:
    """Return the rivals in folders that none surpasses in less time, the fastest first -> their mean time in steps.

    That they are chosen on the clips that judge is to the rivals' advantage.
    """
    timed: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if line.of_folder and line.is_rival and line.steps_in_time is not None:
            timed.setdefault(line.arm, []).append((line.steps_in_time, line.psnr))
    means = {name: tuple(np.mean(values, axis=0).tolist()) for name, values in timed.items()}
    return {name: means[name][0] for name in frontier(means, means.__getitem__)}


def suite_figures(suite: Suite, lines: Iterable[ResultLine]) -> list[ArmFigures]:
    """Return the figures of a suite's arms that ran, dense runs first."""
    return Comparison(lines).figures([arm.name for arm in suite.arms if not arm.is_dense])


def rival_kind(lines: Iterable[ResultLine]) -> str:
    """Return the name of the dense runs that these lines' arms are compared with: a ladder's if there are any."""
    return TUNED if any(line.is_rival and line.arm.startswith(f"{TUNED} ") for line in lines) else BEST


def idle_arms(lines: Sequence[ResultLine]) -> set[str]:
    """Return the arms that computed on all of these clips as much as without methods, though some are there to save."""
    saving = {name for name, handler in handlers().items() if handler.phase in SAVING}
    idle = {line.arm for line in lines}
    for line in lines:
        whole = abs(line.work - line.num_inference_steps) <= NEGLIGIBLE * line.num_inference_steps
        if not whole or not (saving & {*line.methods} or line.rival):
            idle.discard(line.arm)
    return idle


def pair_figures(
    pairs: Sequence[Pair], lines: Iterable[ResultLine], reference_steps: int | None = None
) -> list[PairFigures]:
    """Return the figures of the pairs of which both arms ran on a clip at least, judged together."""
    known, both = last_lines(line for line in lines if line.is_converged), dict[Pair, list[tuple[ResultLine, ...]]]()
    for pair in pairs:
        clips = sorted(clip for name, clip in known if name == pair.arm and (pair.against, clip) in known)
        both[pair] = [(known[pair.arm, clip], known[pair.against, clip]) for clip in clips]
    psnrs, scores = (
        {pair: [factor * (value - other) for value, other in ((a.value(metric), b.value(metric)) for a, b in ends)
                if value is not None and other is not None] for pair, ends in both.items()}
        for metric, factor in (("psnr", 1), ("score", 100))
    )  # fmt: skip
    ahead, scored = judge(psnrs, {pair: pair.margin for pair in pairs}), judge(scores)
    figures = []
    for pair, judged in ahead.items():
        dense = reference_steps or max(line.num_inference_steps for ends in both[pair] for line in ends)
        by, costs = _costs(both[pair], known, dense)
        figures.append(PairFigures(pair=pair, ahead=judged, score=scored.get(pair), costs=costs, by=by))
    return figures


def _further(lines: Sequence[ResultLine]) -> dict[str, list[float]]:
    """Return further metric -> its values, as they first appear."""
    values: dict[str, list[float]] = {}
    for line in lines:
        for metric, value in line.metrics.items():
            values.setdefault(metric, []).append(value)
    return values


def _all_have(key: str, lines: Sequence[ResultLine]) -> bool:
    return all(line.value(key) is not None for line in lines)


def _costs(
    both: Sequence[tuple[ResultLine, ...]], known: Mapping[tuple[str, int], ResultLine], dense: int
) -> tuple[str, tuple[float, float]]:
    """Return what measures two arms' costs, the best kind that all lines have, and the costs; see `PairFigures`."""
    whole = {clip: _busy(line) for (name, clip), line in known.items() if name == f"{BEST} {dense}"}
    kinds = {
        "time": lambda line: (line.steps_in_time or 0) / dense,
        "processor time": lambda line: _busy(line) / (whole.get(line.clip) or np.inf),
        "work": lambda line: line.work / dense,
    }
    costs = {by: np.array([[cost(line) for line in ends] for ends in both]) for by, cost in kinds.items()}
    by = next((by for by, values in costs.items() if values.all()), "work")
    arm, against = costs[by].mean(0)
    return by, (float(arm), float(against))


def _busy(line: ResultLine) -> float:
    """Return the processor seconds of a run's steps on one thread; 0 where not known, or of several threads."""
    return float(line.times.get("processor", 0.0)) if line.times.get("threads") == 1 else 0.0


def suite_table(suite: Suite, lines: Sequence[ResultLine]) -> str:
    """Return a suite's Markdown tables: by its judge, else of its arms with the rule of verdicts, and of its pairs."""
    if suite.judge:
        return judge_of(suite).table(suite, [dict(line.raw) for line in lines])
    arms = suite_figures(suite, lines)
    most = max((arm.clips for arm in arms), default=0)
    shown = [arm for arm in arms if arm.ahead or arm.saved_nothing or arm.clips == most]
    lost = len({line.clip for line in lines if not line.is_converged})
    below = [rule_words(arms), rival_words(lines), suite.ladder.loose if suite.ladder else ""]
    below += reference_words(lines) if lost else []
    pairs = pairs_markdown(pair_figures(suite.pairs, lines, suite.reference_steps)) if suite.pairs else ""
    return "\n\n".join(filter(None, (arms_markdown(shown, suite.clips - lost), " ".join(filter(None, below)), pairs)))


def reference_words(lines: Sequence[ResultLine]) -> list[str]:
    """Return in words which references did not converge, and which were confirmed afterwards."""
    clips = sorted({line.clip: line for line in lines if line.reference_agreement < AGREE}.items())
    lost = [f"clip {clip} ({line.reference_steps} steps, {line.reference_agreement:.1f} dB)"
            for clip, line in clips if not line.is_converged]  # fmt: skip
    sure = [f"clip {clip} ({line.reference_steps} steps, {line.reference_confirmed['agreement']:.1f} dB to "
            f"{line.reference_confirmed['steps']})" for clip, line in clips if line.is_converged]  # fmt: skip
    return [
        *([f"Left out, since their references did not converge to {AGREE:g} dB: {', '.join(lost)}."] if lost else []),
        *([f"References that a run of twice as many steps confirmed: {', '.join(sure)}."] if sure else []),
    ]


def rule_words(arms: Sequence[ArmFigures]) -> str:
    """Return in words how many arms are judged together, and by what rule."""
    together = max((lead.together for arm in arms for lead in arm.ahead.values()), default=0)
    if not together:
        return f"No verdict: it takes {FEWEST} clips."
    number = "1 arm" if together == 1 else f"{together} arms"
    return f"Ahead and behind: after Holm's correction over {number}; else open."


def rival_words(lines: Sequence[ResultLine]) -> str:
    """Return in words which dense runs arms are compared with."""
    if lines and lines[0].of_folder:
        curve = _curve(lines)
        off = dict.fromkeys(line.arm for line in lines if line.is_rival and curve and line.arm not in curve)
        words = "At equal time arms are held against the curve of these rivals, linear between two of them: "
        beside = f"; not on it, since another is as near in less time: {', '.join(off)}" if off else ""
        return f"{words}{', '.join(curve)}{beside}." if curve else ""
    if rival_kind(lines) == BEST:
        return "Fewer steps are UniPC's at the model's own noise shift, not the best solver and shift for each number."
    rivals = [line for line in lines if line.is_rival]
    solver = rivals[0].reference.partition(",")[0]
    if solver != BEST:
        whose = "the model's own scheduler" if solver == OWN else solver
        return f"The reference and fewer steps are runs of {whose}, not of the best solver and shift for each number."
    words = {line.num_inference_steps: setting_words(line.solver, line.flow_shift)
             for line in rivals if line.arm.startswith(f"{TUNED} ")}  # fmt: skip
    settings: dict[str, list[str]] = {}
    for steps in sorted(words):
        settings.setdefault(words[steps], []).append(str(steps))
    each = "; ".join(f"{setting} at {', '.join(steps)}" for setting, steps in settings.items())
    return f"Fewer steps are the best dense runs of the ladder of rivals: {each} steps."


def arms_markdown(arms: Sequence[ArmFigures], clips: int | None = None) -> str:
    """Return the Markdown table of arms; those of fewer clips than ``clips``, None: than another, say how many."""
    whole = max((arm.clips for arm in arms), default=0) if clips is None else clips
    works = WORKS | (TIMED if any("steps_in_time" in arm.ahead for arm in arms) else {})
    works = {key: words for key, words in works.items() if any(key in arm.means for arm in arms)}

    def of(table: str, key: str, spec: str) -> Callable[[ArmFigures], str]:
        return lambda arm: format(values[key], spec) if key in (values := getattr(arm, table)) else ""

    def lead(key: str) -> Callable[[ArmFigures], str]:
        return lambda arm: arm.ahead[key].judged() if key in arm.ahead else NOTHING * arm.saved_nothing

    def moved(name: str) -> Callable[[ArmFigures], str]:
        return lambda arm: f"{arm.dynamics[name]:+.1f} {arm.dynamic_words(name)}" if name in arm.dynamics else ""

    columns: dict[str, Callable[[ArmFigures], str]] = {"arm": lambda arm: arm.name}
    if any(arm.clips < whole for arm in arms):
        columns["clips"] = lambda arm: str(arm.clips)
    columns |= {words: of("means", key, ".2f") for key, words in works.items()}
    if any("seconds" in arm.means for arm in arms):
        columns["seconds, of dense"] = seconds_cell
    columns |= {"PSNR to the reference, dB (median)": lambda arm: arm.psnr.cell(), "SSIM": of("means", "ssim", ".3f")}
    if any("score" in arm.means for arm in arms):
        columns["score"] = of("means", "score", ".0%")
    columns |= {f"against fewer steps at equal {words}, dB (median)": lead(key) for key, words in works.items()}
    columns |= {name: of("metrics", name, f".{decimals_of(name)}f") for arm in arms for name in arm.metrics}
    columns |= {f"{about.head} less the reference's, points": moved(name)
                for name, about in DYNAMICS.items() if any(name in arm.dynamics for arm in arms)}  # fmt: skip
    return markdown_table(" | ".join(columns), [[cell(arm) for cell in columns.values()] for arm in arms])


def seconds_cell(arm: ArmFigures) -> str:
    """Return an arm's seconds, and their share of those of the dense run of as many steps, "" if not timed."""
    if not {"seconds", "dense_seconds"} <= {*arm.means}:
        return ""
    return f"{arm.means['seconds']:.2f}, {arm.means['seconds'] / arm.means['dense_seconds']:.0%}"


def pairs_rule(pairs: Sequence[PairFigures]) -> str:
    """Return in words how pairs are judged."""
    together = max(pair.ahead.together for pair in pairs)
    if not together:
        return f"Pairs declared in the suite, PSNR clip by clip; there is no verdict under {FEWEST} clips."
    return (
        f"Pairs declared in the suite, PSNR clip by clip; p by Holm's rule over {together}, of the difference being 0, "
        "or the margin where one is given."
    )


def pairs_markdown(pairs: Sequence[PairFigures]) -> str:
    """Return the Markdown table of pairs and how they were judged, "" where there is none."""
    if not pairs:
        return ""
    scored, cost = any(pair.score for pair in pairs), pairs[0].by
    heads = "pair | PSNR ahead, dB (median) | Holm p | verdict "
    heads += f"{'| score, % ' if scored else ''}| share of dense {cost}"
    rows = []
    for pair in pairs:
        costs = pair.shares + ("" if pair.by == cost else f" by {pair.by}")
        cells = [str(pair.pair), pair.ahead.cell("+"), p_words(pair.ahead.p_holm), pair.verdict]
        rows.append((*cells, *([pair.score.judged("+.1f") if pair.score else ""] if scored else []), costs))
    return f"{pairs_rule(pairs)}\n\n{markdown_table(heads, rows)}"
