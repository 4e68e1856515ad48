"""The command `tune` of the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from dit_accel_pipelines.options import RUN, Backend, Device, Dtype, Guidance, Json, Model, Offload, Pixels, Seed

from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_json
from dit_accel.errors import ConfigError, did_you_mean

TUNABLE = ("lite", "magcache", "period", "teacache")


def tune_method(
    method: Annotated[str, typer.Argument(help="What to tune: lite, magcache, period or teacache.", metavar="METHOD")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to show; may be repeated; default: some that an embedded model knows."),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.", metavar="FILE")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: METHOD.toml.", metavar="FILE")
    ] = None,
    target_error: Annotated[
        float | None, typer.Option(help="lite: error that one vote may add to the next call; default: 0.01.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="lite: how that error is measured, l1, l2 or cosine; default: l1.")
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
    """Find a method's thresholds or numbers on a model's own generations.

    lite: thresholds by layer and step for a target error, searched at every
    attention call. magcache: how the size of what is stored changes from
    step to step. teacache: the polynomial from the change of the first
    block's input to that of the output. period: whether attention over
    frames repeats, for UltraViCo, with a picture beside the file. A run that was stopped goes on after
    the last whole prompt.

    Examples:

    dit-accel tune lite --target-error 0.02 -o lite.toml

    dit-accel generate "a red circle" --set lite.thresholds_file=lite.toml

    dit-accel tune magcache -o mag.toml

    dit-accel generate "a red circle" --config mag.toml
    """
    from dit_accel_pipelines.progress import Stages

    from .tuning import tuning_request

    if method not in TUNABLE:
        raise ConfigError(f"tune can't tune {method!r}; {did_you_mean(method, TUNABLE)}")
    options: dict[str, Any] = {"target_error": target_error, "metric": metric}
    options = {name: value for name, value in options.items() if value is not None}
    if options and method != "lite":
        raise ConfigError(f"tune {method} takes no {' and no '.join(options)}, which are for tune lite; leave them out")
    request = tuning_request(
        prompts=_prompts(method, prompt, prompt_file, model), model=model, height=height, width=width,
        num_frames=num_frames, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed,
        dtype=cast(Any, dtype), device=device, offload=cast(Any, offload), methods=tuple(methods), backend=backend,
    )  # fmt: skip
    with Stages(quiet=quiet) as stages:
        tuned = TUNERS[method](request, output or Path(f"{method}.toml"), stages=stages, **options)
    if json:
        print_json(tuned.to_dict())
        return
    print(tuned.output)
    if not quiet:
        _show(tuned)


def _lite(*arguments: Any, **options: Any) -> Any:
    from .tune_lite import tune_lite

    return tune_lite(*arguments, **options)


def _magcache(*arguments: Any, **options: Any) -> Any:
    from .tune_magcache import tune_magcache

    return tune_magcache(*arguments, **options)


def _teacache(*arguments: Any, **options: Any) -> Any:
    from .tune_teacache import tune_teacache

    return tune_teacache(*arguments, **options)


def _period(*arguments: Any, **options: Any) -> Any:
    from .tune_period import tune_period

    return tune_period(*arguments, **options)


TUNERS: dict[str, Callable[..., Any]] = {"lite": _lite, "magcache": _magcache, "period": _period, "teacache": _teacache}
"""Method -> what tunes it, loaded when it is asked for."""

USUAL_PROMPTS = {"lite": 2, "magcache": 4, "period": 2, "teacache": 4}


def _prompts(method: str, prompt: list[str] | None, prompt_file: Path | None, model: str | None) -> tuple[str, ...]:
    """Return what to show: what was given, else prompts that an embedded model knows.

    Raises:
        ConfigError: for both ways of giving them, or a model that has none of its own.
    """
    from dit_accel_pipelines.request import embedded_name, read_prompts

    from .tuning import embedded_prompts

    if prompt and prompt_file is not None:
        raise ConfigError("tune takes --prompt or --prompt-file, got both; give one of them")
    given = tuple(prompt or ()) or (read_prompts(prompt_file) if prompt_file is not None else ())
    if given:
        return given
    name = embedded_name(model)
    if name is None:
        raise ConfigError(f"tune has no prompts of its own for {model}; give some with --prompt or --prompt-file")
    return embedded_prompts(name, USUAL_PROMPTS[method])


def _show(tuned: Any) -> None:
    """Print what was found, by step or transformer."""
    columns, rows, remarks = tuned.table()
    table = plain_table(*columns, right=columns)
    for row in rows:
        table.add_row(*row)
    OUT.print(table)
    for remark in remarks:
        TALK.print(remark, markup=False, soft_wrap=True)
