"""The command `tune` of the command line."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from dit_accel_pipelines.options import RUN, Backend, Device, Dtype, Guidance, Json, Model, Offload, Pixels, Seed

from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_json
from dit_accel.errors import ConfigError, did_you_mean

TUNABLE = ("lite",)


def tune_method(
    method: Annotated[str, typer.Argument(help="What to tune: lite.", metavar="METHOD")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to show; may be repeated; default: two that an embedded model knows.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.", metavar="FILE")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Thresholds file to write: .toml.", metavar="FILE")
    ] = Path("lite.toml"),
    target_error: Annotated[float, typer.Option(help="Error that one vote may add to the next call.")] = 0.01,
    metric: Annotated[str, typer.Option(help="How that error is measured: l1, l2 or cosine.")] = "l1",
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
    """Find LiteAttention's thresholds by layer and step for a target error.

    Each prompt is generated once densely and once with thresholds searched
    at every attention call on its own queries, keys and values. The file
    holds the lowest threshold that any prompt and branch asked for. A run
    that was stopped goes on after the last whole prompt.

    Examples:

    dit-accel tune lite --target-error 0.02 -o lite.toml

    dit-accel generate "a red circle" --set lite.thresholds_file=lite.toml
    """
    from dit_accel_pipelines.progress import Stages
    from dit_accel_pipelines.request import embedded_name, read_prompts

    from .tune_lite import embedded_prompts, tune_lite, tuning_request

    if method not in TUNABLE:
        raise ConfigError(f"tune can't tune {method!r}; {did_you_mean(method, TUNABLE)}")
    if prompt and prompt_file is not None:
        raise ConfigError("tune takes --prompt or --prompt-file, got both; give one of them")
    prompts = tuple(prompt or ()) or (read_prompts(prompt_file) if prompt_file is not None else ())
    if not prompts:
        name = embedded_name(model)
        if name is None:
            raise ConfigError(f"tune has no prompts of its own for {model}; give some with --prompt or --prompt-file")
        prompts = embedded_prompts(name)
    request = tuning_request(
        prompts=prompts, model=model, height=height, width=width, num_frames=num_frames,
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, seed=seed, dtype=cast(Any, dtype),
        device=device, offload=cast(Any, offload), methods=tuple(methods), backend=backend,
    )  # fmt: skip
    with Stages(quiet=quiet) as stages:
        tuned = tune_lite(request, output, target_error=target_error, metric=metric, stages=stages)
    if json:
        print_json(tuned.to_dict())
        return
    print(tuned.output)
    if not quiet:
        columns = ("step", "threshold", "tiles kept", "error added", "error to dense")
        table = plain_table(*columns, right=columns)
        for row in tuned.by_step():
            table.add_row(
                str(row.step), f"{row.threshold:.2f}", f"{row.kept:.3f}", f"{row.added:.4f}", f"{row.dense:.4f}"
            )
        OUT.print(table)
        for one in tuned.prompts:
            TALK.print(f"{one.psnr:.1f} dB to the dense run: {one.prompt}", markup=False, soft_wrap=True)
