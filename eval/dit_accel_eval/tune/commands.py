"""The commands of `dit-accel tune`: each has options of its own, and those that all share."""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dit_accel_pipelines.generation import options as usual
from dit_accel_pipelines.generation.options import option, with_option_fields
from typer import Typer

from dit_accel.cli import MethodList
from dit_accel.cli.console import TALK, print_json, print_table
from dit_accel.cli.stopping import STOP
from dit_accel.errors import ConfigError
from dit_accel.files import held

_HELP = "Find a method's numbers, or a whole setting, on a model's own generations. A run that was stopped goes on."
tune_app = Typer(name="tune", help=_HELP)
MODULES = {"magcache": "caches", "teacache": "caches"}  # command -> module, where that is called otherwise
SPREAD = ("heads",)  # commands whose run several processes may share


def _command(function: Callable[..., None]) -> Callable[..., None]:
    return tune_app.command()(with_option_fields(function))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared(usual.PlacedOptions):
    """The options that all commands share."""

    prompt: Annotated[list[str] | None, option("What to show, repeatable; default: an embedded model's.")] = None
    prompt_file: Annotated[Path | None, option("Text file, one prompt per line.", metavar="FILE")] = None
    output: Annotated[Path | None, option("Default: named as the command.", "--output", "-o", metavar="FILE")] = None
    model: usual.Model = None
    num_inference_steps: Annotated[int | None, option("Denoising steps; the file holds for this number alone.")] = None
    seed: usual.Seed = 0
    backend: usual.Backend = "auto"
    quiet: usual.Quiet = False
    json: usual.Json = False


def _tune(name: str, shared: Shared, methods: list[Any], prompts: int, suffix: str = ".toml", **options: Any) -> None:
    """Run ``tune_NAME`` with options of its own, by default on so many embedded prompts, and show what it found."""
    from dit_accel_pipelines.generation.progress import Stages
    from dit_accel_pipelines.generation.request import Request
    from dit_accel_pipelines.generation.threads import one_thread
    from dit_accel_pipelines.processes.ranks import Ranks, launched

    from ..runs.loaded import tuning_request

    if launched() > 1 and name not in SPREAD:
        raise ConfigError(f"tune {name} runs in one process, and {launched()} were launched; start it without them")
    first, file = Ranks().first, shared.output or Path(f"{name}{suffix}")
    values = {**usual.fields_of(Request, shared), "prompts": _prompts(shared, prompts), "methods": tuple(methods)}
    request = tuning_request(**{name: value for name, value in values.items() if name not in ("output", "prompt")})
    alone = held(file, "tune's output") if first else contextlib.nullcontext()
    small = one_thread(embedded=request.embedded is not None)
    with alone, small, Stages(quiet=shared.quiet or not first) as stages:
        STOP.files = f"what was measured is kept beside {file}, and the same command goes on from there"
        module = importlib.import_module(f".{MODULES.get(name, name)}", __package__)
        tuned = getattr(module, f"tune_{name}")(request, file, stages=stages, **options)
    if first and shared.json:
        print_json({"output": str(file), **tuned.found})
    elif first:
        print(file)
    if not first or shared.json or shared.quiet:
        return
    print_table(tuned.columns, tuned.rows, tuned.columns)
    for remark in tuned.remarks:
        TALK.print(remark, markup=False, soft_wrap=True)


def _prompts(shared: Shared, count: int) -> tuple[str, ...]:
    """Return what to show: what was given in one of the two ways, else so many that an embedded model knows."""
    from dit_accel_pipelines.generation.request import EMBEDDED, embedded_name, read_prompts

    from dit_accel.adapters.model_files import model_source

    from ..runs.loaded import embedded_prompts

    model_source(shared.model or EMBEDDED)  # first of all, so that a misspelt name is refused as such
    if shared.prompt and shared.prompt_file is not None:
        raise ConfigError("tune takes --prompt or --prompt-file, got both; give one of them")
    if shared.prompt:
        return tuple(shared.prompt)
    if shared.prompt_file is not None:
        return read_prompts(shared.prompt_file)
    name = embedded_name(shared.model)
    if name is None:
        raise ConfigError(f"tune has no prompts of its own for {shared.model}; give --prompt or --prompt-file")
    return embedded_prompts(name, count)


