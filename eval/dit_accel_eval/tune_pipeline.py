"""Tunes a whole pipeline: among solvers, steps, caches and sparse attention the cheapest setting that meets a target.

Settings are tried from the cheapest on, all on one prompt, the best of them on more; what a setting costs and how near
it comes to the converged run is measured as `eval run` does, into result lines from which a run that was stopped goes
on and of which `eval report` makes a page. What is written met the target on prompts that the search never saw.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_assets import model_defaults
from dit_accel_pipelines.progress import Stages
from dit_accel_pipelines.request import EMBEDDED, Request

from dit_accel.errors import ConfigError, did_you_mean
from dit_accel.files import check_writable, written_whole
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.toml import to_toml

from .compare import Job, run
from .comparison import figures_of, value_of
from .metrics.registry import metric, metrics
from .plots import draw
from .reference import default_cache
from .results import Line, latest, read_lines
from .suite import Arm, Suite, read_suite
from .tune_space import default_space
from .tuning import FIRST_PROMPT, Table

ROUNDS = (1, 2, 4)
"""Prompts on which each round's settings are measured, those of the round before among them."""

SLACK = (0.08, 0.04, 0.0)
"""Share of a target by which a setting may miss it in each round and still be looked at: few prompts tell little."""

KEPT = (8, 4)
"""Settings that go on after each round but the last."""

CHUNK = 8
"""Settings between two looks at which of the dearer ones can still win."""

CACHED_LEAST = 0.25
"""Share of its steps that a setting with a cache computes at least: its cost is not known beforehand."""

