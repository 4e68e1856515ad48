"""Tunes a whole pipeline: among solvers, steps, caches and sparse attention the cheapest setting that meets a target.

At most half of the settings are run, those set by hand first, then what optuna proposes: all on two prompts, those that
are not behind on more. What one costs and how near it comes to the converged run is measured as `eval run` does, into
result lines from which a run that was stopped goes on and of which `eval report` makes a page. The choice is judged
once, on prompts that the search never saw, beside the best setting by hand, and written where it meets the target.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel_assets import model_defaults, model_names
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import EMBEDDED, Request

from dit_accel.errors import ConfigError
from dit_accel.estimate.tuned import Measured, keep_tuned, model_key, tuned_text
from dit_accel.files import check_writable, written_whole
from dit_accel.methods.caches.native import DiffusersCache

from ..runs.conditions import Machine, OwnClips
from ..runs.loaded import SIZES, check_given, embedded_prompts
from ..runs.model import OWN
from ..runs.results import read_lines
from ..statistics import FEWEST
from ..suites.arms import Arm
from ..suites.job import SCALES, Job, call_of
from ..suites.reference import default_cache
from ..suites.suite import Suite, read_suite
from .base import Table, Tuned
from .pipeline_search import Point, Prompts, Search, Target, pareto, read_target, split
from .space import BY_HAND, default_space, guided_space, space_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedPipeline(Tuned):
    """What `tune_pipeline` found and wrote.

    Attributes:
        output: the config.
        kept: its copy in the user's cache, where `dit_accel.recommend` finds it.
        target: what was asked for.
        chosen: the setting, as it was measured on the held-out prompts.
        frontier: the settings on all prompts of the search that none surpasses at as little work, cheapest first.
        tried: how many settings were run, and how many there are.
    """

    output: Path
    kept: Path
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
            f"{chosen.arm.name}: {self.target.quality} {chosen.quality:.4g} {_interval(chosen)}, speed-up "
            f"{chosen.speedup:.2f} over {chosen.prompts} held-out prompts, of which none chose it; asked was "
            f"{self.target.name} {self.target.value:g}",
            f"`dit-accel recommend` lists it first for this model, from {self.kept}",
            f"tried {self.tried[0]} of {self.tried[1]} settings",
        ]
        return columns, rows, remarks

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "output": str(self.output),
            "kept": str(self.kept),
            "target": dataclasses.asdict(self.target),
            "chosen": _plain(self.chosen),
            "frontier": [_plain(point) for point in self.frontier],
            "tried": list(self.tried),
        }


def _interval(point: Point) -> str:
    """Return the interval of a setting's quality in words."""
    if point.interval is None:
        return f"(no interval: it takes {FEWEST} prompts)"
    return f"[{point.interval[0]:.4g}, {point.interval[1]:.4g}]"


def _plain(point: Point) -> dict[str, Any]:
    return {"arm": point.arm.name, **point.arm.to_dict(), **{
        key: getattr(point, key) for key in ("prompts", "quality", "interval", "work", "speedup")
    }}  # fmt: skip


def tune_pipeline(
    request: Request,
    output: Path,
    *,
    target: str | None = None,
    space: Path | None = None,
    try_guidance: Sequence[float] = (),
    cache: Path | None = None,
    stages: Stages | None = None,
) -> TunedPipeline:
    """Search, and verify on held-out prompts; a target that no setting meets is refused, and nothing is written.

    Args:
        request: the model, the size and the prompts, half of which are held out; of an embedded model its own prompts
            where none are given. A seed other than 0 is every prompt's, else each has its place as seed.
        output: TOML of the methods and the run, for ``generate --config``; ``.runs.jsonl`` lies beside it.
            `dit_accel.recommend` finds a copy in the user's cache.
        target: what to meet, see `read_target`.
        space: suite whose arms are tried; None: `default_space`.
        try_guidance: guidance scales that every setting is tried with besides the run's own, all held against the
            converged run of that.
        cache: folder of dense runs; None: the user's.
        stages: progress; None shows none.
    """
    if target is None:
        raise ConfigError("tune pipeline needs a target; give, say, --target psnr=30 or --target speedup=2")
    requested, model = read_target(target), request.model or EMBEDDED
    _check(request, output)
    suite, prompts = _suite(request, model, requested)
    arms = guided_space(_space(space, suite, request), _guidance(suite, try_guidance))
    suite = dataclasses.replace(suite, arms=arms)
    job = Job(
        suite=suite, out=output.with_suffix(".runs.jsonl"), cache=cache or default_cache(), timed=False, talk=False,
        threads=1 if suite.embedded else None, machine=Machine(device=request.device, offload=request.offload),
    )  # fmt: skip
    own = _own_steps(request, suite)
    search = Search(job=job, target=requested, stages=stages or Stages(quiet=True), own=own, prompts=prompts)
    runs, steps = search.cost(arms)
    search.stages.note(
        f"{len(arms)} settings: about {runs} runs, {steps} steps, besides converged and dense runs of "
        f"{prompts.rounds[-1]} + {prompts.held} prompts"
    )
    by_hand = () if space else [arm for arm in arms if arm.name in BY_HAND]
    whole = search.tried(arms, by_hand)
    frontier, chosen = pareto(whole, search.target.sign), search.judged(whole, by_hand)
    kept = _write(output, chosen, requested, _measured(request, suite, requested, chosen, own))
    tried = {line["arm"] for line in read_lines(job.out)} & {arm.name for arm in arms}
    return TunedPipeline(
        output=output, kept=kept, target=requested, chosen=chosen, frontier=tuple(frontier),
        tried=(len(tried), len(arms)),
    )  # fmt: skip