@_command
def heads(
    shared: Shared,
    *,
    methods: MethodList,
    objective: Annotated[str, option("checker, a metric, module:function; or of several, as below.")] = "checker",
    rounds: Annotated[int, option("Greedy rounds.")] = 1,
    per_round: Annotated[int, option("Heads that a round adds.")] = 3,
) -> None:
    """Search the attention heads that SoftPAG perturbs, by greedy rounds with an objective.

    Of several objectives: harmonic: A, B, or threshold: A, B >= 2, C >= 6.
    Every clip that was judged is kept beside the file, so that a search that
    was stopped goes on; processes of accelerate share it.

    \b
    Examples:
      dit-accel tune heads --rounds 2 -o heads.json
      dit-accel generate "a red circle" --set softpag.heads=heads.json
    """
    _tune("heads", shared, methods, 4, ".json", objective=objective, rounds=rounds, per_round=per_round)


@_command
def lite(
    shared: Shared,
    *,
    methods: MethodList,
    target_error: Annotated[float, option("Relative error that one vote may add to the next call.")] = 0.01,
) -> None:
    """Search LiteAttention's thresholds by layer and step for a target error, at every attention call.

    \b
    Examples:
      dit-accel tune lite --target-error 0.02 -o lite.toml
      dit-accel generate "a red circle" --set lite.thresholds_file=lite.toml
    """
    _tune("lite", shared, methods, 2, target_error=target_error)


@_command
def magcache(shared: Shared, *, methods: MethodList) -> None:
    """Measure for MagCache how the size of what it stores changes from step to step.

    \b
    Examples:
      dit-accel tune magcache -o mag.toml
      dit-accel generate "a red circle" --config mag.toml
    """
    _tune("magcache", shared, methods, 4)


@_command
def period(shared: Shared, *, methods: MethodList) -> None:
    """Measure for UltraViCo whether attention over frames repeats.

    \b
    Examples:
      dit-accel tune period -o period.toml
    """
    _tune("period", shared, methods, 2)


@_command
def pipeline(
    shared: Shared,
    *,
    methods: MethodList,
    target: Annotated[str | None, option("What to meet, such as psnr=30 or speedup=2.", metavar="NAME=VALUE")] = None,
    space: Annotated[Path | None, option("Suite whose arms are tried; default: some 80.", metavar="SUITE.toml")] = None,
) -> None:
    """Search solver, steps, caches and sparse attention together for the cheapest setting that meets a target.

    It is verified on held-out prompts before it is written. Every run is kept
    beside the file, so that a search that was stopped goes on, and `eval report`
    shows all. A model that is not embedded takes four prompts or more, of which
    the second half is held out.

    \b
    Examples:
      dit-accel tune pipeline --target psnr=30 -o fast.toml
      dit-accel tune pipeline --target lpips=0.1 --model MODEL --prompt-file p.txt
      dit-accel generate "a red circle" --config fast.toml
    """
    _tune("pipeline", shared, methods, 1, target=target, space=space)


@_command
def profile(
    shared: Shared,
    *,
    methods: MethodList,
    criterion: Annotated[str, option("attention, delta or error.")] = "error",
    cached: Annotated[int | None, option("Blocks of the lowest scores; default: below the largest gap.")] = None,
) -> None:
    """Tell which blocks ProfilingCache may cache.

    \b
    Examples:
      dit-accel tune profile --cached 3 -o profile.json
      dit-accel generate "a red circle" --set profilingcache.blocks=profile.json
    """
    _tune("profile", shared, methods, 4, ".json", criterion=criterion, cached=cached)


@_command
def schedule(
    shared: Shared,
    *,
    methods: MethodList,
    computed: Annotated[int, option("Steps that are computed.")] = 12,
    placement: Annotated[list[str] | None, option("UniPC's; repeatable.", metavar="STEPS[@SHIFT]")] = None,
) -> None:
    """Search which steps StaticCache computes, from what each forecast would have been off by.

    A predictor is set as usual; without one it is taylor. --placement names
    steps of UniPC, and a noise shift behind @; of several the second half of
    the prompts chooses one. Without it the model's own solver is taken.

    \b
    Examples:
      dit-accel tune schedule --computed 10 -o schedule.toml
      dit-accel tune schedule --placement 30@8 --placement 20@5 -o schedule.toml
      dit-accel generate "a red circle" --config schedule.toml
    """
    _tune("schedule", shared, methods, 8, computed=computed, placement=placement or ())


@_command
def teacache(shared: Shared, *, methods: MethodList) -> None:
    """Fit TeaCache's polynomial from the change of the first block's input to that of the output.

    \b
    Examples:
      dit-accel tune teacache -o tea.toml
      dit-accel generate "a red circle" --config tea.toml
    """
    _tune("teacache", shared, methods, 4)
