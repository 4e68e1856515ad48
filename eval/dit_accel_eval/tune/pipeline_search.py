"""The search of `tune pipeline`: few prompts for all settings, more for the best, held-out ones for the choice."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from dit_accel_pipelines.generation.progress import Stages

from dit_accel.errors import ConfigError, did_you_mean

from ..metrics.registered import described, metric, metrics
from ..runs.loaded import FIRST_PROMPT
from ..runs.results import Line, latest, read_lines
from ..statistics import estimate
from ..suites.arms import Arm
from ..suites.compare import run
from ..suites.comparison import value_of
from ..suites.job import Job

ROUNDS = (2, 4, 6)
"""Prompts on which each round's settings are measured, those of the round before among them."""

KEPT = (12, 6)
"""Settings that go on after each round but the last."""

SPARE = 1.5
"""Times the work of the cheapest setting that meets the target on few prompts which others may need."""

BAND = 0.15
"""Share of a target by which a setting may be off on few prompts without being the further from it."""

CHUNK = 8
"""Settings between two looks at which of the dearer ones can still win."""

CACHED_LEAST = 0.25
"""Share of its steps that a setting with a cache computes at least: its cost is not known beforehand."""

UNGUIDED = 0.5
"""Share of a guided step that one without guidance computes: it leaves the negative prompt out."""

HELD_OUT, HELD_OUT_FIRST = 6, FIRST_PROMPT + 32
"""Prompts on which the choice is verified, and the first of them."""

FEWEST_PROMPTS = 4
"""Prompts of one's own that a search takes at least: half of them are held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Which clips a search looks at, by their numbers.

    Attributes:
        first: the first of those on which settings are searched.
        rounds: how many each round has.
        held_first: the first of those on which the choice is verified.
        held: how many these are.
    """

    first: int = FIRST_PROMPT
    rounds: tuple[int, ...] = ROUNDS
    held_first: int = HELD_OUT_FIRST
    held: int = HELD_OUT

    def searched(self, place: int) -> range:
        """Return the clips of a round, counted from 0; the last is -1."""
        return range(self.first, self.first + self.rounds[place])

    def verified(self) -> range:
        """Return the held-out clips."""
        return range(self.held_first, self.held_first + self.held)


