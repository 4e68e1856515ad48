"""Tunes a whole pipeline: among solvers, steps, caches and sparse attention the cheapest setting that meets a target.

Settings are measured as `eval run` does. The choice is judged once, on prompts that the search never saw.
"""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import EMBEDDED
from dit_accel_pipelines.generation.solvers import is_flow, shift_of

from dit_accel import MagCache, TeaCache
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.embedded import assets
from dit_accel.adapters.model_files import read_model_files
from dit_accel.errors import ConfigError
from dit_accel.estimate.tuned import TunedResult, keep_tuned, model_key, tuned_text
from dit_accel.files import check_writable, write_text
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.verdicts import refused_by

from ..runs.loaded import SIZES, Machine, OwnClips, TuningRequest, check_given, embedded_prompts
from ..runs.model import OWN, shipped_scheduler
from ..runs.results import result_lines
from ..statistics import FEWEST, frontier
from ..suites.arms import Arm, dense_arm, read_arms
from ..suites.job import Job
from ..suites.reference import default_cache
from ..suites.suite import Suite, read_suite
from .base import Tuned
from .pipeline_search import HELD_OUT_PROMPTS, Prompts, Search, Target, read_target, split

SPACE = Path(__file__).with_name("space.toml")
STEPS = (4, 5, 6, 8, 10, 12, 14, 16, 20)  # denoising steps that are tried; a model's own number is added
LARGER = (0.5, 0.6, 0.8)  # shares of a model's own number that are tried too, where that is far beyond `STEPS`
CALIBRATED = (TeaCache, MagCache)  # caches that are tried where their numbers are known for the model
EMBEDDED_TILES = 16  # tokens of a tile on embedded models; others have what the methods choose by themselves


def _tables() -> list[dict[str, Any]]:
    return tomllib.loads(SPACE.read_text(encoding="utf-8"))["arm"]


BY_HAND = frozenset(f"{table['name']} {steps}" for table in _tables() for steps in table.get("by_hand", ()))
"""Names of the settings that the search always runs."""


def default_space(model: str) -> tuple[Arm, ...]:
    """Return the settings that are tried on an embedded model where a user names none."""
    source, own = str(assets().model_path(model)), int(assets().model_defaults(model)["num_inference_steps"])
    return space_of(own, *read_model_files(source).identify(), scheduler=shipped_scheduler(source), tile=EMBEDDED_TILES)


def space_of(
    own: int, adapter: Adapter, family: Family, *, scheduler: Any = None, tile: int | None = None
) -> tuple[Arm, ...]:
    """Return the settings that are tried on a model: what it takes, without `ProfilingCache`, which takes a profile."""
    further = [round(share * own) for share in LARGER] if own > max(STEPS) else []
    usual = {*STEPS, *further, own}
    refused = refused_by(adapter)
    shifts = scheduler is not None and is_flow(scheduler.config)

    def taken(arm: Arm) -> bool:
        if arm.flow_shift is not None and not (shifts and arm.flow_shift != shift_of(scheduler)):
            return False
        known = (config.name in family.recipes or not isinstance(config, CALIBRATED) for config in arm.methods)
        return all(known) and not any(config.name in refused for config in arm.methods)

    def tiled(method: MethodConfig) -> MethodConfig:
        sized = tile is not None and isinstance(method, SparseConfig)
        return dataclasses.replace(method, block_size=tile) if sized else method

    arms = [dense_arm(steps) for steps in usual]
    arms += [dataclasses.replace(arm, methods=tuple(map(tiled, arm.methods))) for arm in _arms(usual) if taken(arm)]
    return tuple(sorted(arms, key=lambda arm: arm.num_inference_steps))


def _arms(usual: set[int]) -> tuple[Arm, ...]:
    """Return all settings, each with the usual numbers of steps from its first on, and those of README.md."""
    tables = _tables()
    for table in tables:
        first = table.pop("from", 0)
        steps = {*table.pop("by_hand", ()), *(count for count in usual if count >= first)}
        table["num_inference_steps"] = sorted(steps)
    return read_arms(tables, SPACE)


