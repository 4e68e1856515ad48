"""Tunes a whole pipeline: among solvers, steps, caches and sparse attention the cheapest setting that meets a target.

Settings are tried from the cheapest on, all on two prompts, the best of them on more; what one costs and how near
it comes to the converged run is measured as `eval run` does, into result lines from which a run that was stopped goes
on and of which `eval report` makes a page. What is written met the target on prompts that the search never saw.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel_assets import model_defaults
from dit_accel_pipelines.progress import Stages
from dit_accel_pipelines.request import EMBEDDED, Request

from dit_accel.errors import ConfigError
from dit_accel.files import check_writable, written_whole
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.toml import to_toml

from .arms import Arm
from .comparison import figures_of
from .job import Job
from .pipeline_search import HELD_OUT, ROUNDS, Point, Search, Target, read_target
from .plots import draw
from .reference import default_cache
from .suite import Suite, read_suite
from .tune_space import default_space
from .tuning import Table


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
    runs, steps = search.cost(arms)
    search.stages.note(
        f"{len(arms)} settings: at most {runs} runs, {steps} steps, besides converged and dense runs of "
        f"{ROUNDS[-1]} + {HELD_OUT} prompts"
    )
    frontier = search.frontier(arms)
    chosen = search.verified(frontier)
    _write(output, chosen.arm)
    draw(figures_of(search.last_round(), [arm.name for arm in arms if not arm.is_dense]), f"{model}: {target}",
         output.with_suffix(".png"))  # fmt: skip
    tried = {line["arm"] for line in search.lines()} & {arm.name for arm in arms}
    return TunedPipeline(
        output=output, target=asked, chosen=chosen, frontier=tuple(frontier), tried=(len(tried), len(arms))
    )


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