HELD_OUT, HELD_OUT_FIRST = 6, FIRST_PROMPT + 32
"""Prompts on which the choice is verified, and the first of them."""

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
        """The metric by which settings are told apart: PSNR where a speed-up is asked for."""
        return "psnr" if self.name == SPEEDUP else self.name

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return -1 if self.quality in metrics() and metrics()[self.quality].better == "less" else 1

    def missed(self, point: "Point", slack: float = 0.0) -> float:
        """Return by how much a setting misses the target, slack allowed; 0 if it meets it."""
        found = point.speedup if self.name == SPEEDUP else self.sign * point.quality
        asked = self.value if self.name == SPEEDUP else self.sign * self.value
        return max(0.0, asked - abs(asked) * slack - found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A setting as it was measured.

    Attributes:
        arm: the setting.
        prompts: on how many.
        quality: mean of the target's metric, or PSNR.
        work: mean, in steps of the dense model.
        speedup: steps of the model's own dense run over that.
    """

    arm: Arm
    prompts: int
    quality: float
    work: float
    speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedPipeline:
    """What `tune_pipeline` found and wrote.

    Attributes:
        output: the config.
        target: what was asked for.
        chosen: the setting, as it was measured on the held-out prompts.
        frontier: the settings of the last round that none surpasses at as little work, cheapest first.
        tried: how many settings were run, and how many there are.
    """

    output: Path
    target: Target
    chosen: Point
    frontier: tuple[Point, ...]
    tried: tuple[int, int]

    def table(self) -> Table:
        """Return the Pareto set, and what was chosen."""
        columns = ("setting", self.target.quality, "work in dense steps", "speed-up")
        rows = [(p.arm.name, f"{p.quality:.4g}", f"{p.work:.2f}", f"{p.speedup:.2f}") for p in self.frontier]
        chosen = self.chosen
        remarks = [
            f"{chosen.arm.name}: {self.target.quality} {chosen.quality:.4g}, speed-up {chosen.speedup:.2f} over "
            f"{chosen.prompts} held-out prompts; asked was {self.target.name} {self.target.value:g}",
            f"tried {self.tried[0]} of {self.tried[1]} settings; the others can't be cheaper, or missed by far",
        ]
        return columns, rows, remarks

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "output": str(self.output),
            "target": dataclasses.asdict(self.target),
            "chosen": _plain(self.chosen),
            "frontier": [_plain(point) for point in self.frontier],
            "tried": list(self.tried),
        }


def _plain(point: Point) -> dict[str, Any]:
    return {"arm": point.arm.name, **point.arm.to_dict(), **{
        key: getattr(point, key) for key in ("prompts", "quality", "work", "speedup")
    }}  # fmt: skip


def read_target(text: str) -> Target:
    """Read a target, such as ``psnr=30``, ``lpips=0.1`` or ``speedup=2``.

    Raises:
        ConfigError: for another form, an unknown name, with the nearest, one that is no target, or no number.
    """
    name, equals, value = text.partition("=")
    name = NICKNAMES.get(name, name)
    if not equals:
        raise ConfigError(f"--target {text!r} is not NAME=VALUE; write, say, --target psnr=30 or --target speedup=2")
    if name not in (SPEEDUP, "score"):
        known = {*metrics(), SPEEDUP, "score", *NICKNAMES}
        if name not in known:
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


def tune_pipeline(
    request: Request,
    output: Path,
    *,
    target: str | None = None,
    space: Path | None = None,
    cache: Path | None = None,
    stages: Stages | None = None,
) -> TunedPipeline:
    """Search, verify on held-out prompts, write the config and a plot beside it, and return what was found.

    Args:
        request: the model and the size; prompts are the model's own.
        output: TOML of the methods and the run, for ``generate --config``; ``.runs.jsonl`` and ``.png`` lie beside it.
        target: what to meet, see `read_target`.
        space: suite whose arms are tried; None: `default_space`.
        cache: folder of dense runs; None: the user's.
        stages: progress; None shows none.

    Raises:
        ConfigError: for what can't be tuned, results of another run beside ``output``, or a target that no setting
            meets; then nothing is written.
    """
    if target is None:
        raise ConfigError("tune pipeline needs a target; give, say, --target psnr=30 or --target speedup=2")
    asked, model = read_target(target), request.model or EMBEDDED
    _check(request, output, model)
    arms = _space(space, model)
    extra = () if asked.quality in ("psnr", "ssim", "score") else (asked.quality,)
    suite = Suite(name="tune-pipeline", model=model, clips=1, arms=arms, call=_call(request), metrics=extra)
    job = Job(
        suite=suite, out=output.with_suffix(".runs.jsonl"), cache=cache or default_cache(), timed=False, threads=1,
        talk=False,
    )  # fmt: skip
    search = Search(job=job, target=asked, stages=stages or Stages(quiet=True), own=_own_steps(request, model))
    frontier = search.frontier(arms)
    chosen = search.verified(frontier)
    _write(output, chosen.arm)
    draw(figures_of(search.lines(), [arm.name for arm in arms if not arm.is_dense]), f"{model}: {target}",
         output.with_suffix(".png"))  # fmt: skip
    tried = {line["arm"] for line in search.lines()} & {arm.name for arm in arms}
    return TunedPipeline(
        output=output, target=asked, chosen=chosen, frontier=tuple(frontier), tried=(len(tried), len(arms))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search under way.

    Attributes:
        job: what runs settings, and where their lines go.
        target: what is asked for.
        stages: is told each round.
        own: steps of the model's own dense run, against which speed-ups count.
    """

    job: Job
    target: Target
    stages: Stages
    own: int

    def lines(self) -> list[Line]:
        """Return the result lines so far."""
        return read_lines(self.job.out)

    def measured(self, arms: Sequence[Arm], prompts: Sequence[int]) -> list[Point]:
        """Return settings as measured on prompts, made or found again."""
        run(dataclasses.replace(self.job, suite=dataclasses.replace(self.job.suite, arms=tuple(arms))), prompts)
        known = latest(self.lines())
        points = []
        for arm in arms:
            lines = [known[arm.name, prompt] for prompt in prompts]
            values = [value_of(line, self.target.quality) for line in lines]
            if None in values:
                raise ConfigError(
                    f"{self.target.quality} can't be measured here: {self._why(lines)}; name another target"
                )
            work = float(np.mean([line["work"] for line in lines]))
            points.append(
                Point(
                    arm=arm, prompts=len(prompts), work=work, speedup=self.own / work,
                    quality=float(np.mean([value for value in values if value is not None])),
                )
            )  # fmt: skip
        return points

    def _why(self, lines: Sequence[Line]) -> str:
        told = [line.get(key, {}).get(self.target.quality) for line in lines for key in ("skipped", "unavailable")]
        return next((reason for reason in told if reason), "it has no value")

    def frontier(self, arms: Sequence[Arm]) -> list[Point]:
        """Return the last round's settings that none surpasses at as little work, cheapest first."""
        points = self.first_round(arms)
        for number, prompts in enumerate(ROUNDS[1:], 1):
            kept = self.best(points, KEPT[number - 1], SLACK[number - 1])
            self.stages.stage(f"round {number + 1} of {len(ROUNDS)}: {len(kept)} settings on {prompts} prompts")
            points = self.measured([point.arm for point in kept], range(FIRST_PROMPT, FIRST_PROMPT + prompts))
        return pareto(points, self.target.sign)

    def first_round(self, arms: Sequence[Arm]) -> list[Point]:
        """Return all settings that might win, measured on the first prompts, from the cheapest on.

        Once a setting meets the target with what the round allows, those that can't be cheaper are left out; where a
        speed-up is asked for, those that can't reach it are.
        """
        left, points = sorted(arms, key=least_work), list[Point]()
        prompts = range(FIRST_PROMPT, FIRST_PROMPT + ROUNDS[0])
        while left:
            most = self.most_work(points)
            chunk = [arm for arm in left if least_work(arm) <= most][:CHUNK]
            if not chunk:
                break
            self.stages.stage(f"round 1 of {len(ROUNDS)}: {len(points) + len(chunk)} of at most {len(arms)} settings")
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
        met = [point.work for point in points if not self.target.missed(point, -SLACK[0])]  # with something to spare
        return min(met, default=math.inf)

    def best(self, points: Sequence[Point], count: int, slack: float) -> list[Point]:
        """Return the settings that go on: the cheapest that meet the target with slack, then the nearest to it.

        Where a speed-up is asked for, those of the best quality that reach it.
        """
        if self.target.name == SPEEDUP:
            return sorted(points, key=lambda p: (self.target.missed(p, slack), -p.quality))[:count]
        return sorted(points, key=lambda p: (self.target.missed(p, slack), p.work))[:count]

    def verified(self, frontier: Sequence[Point]) -> Point:
        """Return the first choice that meets the target on the held-out prompts, as measured there.

        Raises:
            ConfigError: if none does, with what came nearest.
        """
        prompts = range(HELD_OUT_FIRST, HELD_OUT_FIRST + HELD_OUT)
        found = []
        for point in self.best(frontier, len(frontier), 0.0):
            self.stages.stage(f"verifying {point.arm.name} on {HELD_OUT} held-out prompts")
            (held,) = self.measured([point.arm], prompts)
            if not self.target.missed(held):
                return held
            found.append(held)
        nearest = min(found, key=self.target.missed)
        told = f"{self.target.quality} {nearest.quality:.4g} and a speed-up of {nearest.speedup:.2f}"
        raise ConfigError(
            f"no setting reached {self.target.name} {self.target.value:g} on {HELD_OUT} held-out prompts; nearest came "
            f"{nearest.arm.name} with {told}; ask for less, or give more settings with --space"
        )


def least_work(arm: Arm) -> float:
    """Return the least that a setting can cost, in dense steps: its own, fewer where a method skips."""
    return arm.num_inference_steps * (CACHED_LEAST if arm.methods else 1.0)


def pareto(points: Sequence[Point], sign: int) -> list[Point]:
    """Return the points that none surpasses at as little work, cheapest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.work, -sign * p.quality)):
        if not found or sign * point.quality > sign * found[-1].quality:
            found.append(point)
    return found


def _check(request: Request, output: Path, model: str) -> None:
    from .embedded import check_name

    check_name(model)
    if request.methods:
        named = ", ".join(method.name for method in request.methods)
        raise ConfigError(f"tune pipeline chooses the methods itself, got {named}; leave them out, or give --space")
    if output.suffix != ".toml":
        raise ConfigError(f"the config must be a .toml, got {output}")
    for path, what in ((output, "the config"), (output.with_suffix(".runs.jsonl"), "the runs")):
        check_writable(path, what)


def _space(path: Path | None, model: str) -> tuple[Arm, ...]:
    if path is None:
        return default_space(model)
    suite = read_suite(path)
    if suite.model != model:
        raise ConfigError(f"{path} is a suite of {suite.model}, and {model} is tuned; name a suite of its own")
    for arm in suite.arms:
        if arm.call or any(isinstance(method, DiffusersCache) for method in arm.methods):
            raise ConfigError(
                f"{path}: arm {arm.name!r} can't be written as a config; leave out its call and diffusers"
            )
    return suite.arms


def _call(request: Request) -> dict[str, Any]:
    return {key: value for key in ("height", "width", "num_frames", "guidance_scale")
            if (value := getattr(request, key)) is not None}  # fmt: skip


def _own_steps(request: Request, model: str) -> int:
    return request.num_inference_steps or int(model_defaults(model)["num_inference_steps"])


def _write(output: Path, arm: Arm) -> None:
    run_table: dict[str, Any] = {"num_inference_steps": arm.num_inference_steps, "solver": arm.solver}
    if arm.flow_shift is not None:
        run_table["flow_shift"] = arm.flow_shift
    with written_whole(output) as temporary:
        temporary.write_text(
            f"# {arm.name}, by dit-accel tune pipeline\n{to_toml(arm.methods, run_table)}", encoding="utf-8"
        )
