"""The command `bench` of the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from dit_accel_pipelines.generation.options import RUN, Device, Dtype, Json, Pixels
from rich.console import Console

from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_json
from dit_accel.errors import ConfigError
from dit_accel.files import check_writable

WIDTH = 140
"""Characters that the table takes; cells that wrap can't be compared."""

SHOWN = ("median", "low", "high")


def bench_model(
    family: Annotated[str, typer.Option(help="A model family, such as wan2.1-1.3b.", metavar="NAME")],
    layers: Annotated[int, typer.Option(help="Blocks that are made.", min=1)] = 2,
    height: Pixels = None,
    width: Pixels = None,
    num_frames: Annotated[int | None, typer.Option(help="Output frames.")] = None,
    num_inference_steps: Annotated[int, typer.Option(help="Steps of a run.", min=2)] = 4,
    rounds: Annotated[int, typer.Option(help="Runs of every arm, in turn.", min=1)] = 3,
    native_caches: Annotated[bool, typer.Option(help="Time caches of diffusers too.")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON lines to append to.", metavar="FILE")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RUN)] = False,
    json: Json = False,
    *,
    methods: MethodList,
) -> None:
    """Time a model's real shapes with random weights, a few layers of it; downloads nothing.

    Dense attention by every backend of diffusers that runs here, the methods
    that are switched on, and caches of diffusers take turns. Beside each time
    stand the work that ran, useful TFLOP/s, and the speed-up that plan
    predicts for so many steps and layers. Random weights decide nothing: what
    a cache skips here is not what it would skip on the real model.

    Examples:

    dit-accel bench --family wan2.1-1.3b --height 256 --width 256 --radial

    dit-accel bench --family flux.1-dev --layers 3 --sol -o bench.jsonl
    """
    import torch
    from dit_accel_pipelines.generation.loading import pick_device

    from ..runs.results import append_line
    from .real_shapes import find_family
    from .timing import arms_of, make_bench, run_bench

    if output is not None:
        check_writable(output, "the bench's lines")
    sizes, where = find_family(family), pick_device(device)
    torch.set_num_threads(threads or torch.get_num_threads())
    bench = make_bench(
        *sizes, layers=layers, steps=num_inference_steps, height=height, width=width, num_frames=num_frames,
        device=where, dtype=getattr(torch, dtype or ("float32" if where.type == "cpu" else "bfloat16")),
    )  # fmt: skip
    say = (lambda text: None) if quiet else (lambda text: TALK.print(text, markup=False, soft_wrap=True))
    lines = run_bench(bench, arms_of(methods, native_caches=native_caches), rounds=rounds, say=say)
    if output is not None:
        for line in lines:
            append_line(output, line)
    if json:
        print_json(lines)
        return
    _show(lines)
    _tell_absent(lines, say)


def _tell_absent(lines: list[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Name the backends that do not run here, and refuse methods that were asked for and can't."""
    absent = [line["arm"].removeprefix("dense, ") for line in lines if "reason" in line and line["kind"] == "dense"]
    say(f"backends that do not run here: {', '.join(absent) or 'none'}")
    failed = [f"{line['arm']}: {line['reason']}" for line in lines if "reason" in line and line["kind"] == "method"]
    if failed:
        raise ConfigError(f"asked for, but it can't run here: {'; '.join(failed)}")


def _show(lines: list[dict[str, Any]]) -> None:
    first = lines[0]
    size = f"{first['tokens']:,} tokens ({first['width']} x {first['height']}, {first['num_frames']} frames)"
    machine = f"{first['dtype']}, {first['threads']} threads, {first['device']}"
    OUT.print(f"{first['family']}, {first['layers']} layers, {size}, {machine}", markup=False, soft_wrap=True)
    columns = ("step, ms", "block, ms", "attention, ms", "work", "TFLOP/s", "times dense", "plan")
    table = plain_table("arm", *columns, right=columns)
    for line in lines:
        if "reason" in line:
            continue
        times = (line[f"{key}_seconds"] for key in ("step", "block", "attention"))
        table.add_row(
            line["arm"], *("{:.1f} [{:.1f}, {:.1f}]".format(*(1000 * one[key] for key in SHOWN)) for one in times),
            f"{line['work']:.2f}", f"{line['tflops']:.3g}",
            "{:.2f} [{:.2f}, {:.2f}]".format(*(line["ratio"][key] for key in SHOWN)),
            f"{line['predicted']:.2f}" if line["predicted"] is not None else "",
        )  # fmt: skip
    Console(highlight=False, width=max(OUT.width, WIDTH)).print(table)
