"""The commands of `dit-accel tune`: each has options of its own, and those that all share."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from dit_accel_pipelines.generation.options import (
    RUN,
    Backend,
    Device,
    Dtype,
    Guidance,
    Json,
    Model,
    Offload,
    Pixels,
    Seed,
)

from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_json
from dit_accel.cli.stopping import keeps
from dit_accel.errors import ConfigError
from dit_accel.files import held

if TYPE_CHECKING:
    from dit_accel_pipelines.processes.ranks import Ranks

_HELP = "Find a method's numbers, or a whole setting, on a model's own generations. A run that was stopped goes on."

tune_app = typer.Typer(name="tune", help=_HELP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """A command.

    Attributes:
        name: what is tuned, by the function ``tune_NAME`` of the module ``NAME``; see `base`.
        prompts: how many of an embedded model's own are shown where none is given.
        suffix: of the file that is written where none is named.
        spreads: whether several processes may share the run.
    """

    name: str
    prompts: int
    suffix: str
    spreads: bool


def _command(*, prompts: int, suffix: str = ".toml", spreads: bool = False) -> Callable[..., Any]:
    """Add a command to the group, by a function of its name that declares its own options and explains it.

    Options that were given go to what tunes, beside the request, the file and the progress.
    """

    def add(declared: Callable[..., None]) -> Callable[..., None]:
        tuner = Tuner(name=declared.__name__, prompts=prompts, suffix=suffix, spreads=spreads)
        own = inspect.signature(declared, eval_str=True).parameters.values()

        @functools.wraps(declared)
        def command(**given: Any) -> None:
            options = {one.name: value for one in own if (value := given.pop(one.name)) is not None}
            _run(tuner, options, **given)

        shared = inspect.signature(_shared, eval_str=True).parameters.values()
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *shared)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        tune_app.command(tuner.name)(command)
        return declared

    return add


def _shared(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to show; may be repeated; default: some that an embedded model knows."),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.", metavar="FILE")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; default: named as the command.", metavar="FILE"),
    ] = None,
    model: Model = None,
    height: Pixels = None,
    width: Pixels = None,
    num_frames: Annotated[int | None, typer.Option(help="Output frames.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(help="Denoising steps; the file holds for this number alone.")
    ] = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = "none",
    backend: Backend = "auto",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, notes or table.", rich_help_panel=RUN)
    ] = False,
    json: Json = False,
    *,
    methods: MethodList,
) -> None:
    """Declare the options that all commands share."""


def _run(
    tuner: Tuner,
    options: dict[str, Any],
    *,
    prompt: list[str] | None,
    prompt_file: Path | None,
    output: Path | None,
    quiet: bool,
    json: bool,
    methods: list[Any],
    **of_request: Any,
) -> None:
    """Tune, and show what was found."""
    from dit_accel_pipelines.generation.progress import Stages
    from dit_accel_pipelines.generation.threads import one_thread

    from ..runs.loaded import tuning_request

    ranks = _ranks(tuner)
    prompts = _prompts(tuner, prompt, prompt_file, of_request["model"])
    if tuner.spreads:
        options["ranks"] = ranks
    request = tuning_request(prompts=prompts, methods=tuple(methods), **of_request)
    file = output or Path(f"{tuner.name}{tuner.suffix}")
    alone = held(file, "tune's output") if ranks.first else contextlib.nullcontext()
    small = one_thread(embedded=request.embedded is not None)
    with alone, small, Stages(quiet=quiet or not ranks.first) as stages:
        keeps(f"what was measured is kept beside {file}, and the same command goes on from there")
        module = importlib.import_module(f".{tuner.name}", __package__)
        tuned = getattr(module, f"tune_{tuner.name}")(request, file, stages=stages, **options)
    if not ranks.first:
        return
    if json:
        print_json(tuned.to_dict())
        return
    print(tuned.output)
    if not quiet:
        _show(tuned)


def _ranks(tuner: Tuner) -> "Ranks":
    """Return the processes that share the run; several are refused where the search can't be shared."""
    from dit_accel_pipelines.processes.ranks import Ranks, launched

    if launched() > 1 and not tuner.spreads:
        raise ConfigError(
            f"tune {tuner.name} runs in one process, and {launched()} were launched; start it without them"
        )
    return Ranks()


def _prompts(tuner: Tuner, prompt: list[str] | None, prompt_file: Path | None, model: str | None) -> tuple[str, ...]:
    """Return what to show: what was given in one of the two ways, else prompts that an embedded model knows."""
    from dit_accel_pipelines.generation.request import EMBEDDED, embedded_name, read_prompts

    from dit_accel.adapters.model_files import model_source

    from ..runs.loaded import embedded_prompts

    model_source(model or EMBEDDED)  # first of all, so that a misspelt name is refused as such
    if prompt and prompt_file is not None:
        raise ConfigError("tune takes --prompt or --prompt-file, got both; give one of them")
    given = tuple(prompt or ()) or (read_prompts(prompt_file) if prompt_file is not None else ())
    if given:
        return given
    name = embedded_name(model)
    if name is None:
        raise ConfigError(f"tune has no prompts of its own for {model}; give some with --prompt or --prompt-file")
    return embedded_prompts(name, tuner.prompts)


