"""The search of `tune pipeline`: optuna proposes settings and prunes them, held-out prompts judge the choice once."""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from dit_accel_pipelines.generation.progress import Stages

from dit_accel.errors import ConfigError, did_you_mean, install

from ..metrics.registered import metric, metric_about, metrics
from ..runs.loaded import FIRST_PROMPT
from ..runs.results import ResultLine, last_lines, result_lines
from ..statistics import clip_mean
from ..suites.arms import Arm, dense_arm
from ..suites.job import Job
from ..suites.running import run_arms

ROUNDS = (2, 4, 6)  # prompts before a setting may be pruned, and then all; those before are among them
TRIED, FEW = 0.5, 24  # share of the settings that are run at most, those set by hand among them; of so few all may be
KEPT = 3  # of so many settings one goes on to more prompts
REPEATS = 8  # times the number of settings that the sampler may propose: it proposes some again
LADDER = 5  # dense runs of the space that are among the first, to tell what a quality is worth
SPARE = 1.5  # times the work of the cheapest setting that meets the target on few prompts which others may need
CACHED_LEAST = 0.25  # share of its steps that a cache computes at least: its cost is not known beforehand
HELD_OUT, HELD_OUT_FIRST = 6, FIRST_PROMPT + 32  # prompts on which the choice is verified, and the first of them
FEWEST_PROMPTS = 4  # prompts of one's own that a search takes at least: half of them are held out
SPEEDUP = "speedup"
NICKNAMES = {"checker": "score", "lpips": "lpips@alex"}


class Prompts(NamedTuple):
    """Numbers of clips: of each round, more and more, those before among them; and of those that verify the choice."""

    rounds: tuple[range, ...]
    held: range


HELD_OUT_PROMPTS = Prompts(
    rounds=tuple(range(FIRST_PROMPT, FIRST_PROMPT + count) for count in ROUNDS),
    held=range(HELD_OUT_FIRST, HELD_OUT_FIRST + HELD_OUT),
)
"""Prompts that an embedded model never saw."""