def tune_pipeline(
    request: TuningRequest, output: Path, *, target: str | None = None, space: Path | None = None,
    cache: Path | None = None, stages: Stages | None = None,
) -> Tuned:  # fmt: skip
    """Search, and verify on held-out prompts; a target that no setting meets is refused, and nothing is written.

    A seed other than 0 is every prompt's, else each has its place as seed. Found are the setting ``chosen``, as
    measured on the held-out prompts; the ``frontier`` of those that none surpasses at as little work; how many were
    ``tried``, of how many; and ``kept``, the copy of the config for `dit_accel.recommend`.
    """
    if target is None:
        raise ConfigError("tune pipeline needs a target; give, say, --target psnr=30 or --target speedup=2")
    requested, model = read_target(target), request.model or EMBEDDED
    if request.methods:
        named = ", ".join(method.name for method in request.methods)
        raise ConfigError(f"tune pipeline chooses the methods itself, got {named}; leave them out, or give --space")
    if output.suffix != ".toml":
        raise ConfigError(f"the config must be a .toml, got {output}")
    for file, what in ((output, "the config"), (output.with_suffix(".runs.jsonl"), "the runs")):
        check_writable(file, what)
    suite, prompts = _suite(request, model, requested)
    steps = _sizes(request, suite)["num_inference_steps"]
    arms = _space(space, suite, steps)
    suite = dataclasses.replace(suite, arms=arms)
    job = Job(
        suite=suite, out=output.with_suffix(".runs.jsonl"), cache=cache or default_cache(), timed=False, talk=False,
        threads=1 if suite.embedded else None, machine=Machine(device=request.device, offload=request.offload),
    )  # fmt: skip
    search = Search(job=job, target=requested, stages=stages or Stages(quiet=True), own=steps, prompts=prompts)
    search.stages.note(f"{len(arms)} settings: {search.cost(arms)}")
    by_hand = () if space else [arm for arm in arms if arm.name in BY_HAND]
    whole = search.tried(arms, by_hand)
    best = frontier(whole, lambda point: (point.work, requested.sign * point.quality))
    chosen = search.judged(whole, by_hand)
    measured = TunedResult(
        model=model_key(suite.model), **_sizes(request, suite), metric=requested.quality,
        quality=round(chosen.quality, 4), speedup=round(chosen.speedup, 4), prompts=chosen.prompts,
    )  # fmt: skip
    path = _write(output, chosen.arm, request.guidance_scale, requested, measured)
    ran = {line.arm for line in result_lines(job.out)} & {arm.name for arm in arms}
    interval = f"(no interval: it takes {FEWEST} prompts)"
    if chosen.interval is not None:
        interval = f"[{chosen.interval[0]:.4g}, {chosen.interval[1]:.4g}]"
    return Tuned(
        found={
            "kept": str(path), "target": dataclasses.asdict(requested), "chosen": chosen.to_dict(),
            "frontier": [point.to_dict() for point in best], "tried": [len(ran), len(arms)],
        },
        columns=("setting", requested.quality, "work in dense steps", "speed-up"),
        rows=[(point.arm.name, f"{point.quality:.4g}", f"{point.work:.2f}", f"{point.speedup:.2f}") for point in best],
        remarks=[
            f"{chosen.arm.name}: {requested.quality} {chosen.quality:.4g} {interval}, speed-up {chosen.speedup:.2f} "
            f"over {chosen.prompts} prompts that the search never saw; requested was {requested.name} "
            f"{requested.value:g}",
            f"`dit-accel recommend` lists it first for this model, from {path}",
            f"tried {len(ran)} of {len(arms)} settings",
        ],
    )  # fmt: skip


def _suite(request: TuningRequest, model: str, target: Target) -> tuple[Suite, Prompts]:
    """Return what is run, without arms, and which of its clips are searched and held out."""
    extra = () if target.quality in ("psnr", "ssim", "score") else (target.quality,)
    named = ("height", "width", "num_frames", "guidance_scale", "negative_prompt")
    call = {key: value for key in named if (value := getattr(request, key)) is not None}
    suite = Suite(name="tune-pipeline", model=model, clips=1, arms=(), call=call, metrics=extra)
    if suite.embedded and request.prompts == embedded_prompts(model, len(request.prompts)):
        return suite, HELD_OUT_PROMPTS
    if not suite.embedded:
        check_given(suite.source)
        suite = dataclasses.replace(suite, dtype=request.dtype)
    if target.quality == "score":
        known = "the judge knows held-out prompts of embedded models alone"
        raise ConfigError(f"--target {target.name}: {known}; ask for psnr, or name a metric")
    prompts = split(len(request.prompts))
    clips = OwnClips(prompts=request.prompts, seeds=(request.seed,) if request.seed else ())
    return dataclasses.replace(suite, own=clips, clips=len(clips)), prompts


def _space(path: Path | None, suite: Suite, steps: int) -> tuple[Arm, ...]:
    if path is None:
        if suite.embedded:
            return default_space(suite.model)
        adapter, family = check_given(suite.source)[0].identify()
        return space_of(steps, adapter, family, scheduler=shipped_scheduler(suite.source))
    requested = read_suite(path)
    if requested.model != suite.model:
        raise ConfigError(f"{path} is a suite of {requested.model}, and {suite.model} is tuned; name one of its own")
    for arm in requested.arms:
        native = any(isinstance(method, DiffusersCache) for method in arm.methods)
        if arm.call or arm.guider or arm.scheduler or arm.rival or native:
            unwritten = "its call, guider, scheduler, rival and diffusers"
            raise ConfigError(f"{path}: arm {arm.name!r} can't be written as a config; leave out {unwritten}")
    return requested.arms


def _sizes(request: TuningRequest, suite: Suite) -> dict[str, int]:
    """Return the output's size and the model's own number of steps: as requested, else the model's."""
    names = (*SIZES, "num_inference_steps")
    if suite.embedded:
        known = assets().model_defaults(suite.model)
    else:
        family = check_given(suite.source)[1]
        known = {name: getattr(family, name) for name in names}
    return {name: int(getattr(request, name) or known.get(name) or 1) for name in names}


def _write(output: Path, arm: Arm, guidance_scale: float | None, target: Target, measured: TunedResult) -> Path:
    """Write the config, and its copy for `dit_accel.recommend`; returns that."""
    solver = None if arm.solver == OWN else arm.solver
    run = {"num_inference_steps": arm.num_inference_steps, "solver": solver, "flow_shift": arm.flow_shift}
    run = {key: value for key, value in {**run, "guidance_scale": guidance_scale}.items() if value is not None}
    text = tuned_text(arm.methods, run, measured, arm.name)
    write_text(output, text)
    size = f"{measured.width}x{measured.height}x{measured.num_frames}"
    goal = re.sub(r"[^\w.=-]", "-", f"{target.name}={target.value:g}")
    return keep_tuned(f"{goal}-{size}-{measured.num_inference_steps}.toml", text, measured.model)