def _show(tuned: Any) -> None:
    """Print what was found, by step or transformer."""
    columns, rows, remarks = tuned.table()
    table = plain_table(*columns, right=columns)
    for row in rows:
        table.add_row(*row)
    OUT.print(table)
    for remark in remarks:
        TALK.print(remark, markup=False, soft_wrap=True)


@_command(prompts=4, suffix=".json", spreads=True)
def heads(
    objective: Annotated[
        str | None,
        typer.Option(
            help="checker, sharpness, clip, aesthetic or pickscore (=FOLDER or hub id for other weights), or "
            "module:function of a clip and its prompt; default: checker."
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Greedy rounds; default: 1.")] = None,
    per_round: Annotated[int | None, typer.Option(help="Heads that a round adds; default: 3.")] = None,
    halvings: Annotated[
        int | None, typer.Option(help="Earlier judgements on fewer prompts and steps; default: 1.")
    ] = None,
) -> None:
    """Search the attention heads that SoftPAG perturbs, by greedy rounds with an objective.

    Every clip that was judged is kept beside the file, so that a search that
    was stopped goes on; processes of accelerate share it.

    Examples:

    dit-accel tune heads --rounds 2 -o heads.json

    dit-accel generate "a red circle" --set softpag.heads=heads.json

    accelerate launch --multi_gpu --num_processes 8 -m dit_accel tune heads --objective pickscore --model MODEL ...
    """


@_command(prompts=2)
def lite(
    target_error: Annotated[
        float | None, typer.Option(help="Error that one vote may add to the next call; default: 0.01.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="How that error is measured, l1, l2 or cosine; default: l1.")
    ] = None,
) -> None:
    """Search LiteAttention's thresholds by layer and step for a target error, at every attention call.

    Examples:

    dit-accel tune lite --target-error 0.02 -o lite.toml

    dit-accel generate "a red circle" --set lite.thresholds_file=lite.toml
    """


@_command(prompts=4)
def magcache() -> None:
    """Measure for MagCache how the size of what it stores changes from step to step.

    Examples:

    dit-accel tune magcache -o mag.toml

    dit-accel generate "a red circle" --config mag.toml
    """


@_command(prompts=2)
def period() -> None:
    """Measure for UltraViCo whether attention over frames repeats, with a picture beside the file.

    Examples:

    dit-accel tune period -o period.toml
    """


@_command(prompts=1)
def pipeline(
    target: Annotated[
        str | None,
        typer.Option(help="What to meet, such as psnr=30, lpips=0.1 or speedup=2.", metavar="NAME=VALUE"),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="Suite whose arms are tried; default: some 80.", metavar="SUITE.toml")
    ] = None,
    try_guidance: Annotated[
        list[float] | None,
        typer.Option(help="A guidance scale to try besides the run's own; may be repeated.", metavar="SCALE"),
    ] = None,
) -> None:
    """Search solver, steps, caches and sparse attention together for the cheapest setting that meets a target.

    It is verified on held-out prompts before it is written. Every run is kept
    beside the file, so that a search that was stopped goes on, and eval report
    makes a page of it. A model that is not embedded takes four prompts or more,
    of which the second half is held out.

    Examples:

    dit-accel tune pipeline --target psnr=30 -o fast.toml

    dit-accel tune pipeline --target lpips=0.1 --model MODEL --prompt-file p.txt

    dit-accel generate "a red circle" --config fast.toml
    """


@_command(prompts=4, suffix=".json")
def profile(
    criterion: Annotated[str | None, typer.Option(help="attention, delta or error; default: error.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Cache blocks that score below it; default: the largest gap.")
    ] = None,
    cached: Annotated[int | None, typer.Option(help="Cache so many blocks, those of the lowest scores.")] = None,
    queries: Annotated[int | None, typer.Option(help="Queries a call that are looked at; default: all.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each prompt; default: 1.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="The foreground, white in a picture or video.", metavar="FILE")
    ] = None,
) -> None:
    """Tell which blocks ProfilingCache may cache, with a heat map and the masks beside the file.

    Examples:

    dit-accel tune profile --cached 3 -o profile.json

    dit-accel generate "a red circle" --set profilingcache.blocks=profile.json
    """


@_command(prompts=4)
def teacache() -> None:
    """Fit TeaCache's polynomial from the change of the first block's input to that of the output.

    Examples:

    dit-accel tune teacache -o tea.toml

    dit-accel generate "a red circle" --config tea.toml
    """
