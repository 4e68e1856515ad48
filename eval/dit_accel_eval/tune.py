"""The command `tune` of the command line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from dit_accel_pipelines.options import RUN, Backend, Device, Dtype, Guidance, Json, Model, Offload, Pixels, Seed

from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_json
from dit_accel.errors import ConfigError, did_you_mean

OPTIONS = {
    "heads": ("objective", "rounds", "per_round", "halvings"),
    "lite": ("target_error", "metric"),
    "pipeline": ("target", "space"),
    "profile": ("criterion", "threshold", "cached", "queries", "seeds", "mask"),
}
"""Method -> the options that it alone takes."""

TUNABLE = ("heads", "lite", "magcache", "period", "pipeline", "profile", "teacache")


def tune_method(
    method: Annotated[
        str,
        typer.Argument(
            help="What to tune: heads, lite, magcache, period, pipeline, profile or teacache.", metavar="METHOD"
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to show; may be repeated; default: some that an embedded model knows."),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.", metavar="FILE")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write; default: METHOD.toml, heads and profile .json.", metavar="FILE"
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="pipeline: what to meet, such as psnr=30, lpips=0.1 or speedup=2.", metavar="NAME=VALUE"),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="pipeline: suite whose arms are tried; default: some 90.", metavar="SUITE.toml")
    ] = None,
    target_error: Annotated[
        float | None, typer.Option(help="lite: error that one vote may add to the next call; default: 0.01.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="lite: how that error is measured, l1, l2 or cosine; default: l1.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="heads: checker, sharpness, clip, aesthetic or pickscore (=FOLDER or hub id for other weights), or "
            "module:function of a clip and its prompt; default: checker."
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="heads: greedy rounds; default: 1.")] = None,
    per_round: Annotated[int | None, typer.Option(help="heads: heads that a round adds; default: 3.")] = None,
    halvings: Annotated[
        int | None, typer.Option(help="heads: earlier judgements on fewer prompts and steps; default: 1.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="profile: attention, delta or error; default: error.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="profile: cache blocks that score below it; default: the largest gap.")
    ] = None,
    cached: Annotated[
        int | None, typer.Option(help="profile: cache so many blocks, those of the lowest scores.")
    ] = None,
    queries: Annotated[
        int | None, typer.Option(help="profile: queries a call that are looked at; default: all.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="profile: runs of each prompt; default: 1.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="profile: the foreground, white in a picture or video.", metavar="FILE")
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
    step to step. heads: which attention heads to perturb for SoftPAG, by
    greedy rounds with an objective. teacache: the polynomial from the change
    of the first block's input to that of the output. period: whether attention
    over frames repeats, for UltraViCo, with a picture beside the file.
    profile: which blocks profilingcache may cache, with a heat map and the
    masks beside the file. pipeline: solver, steps, caches and sparse attention
    together, the cheapest that meets a target on held-out prompts, with a
    plot of the Pareto set beside the file; on an embedded model. A run that was stopped goes on after the last whole
    prompt.

    Examples:

    dit-accel tune lite --target-error 0.02 -o lite.toml

    dit-accel generate "a red circle" --set lite.thresholds_file=lite.toml

    dit-accel tune heads --rounds 2 -o heads.json

    accelerate launch --multi_gpu --num_processes 8 -m dit_accel tune heads --objective pickscore --model MODEL ...

    dit-accel generate "a red circle" --set softpag.heads=heads.json

    dit-accel tune pipeline --target psnr=30 -o fast.toml

    dit-accel generate "a red circle" --config fast.toml

    dit-accel tune magcache -o mag.toml

    dit-accel generate "a red circle" --config mag.toml

    dit-accel tune profile --cached 3 -o profile.json

    dit-accel generate "a red circle" --set profilingcache.blocks=profile.json
    """
    from dit_accel_pipelines.progress import Stages

    from .tuning import tuning_request

    if method not in TUNABLE:
        raise ConfigError(f"tune can't tune {method!r}; {did_you_mean(method, TUNABLE)}")
    asked = dict(
        target=target, space=space, target_error=target_error, metric=metric, objective=objective, rounds=rounds,
        per_round=per_round, halvings=halvings, criterion=criterion, threshold=threshold, cached=cached,
        queries=queries, seeds=seeds, mask=mask,
    )  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    _refuse_foreign(method, options)
    ranks = _ranks(method)
    if method == "heads":
        options["ranks"] = ranks
    request = tuning_request(
        prompts=_prompts(method, prompt, prompt_file, model), model=model, height=height, width=width,
        num_frames=num_frames, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed,
        dtype=cast(Any, dtype), device=device, offload=cast(Any, offload), methods=tuple(methods), backend=backend,
    )  # fmt: skip
    with Stages(quiet=quiet or not ranks.first) as stages:
        file = output or Path(f"{method}.{'json' if method in ('heads', 'profile') else 'toml'}")
        tuned = TUNERS[method](request, file, stages=stages, **options)
    if not ranks.first:
        return
    if json:
        print_json(tuned.to_dict())
        return
    print(tuned.output)
    if not quiet:
        _show(tuned)


def _ranks(method: str) -> Any:
    """Return the processes that share the run.

    Raises:
        ConfigError: if there are several and the method is not searched by several.
    """
    from dit_accel_pipelines.ranks import Ranks, launched

    if launched() > 1 and method != "heads":
        raise ConfigError(f"tune {method} runs in one process, and {launched()} were launched; start it without them")
    return Ranks()


def _heads(*arguments: Any, **options: Any) -> Any:
    from .tune_heads import tune_heads

    return tune_heads(*arguments, **options)


def _refuse_foreign(method: str, options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for options that are for another method."""
    for owner, names in OPTIONS.items():
        given = [name for name in options if name in names]
        if given and method != owner:
            raise ConfigError(
                f"tune {method} takes no {' and no '.join(given)}, which are for tune {owner}; leave them out"
            )


def _lite(*arguments: Any, **options: Any) -> Any:
    from .tune_lite import tune_lite

    return tune_lite(*arguments, **options)


def _magcache(*arguments: Any, **options: Any) -> Any:
    from .tune_magcache import tune_magcache

    return tune_magcache(*arguments, **options)


def _pipeline(*arguments: Any, **options: Any) -> Any:
    from .tune_pipeline import tune_pipeline

    return tune_pipeline(*arguments, **options)


def _profile(*arguments: Any, **options: Any) -> Any:
    from .tune_profile import tune_profile

    return tune_profile(*arguments, **options)


def _teacache(*arguments: Any, **options: Any) -> Any:
    from .tune_teacache import tune_teacache

    return tune_teacache(*arguments, **options)


def _period(*arguments: Any, **options: Any) -> Any:
    from .tune_period import tune_period

    return tune_period(*arguments, **options)


TUNERS: dict[str, Callable[..., Any]] = {
    "heads": _heads, "lite": _lite, "magcache": _magcache, "period": _period,
    "pipeline": _pipeline, "profile": _profile, "teacache": _teacache,
}  # fmt: skip
"""Method -> what tunes it, loaded when it is asked for."""

USUAL_PROMPTS = {"heads": 4, "lite": 2, "magcache": 4, "period": 2, "pipeline": 1, "profile": 4, "teacache": 4}


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