def split(count: int) -> Prompts:
    """Return how `FEWEST_PROMPTS` or more of one's own are shared out: half is searched, the second half held out."""
    if count < FEWEST_PROMPTS:
        least = f"{FEWEST_PROMPTS} prompts at least, half of them held out"
        raise ConfigError(f"tune pipeline takes {least}, got {count}; give more with --prompt or --prompt-file")
    half = min(ROUNDS[-1], count // 2)
    rounds = tuple(range(most) for most in dict.fromkeys(min(most, half) for most in ROUNDS))
    return Prompts(rounds=rounds, held=range(half, min(count, half + HELD_OUT)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a metric, or ``speedup``, must be at least; at most where less is better."""

    name: str
    value: float

    @property
    def quality(self) -> str:
        """The metric by which settings are compared: PSNR where a speed-up is requested."""
        return "psnr" if self.name == SPEEDUP else self.name

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        about = metric_about(self.quality)
        return -1 if about and about.better == "less" else 1

    def missed(self, point: "Measurement") -> float:
        """Return by how much a setting misses the target; 0 if it meets it."""
        if self.name == SPEEDUP:
            return max(0.0, self.value - point.speedup)
        return max(0.0, self.sign * (self.value - point.quality))

    def rank(self, point: "Measurement") -> tuple[float, float]:
        """Return what is least of the best setting: what it misses, then its work, or for a speed-up its quality."""
        return self.missed(point), -self.sign * point.quality if self.name == SPEEDUP else point.work


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A setting as it was measured: means with the quality's interval, work and speed-up in dense steps."""

    arm: Arm
    prompts: int
    quality: float
    error: float
    work: float
    speedup: float
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the setting and its figures as plain values."""
        figures = ("prompts", "quality", "interval", "work", "speedup")
        return {"arm": self.arm.name, **self.arm.to_dict(), **{name: getattr(self, name) for name in figures}}


def read_target(text: str) -> Target:
    """Read a target, such as ``psnr=30``, ``lpips=0.1`` or ``speedup=2``; raises `ConfigError` for any other."""
    name, equals, value = text.rpartition("=")
    name = NICKNAMES.get(name, name)
    if not equals:
        raise ConfigError(f"--target {text!r} is not NAME=VALUE; write, say, --target psnr=30 or --target speedup=2")
    if name not in (SPEEDUP, "score"):
        known = {*metrics(), SPEEDUP, "score", *NICKNAMES}
        if name not in known and metric_about(name) is None:
            hint = did_you_mean(name, known).replace("dit-accel models", "dit-accel eval metrics")
            raise ConfigError(f"--target {text!r} names no metric; {hint}")
        reason = metric(name).missing()
        if reason is not None:
            raise ConfigError(f"--target {text!r} can't be measured: {reason}")
        if metric(name).better == "neither":
            raise ConfigError(f"--target {text!r}: of {name} neither more nor less is better; name another")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (name == SPEEDUP and number <= 0):
        raise ConfigError(f"--target {text!r} has no number that {name} could be; write, say, --target psnr=30")
    return Target(name=name, value=number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search under way."""

    job: Job
    target: Target
    stages: Stages
    own: int
    prompts: Prompts = HELD_OUT_PROMPTS
    ran: set[str] = field(default_factory=set)

    def measured(self, arms: Sequence[Arm], prompts: Sequence[int]) -> list[Measurement]:
        """Return settings as measured on prompts, made or found again."""
        run_arms(dataclasses.replace(self.job, suite=dataclasses.replace(self.job.suite, arms=tuple(arms))), prompts)
        known = last_lines(result_lines(self.job.out))
        self.ran.update(arm.name for arm in arms)
        return [self._point(arm, [known[arm.name, prompt] for prompt in prompts]) for arm in arms]

    def _point(self, arm: Arm, lines: Sequence[ResultLine]) -> Measurement:
        values = [value for line in lines if (value := line.value(self.target.quality)) is not None]
        if len(values) < len(lines):
            gaps = (reasons for line in lines for reasons in (line.skipped, line.unavailable))
            reason = next(filter(None, (gap.get(self.target.quality) for gap in gaps)), "it has no value")
            raise ConfigError(f"{self.target.quality} can't be measured here: {reason}; name another target")
        work, quality = float(np.mean([line.work for line in lines])), clip_mean(values)
        return Measurement(
            arm=arm, prompts=len(lines), work=work, speedup=self.own / work, quality=quality.mean,
            error=float(np.std(values) / math.sqrt(max(1, len(values) - 1))),
            interval=None if quality.low is None or quality.high is None else (quality.low, quality.high),
        )  # fmt: skip

    def tried(self, arms: Sequence[Arm], by_hand: Sequence[Arm] = ()) -> list[Measurement]:
        """Return what was measured on all prompts: by hand and some dense runs, then what optuna's sampler proposes."""
        most, dense = self.most_tried(arms), [arm for arm in arms if arm.is_dense]
        first = (*by_hand, *dense[:: max(1, len(dense) // LADDER)])
        try:
            import optuna  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(f"tune pipeline takes optuna, which is not installed; {install('eval')}") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kinds = defaultdict[str, dict[int, Arm]](dict)
        for arm in arms:
            kinds[_kind(arm)][arm.num_inference_steps] = arm
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=KEPT)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
        for arm in sorted({arm.name: arm for arm in first}.values(), key=least_work):
            study.enqueue_trial({"kind": _kind(arm), "steps": arm.num_inference_steps})
        steps = [arm.num_inference_steps for arm in arms]
        seen, whole, losses = list[Measurement](), list[Measurement](), dict[str, float | None]()

        def objective(trial: Any) -> float:
            known = kinds[trial.suggest_categorical("kind", list(kinds))]
            count = trial.suggest_int("steps", min(steps), max(steps))
            arm = known[min(known, key=lambda number: abs(number - count))]
            if arm.name not in losses:
                losses[arm.name] = None
                same = [point for point in seen if point.arm.methods == arm.methods]
                fewer = (point.work for point in same if point.arm.num_inference_steps <= arm.num_inference_steps)
                least = max([least_work(arm), *fewer])  # no more steps of the same can well undercut fewer
                if arm in by_hand or least <= self.most_work(seen):
                    self.stages.stage(f"setting {len(seen) + 1} of at most {most}, {len(arms)} in all: {arm.name}")
                    points = self._rounds(arm, trial, arm in by_hand)
                    seen.append(points[0])
                    whole.extend(points[len(self.prompts.rounds) - 1 :])
                    losses[arm.name] = self.loss(points[-1])
            if (loss := losses[arm.name]) is None:
                raise optuna.TrialPruned  # not run: its work can't but be too much
            return loss

        study.optimize(
            objective, REPEATS * len(arms), callbacks=[lambda study, _: study.stop() if len(seen) == most else None]
        )
        if not whole:
            raise ConfigError(f"no setting is {self.target.value:g} times as fast as {self.own} steps; ask for less")
        return whole

    def _rounds(self, arm: Arm, trial: Any, whole: bool) -> list[Measurement]:
        """Return a setting as measured on more and more prompts; ``whole``: on all, also where others are ahead."""
        points = list[Measurement]()
        for place, prompts in enumerate(self.prompts.rounds):
            points += self.measured([arm], prompts)
            trial.report(self.loss(points[-1]), KEPT**place)
            if trial.should_prune() and not whole:
                break
        return points

    def most_tried(self, arms: Sequence[Arm]) -> int:
        """Return how many settings are run at most."""
        return max(math.ceil(TRIED * len(arms)), min(len(arms), FEW))

    def cost(self, arms: Sequence[Arm]) -> str:
        """Return in words about how many runs the search takes: of the settings that run a `KEPT`-th goes on."""
        count, rounds = self.most_tried(arms), [len(clips) for clips in self.prompts.rounds]
        steps, held = [arm.num_inference_steps for arm in arms], len(self.prompts.held)
        runs = count * rounds[0] + math.ceil(count / KEPT) * (rounds[-1] - rounds[0]) + 2 * held
        return (
            f"about {runs} runs of {min(steps)} to {max(steps)} steps, besides converged and dense runs of "
            f"{rounds[-1]} + {held} prompts"
        )

    def most_work(self, points: Sequence[Measurement]) -> float:
        """Return the work above which no setting can win any more."""
        if self.target.name == SPEEDUP:
            return self.own / self.target.value
        return SPARE * min((point.work for point in points if not self.target.missed(point)), default=math.inf)

    def loss(self, point: Measurement) -> float:
        """Return what the search makes small, in dense steps, by prompt, since prompts differ more than settings.

        That is what the target would cost at the setting's share of the dense steps that are as good, and the dense
        steps by which it falls short, or half of those by which it goes beyond; of a speed-up, the quality.
        """
        sign = self.target.sign
        if self.target.name == SPEEDUP:
            return 1e6 * self.target.missed(point) - sign * point.quality
        lines = last_lines(result_lines(self.job.out))
        losses = []
        for clip in self.prompts.rounds[-1][: point.prompts]:
            ran = [lines[name, clip] for name in self.ran if (name, clip) in lines]
            # a search that goes on has lines of later settings, which must not change what it proposes
            steps = {line.num_inference_steps for line in ran if line.is_rival}
            steps = steps.union(*(line.rival_steps for line in ran))
            rivals = [lines[dense_arm(count).name, clip] for count in steps]
            dense = sorted((line.work, sign * (line.value(self.target.quality) or 0.0)) for line in rivals)
            works, ladder = (np.array(column) for column in zip(*dense, strict=True))
            ours = lines[point.arm.name, clip]
            values = [sign * (ours.value(self.target.quality) or 0.0), sign * self.target.value]
            same, goal = np.interp(values, np.maximum.accumulate(ladder), works, right=self.own)
            losses.append(ours.work / same * goal + max(goal - same, (same - goal) / 2))
        return float(np.mean(losses))

    def chosen(self, points: Sequence[Measurement]) -> Measurement:
        """Return the cheapest setting that meets the target by a standard error, else by its mean, else the nearest."""
        target = self.target
        worse = [dataclasses.replace(point, quality=point.quality - target.sign * point.error) for point in points]
        sure = [point for point, low in zip(points, worse, strict=True) if not target.missed(low)]
        return min(points if target.name == SPEEDUP else sure or points, key=target.rank)

    def judged(self, points: Sequence[Measurement], by_hand: Sequence[Arm] = ()) -> Measurement:
        """Return the choice as measured on the held-out prompts, or the best by hand where that is better there."""
        hand = [point for point in points if point.arm in by_hand]
        arms = {point.arm.name: point.arm for point in (self.chosen(points), *([self.chosen(hand)] if hand else []))}
        self.stages.stage(f"judging {' and '.join(arms)} on {len(self.prompts.held)} held-out prompts")
        best = min(self.measured(list(arms.values()), self.prompts.held), key=self.target.rank)
        if self.target.missed(best):
            goal = f"{self.target.name} {self.target.value:g} on {len(self.prompts.held)} held-out prompts"
            near = f"{best.arm.name} with {self.target.quality} {best.quality:.4g}, speed-up {best.speedup:.2f}"
            raise ConfigError(f"no setting reached {goal}; nearest came {near}; ask for less, or more by --space")
        return best


def _kind(arm: Arm) -> str:
    """Return what settings have in common that differ in their steps alone."""
    return json.dumps({**arm.to_dict(), "num_inference_steps": None}, sort_keys=True)


def least_work(arm: Arm) -> float:
    """Return the least that a setting can cost, in dense steps: its own, fewer where a method skips some."""
    return arm.num_inference_steps * (CACHED_LEAST if arm.methods else 1.0)