def _check(request: Request, output: Path) -> None:
    if request.methods:
        named = ", ".join(method.name for method in request.methods)
        raise ConfigError(f"tune pipeline chooses the methods itself, got {named}; leave them out, or give --space")
    if output.suffix != ".toml":
        raise ConfigError(f"the config must be a .toml, got {output}")
    for path, what in ((output, "the config"), (output.with_suffix(".runs.jsonl"), "the runs")):
        check_writable(path, what)


def _suite(request: Request, model: str, target: Target) -> tuple[Suite, Prompts]:
    """Return what is run, without arms, and which of its clips are searched and held out."""
    extra = () if target.quality in ("psnr", "ssim", "score") else (target.quality,)
    suite = Suite(
        name="tune-pipeline", model=model, clips=1, arms=(), call=_call(request), metrics=extra,
        dtype=None if model in model_names() else request.dtype,
    )  # fmt: skip
    if suite.embedded and request.prompts == embedded_prompts(model, len(request.prompts)):
        return suite, Prompts()
    if not suite.embedded:
        check_given(suite.source)
    if target.quality == "score":
        raise ConfigError(
            f"--target {target.name}: the judge knows held-out prompts of embedded models alone; ask for psnr, or name "
            "a metric"
        )
    prompts = split(len(request.prompts))
    own = OwnClips(prompts=request.prompts, seeds=(request.seed,) if request.seed else ())
    return dataclasses.replace(suite, own=own, clips=len(own)), prompts


def _space(path: Path | None, suite: Suite, request: Request) -> tuple[Arm, ...]:
    if path is None:
        if suite.embedded:
            return default_space(suite.model)
        return space_of(_own_steps(request, suite), *check_given(suite.source)[0].identify())
    requested = read_suite(path)
    if requested.model != suite.model:
        raise ConfigError(
            f"{path} is a suite of {requested.model}, and {suite.model} is tuned; name a suite of its own"
        )
    for arm in requested.arms:
        native = any(isinstance(method, DiffusersCache) for method in arm.methods)
        if arm.call or arm.guider or arm.scheduler or native:
            raise ConfigError(
                f"{path}: arm {arm.name!r} can't be written as a config; leave out its call, guider, scheduler and "
                "diffusers"
            )
    return requested.arms


def _guidance(suite: Suite, scales: Sequence[float]) -> dict[str, dict[str, float]]:
    """Return words for a guidance scale, a finite number -> the arguments of the call that set it."""
    if not scales:
        return {}
    if not all(math.isfinite(scale) for scale in scales):
        raise ConfigError(f"--try-guidance {list(scales)} has no finite number; write, say, --try-guidance 1")
    taken = call_of(suite, {**suite.call, "guidance_scale": 1.0})
    keys = [key for key in SCALES if key == "guidance_scale" or (suite.embedded and key in taken)]
    return {f"guidance {scale:g}": dict.fromkeys(keys, float(scale)) for scale in dict.fromkeys(scales)}


def _call(request: Request) -> dict[str, Any]:
    return {key: value for key in ("height", "width", "num_frames", "guidance_scale", "negative_prompt")
            if (value := getattr(request, key)) is not None}  # fmt: skip


def _own_steps(request: Request, suite: Suite) -> int:
    if request.num_inference_steps:
        return request.num_inference_steps
    if suite.embedded:
        return int(model_defaults(suite.model)["num_inference_steps"])
    return check_given(suite.source)[1].num_inference_steps


def _measured(request: Request, suite: Suite, target: Target, chosen: Point, own: int) -> Measured:
    """Return how the choice came out, and at which size."""
    family = None if suite.embedded else check_given(suite.source)[1]
    known = model_defaults(suite.model) if family is None else {name: getattr(family, name) for name in SIZES}
    size = {name: int(getattr(request, name) or known.get(name) or 1) for name in SIZES}
    return Measured(
        model=model_key(suite.model), **size, num_inference_steps=own, metric=target.quality,
        quality=round(float(chosen.quality), 4), speedup=round(float(chosen.speedup), 4), prompts=chosen.prompts,
    )  # fmt: skip


def _write(output: Path, chosen: Point, target: Target, measured: Measured) -> Path:
    """Write the config, and its copy for `dit_accel.recommend`; returns that."""
    arm = chosen.arm
    run_table: dict[str, Any] = {"num_inference_steps": arm.num_inference_steps}
    if arm.solver != OWN:
        run_table["solver"] = arm.solver
    if "guidance_scale" in arm.call:
        run_table["guidance_scale"] = arm.call["guidance_scale"]
    if arm.flow_shift is not None:
        run_table["flow_shift"] = arm.flow_shift
    text = tuned_text(arm.methods, run_table, measured, arm.name)
    with written_whole(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    size = f"{measured.width}x{measured.height}x{measured.num_frames}"
    goal = re.sub(r"[^\w.=-]", "-", f"{target.name}={target.value:g}")
    return keep_tuned(f"{goal}-{size}-{measured.num_inference_steps}.toml", text, measured.model)