def split(count: int) -> Prompts:
    """Return how `FEWEST_PROMPTS` or more of one's own are shared out: half is searched, the second half held out."""
    if count < FEWEST_PROMPTS:
        raise ConfigError(
            f"tune pipeline takes {FEWEST_PROMPTS} prompts at least, half of them held out, got {count}; give more "
            "with --prompt or --prompt-file"
        )
    half = min(ROUNDS[-1], count // 2)
    rounds = tuple(dict.fromkeys(min(prompts, half) for prompts in ROUNDS))
    return Prompts(first=0, rounds=rounds, held_first=half, held=min(HELD_OUT, count - half))


UNMEASURED = ("skipped", "unavailable")
"""What result lines call the metrics that have no value, with the reasons."""

SPEEDUP = "speedup"
NICKNAMES = {"checker": "score", "lpips": "lpips@alex", "dists": "dists@vgg"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked for.

    Attributes:
        name: ``speedup``, ``score`` or a metric's name.
        value: what it must be at least; at most where less is better.
    """

    name: str
    value: float

    @property
    def quality(self) -> str:
        """The metric by which settings are compared: PSNR where a speed-up is asked for."""
        return "psnr" if self.name == SPEEDUP else self.name

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        found = described(self.quality)
        return -1 if found and found.better == "less" else 1

    def missed(self, point: "Point") -> float:
        """Return by how much a setting misses the target; 0 if it meets it."""
        found = point.speedup if self.name == SPEEDUP else self.sign * point.quality
        requested = self.value if self.name == SPEEDUP else self.sign * self.value
        return max(0.0, requested - found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A setting as it was measured.

    Attributes:
        arm: the setting.
        prompts: on how many.
        quality: mean of the target's metric, or PSNR.
        interval: of that mean, 95 %; None of few prompts.
        work: mean, in steps of the dense model.
        speedup: steps of the model's own dense run over that.
    """

    arm: Arm
    prompts: int
    quality: float
    work: float
    speedup: float
    interval: tuple[float, float] | None = None


def read_target(text: str) -> Target:
    """Read a target, such as ``psnr=30``, ``lpips=0.1`` or ``speedup=2``; raises `ConfigError` for any other."""
    name, equals, value = text.rpartition("=")
    name = NICKNAMES.get(name, name)
    if not equals:
        raise ConfigError(f"--target {text!r} is not NAME=VALUE; write, say, --target psnr=30 or --target speedup=2")
    if name not in (SPEEDUP, "score"):
        known = {*metrics(), SPEEDUP, "score", *NICKNAMES}
        if name not in known and described(name) is None:
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
    """A search under way.

    Attributes:
        job: what runs settings, and where their lines go.
        target: what is asked for.
        stages: shows each round.
        own: steps of the model's own dense run, against which speed-ups count.
        prompts: which clips are looked at.
    """

    job: Job
    target: Target
    stages: Stages
    own: int
    prompts: Prompts = field(default_factory=Prompts)

    def last_round(self) -> list[Line]:
        """Return the lines of the last round's prompts, of the settings that have all of them."""
        prompts = self.prompts.searched(-1)
        known = [line for line in latest(read_lines(self.job.out)).values() if line["clip"] in prompts]
        counts = Counter(line["arm"] for line in known)
        return [line for line in known if counts[line["arm"]] == len(prompts)]

    def measured(self, arms: Sequence[Arm], prompts: Sequence[int]) -> list[Point]:
        """Return settings as measured on prompts, made or found again."""
        run(dataclasses.replace(self.job, suite=dataclasses.replace(self.job.suite, arms=tuple(arms))), prompts)
        known = latest(read_lines(self.job.out))
        points = []
        for arm in arms:
            lines = [known[arm.name, prompt] for prompt in prompts]
            values = [value for line in lines if (value := value_of(line, self.target.quality)) is not None]
            if len(values) < len(lines):
                reasons = (line.get(key, {}).get(self.target.quality) for line in lines for key in UNMEASURED)
                reason = next(filter(None, reasons), "it has no value")
                raise ConfigError(f"{self.target.quality} can't be measured here: {reason}; name another target")
            work, found = float(np.mean([line["work"] for line in lines])), estimate(values)
            points.append(
                Point(
                    arm=arm, prompts=len(prompts), work=work, speedup=self.own / work, quality=found.mean,
                    interval=None if found.low is None or found.high is None else (found.low, found.high),
                )
            )  # fmt: skip
        return points

    def frontier(self, arms: Sequence[Arm]) -> list[Point]:
        """Return the last round's settings that none surpasses at as little work, cheapest first."""
        points = self.first_round(arms)
        rounds = self.prompts.rounds
        for number, prompts in enumerate(rounds[1:], 1):
            kept = self.nearest(points, KEPT[number - 1])
            self.stages.stage(f"round {number + 1} of {len(rounds)}: {len(kept)} settings on {prompts} prompts")
            points = self.measured([point.arm for point in kept], self.prompts.searched(number))
        return pareto(points, self.target.sign)

    def cost(self, arms: Sequence[Arm]) -> tuple[int, int]:
        """Return the most runs that the search takes, and their denoising steps, besides converged and dense runs."""
        steps = sorted((arm.num_inference_steps for arm in arms), reverse=True)
        rounds = self.prompts.rounds
        later = zip(KEPT, np.diff(rounds).tolist(), strict=False)
        stages = [(len(arms), rounds[0]), *later, (KEPT[-1], self.prompts.held)]
        runs = [(prompts, one) for count, prompts in stages for one in steps[:count]]
        return sum(prompts for prompts, _ in runs), sum(prompts * one for prompts, one in runs)

    def first_round(self, arms: Sequence[Arm]) -> list[Point]:
        """Return all settings that might win, measured on the first prompts, from the cheapest on.

        Once a setting meets the target, those that must cost `SPARE` times as much are left out: other prompts may be
        harder. Where a speed-up is asked for, those that can't reach it are.
        """
        left, points = sorted(arms, key=least_work), list[Point]()
        prompts = self.prompts.searched(0)
        while left:
            most = self.most_work(points)
            chunk = [arm for arm in left if max(least_work(arm), known_work(arm, points)) <= most][:CHUNK]
            if not chunk:
                break
            rounds = len(self.prompts.rounds)
            self.stages.stage(f"round 1 of {rounds}: {len(points) + len(chunk)} of at most {len(arms)} settings")
            points += self.measured(chunk, prompts)
            left = [arm for arm in left if arm not in chunk]
        if not points:
            raise ConfigError(
                f"no setting can be {self.target.value:g} times as fast as {self.own} dense steps; ask for less"
            )
        return points

    def most_work(self, points: Sequence[Point]) -> float:
        """Return the work above which no setting can win any more."""
        if self.target.name == SPEEDUP:
            return self.own / self.target.value
        return SPARE * min((point.work for point in points if not self.target.missed(point)), default=math.inf)

    def nearest(self, points: Sequence[Point], count: int) -> list[Point]:
        """Return the settings that go on: those nearest to the target and to the best at as little work.

        Prompts differ more than settings do, so that few of them show which settings are good, but not yet which meet
        the target. Where a speed-up is asked for, those of the best quality that reach it go on.
        """
        sign = self.target.sign
        if self.target.name == SPEEDUP:
            return self.by_cost(points)[:count]

        def away(point: Point) -> float:
            best = max(sign * other.quality for other in points if other.work <= point.work)
            beyond = abs(point.quality - self.target.value) - BAND * abs(self.target.value)
            return best - sign * point.quality + max(0.0, beyond)

        return sorted(points, key=away)[:count]

    def by_cost(self, points: Sequence[Point]) -> list[Point]:
        """Return the settings in the order of choice: what meets the target, the cheapest first, then the nearest.

        Where a speed-up is asked for, the best first.
        """
        if self.target.name == SPEEDUP:
            return sorted(points, key=lambda p: (self.target.missed(p), -self.target.sign * p.quality))
        return sorted(points, key=lambda p: (self.target.missed(p), p.work))

    def verified(self, frontier: Sequence[Point]) -> Point:
        """Return the first choice that meets the target on the held-out prompts, as measured there.

        Raises:
            ConfigError: if none does, with the nearest.
        """
        prompts = self.prompts.verified()
        found = []
        for point in self.by_cost(frontier):
            self.stages.stage(f"verifying {point.arm.name} on {self.prompts.held} held-out prompts")
            (held,) = self.measured([point.arm], prompts)
            if not self.target.missed(held):
                return held
            found.append(held)
        nearest = min(found, key=self.target.missed)
        message = f"{self.target.quality} {nearest.quality:.4g} and a speed-up of {nearest.speedup:.2f}"
        raise ConfigError(
            f"no setting reached {self.target.name} {self.target.value:g} on {self.prompts.held} held-out prompts; "
            f"nearest came {nearest.arm.name} with {message}; ask for less, or give more settings with --space"
        )


def least_work(arm: Arm) -> float:
    """Return the least that a setting can cost, in dense steps: its own, fewer where a method or guidance skips."""
    return arm.num_inference_steps * (CACHED_LEAST if arm.methods else 1.0) * (UNGUIDED if arm.call else 1.0)


def known_work(arm: Arm, points: Sequence[Point]) -> float:
    """Return the most work that the same methods took with fewer steps, which a setting can't well undercut."""
    same = [
        point.work
        for point in points
        if (point.arm.methods, point.arm.call) == (arm.methods, arm.call)
        and point.arm.num_inference_steps <= arm.num_inference_steps
    ]
    return max(same, default=0.0)


def pareto(points: Sequence[Point], sign: int) -> list[Point]:
    """Return the points that none surpasses at as little work, cheapest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.work, -sign * p.quality)):
        if not found or sign * point.quality > sign * found[-1].quality:
            found.append(point)
    return found
