"""The command `bench` of the command line."""

from typing import Any

from dit_accel_pipelines.generation.options import with_option_fields
from rich.console import Console

from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_json
from dit_accel.errors import ConfigError
from dit_accel.files import check_writable

from .options import BenchOptions

WIDTH = 150  # characters that the table takes; cells that wrap can't be compared
COLUMNS = ("step, ms", "block, ms", "attention, ms", "x dense", "density", "work", "TFLOP/s", "times dense", "plan")
Line = dict[str, Any]


@with_option_fields
def bench_model(options: BenchOptions, *, methods: MethodList) -> None:
    """Time a model's real shapes with random weights, a few layers of it; downloads nothing.

    Dense attention by every backend of diffusers that runs here and the
    methods that are switched on take turns. Beside each time stand the work
    that ran, useful TFLOP/s, and the speed-up that plan predicts for so many
    steps and layers. Random weights decide nothing: what a cache skips here
    is not what it would skip on the real model.

    --shapes takes flux-1mp, flux-4mp, wan-480p, wan-720p, hunyuan-720p, and
    FAMILY:HEIGHTxWIDTHxFRAMES: models at real sizes, two heads of each, since heads
    do not depend on each other: their attention's time is a share of the
    model's, the rest of a step is not. Sparse methods act there in every step
    and layer, as their density says; without methods those of the presets do.

    An arm that needs more memory than is free is refused, with both numbers;
    arms run in another process, so that one which the system kills is a row.

    \b
    Examples:
      dit-accel bench --family wan2.1-1.3b --height 256 --width 256 --radial
      dit-accel bench --family flux.1-dev --layers 3 --sol -o bench.jsonl
      dit-accel bench --shapes all --budget 1500 -o shapes.jsonl
    """
    import torch
    from dit_accel_pipelines.generation.loading import pick_device

    from ..runs.results import append_line
    from .forwards import bench_arms, preset_arms, run_shapes, sparse_part

    options = options.settled()
    if options.output is not None:
        check_writable(options.output, "the bench's lines")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    say = (lambda text: None) if options.quiet else (lambda text: TALK.print(text, markup=False, soft_wrap=True))
    device = pick_device(options.device)
    lines: list[Line] = []
    if options.shapes:
        arms = bench_arms([sparse_part(config) for config in methods]) if methods else preset_arms()
    else:
        arms = bench_arms(methods)
    for line in run_shapes(
        options.wanted(), arms, options=options,
        device=device, dtype=getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16")),
        say=say,
    ):  # fmt: skip
        lines.append(line)
        if options.output is not None:
            append_line(options.output, line)
    if options.json:
        return print_json(lines)
    for shape in dict.fromkeys(line["shape"] for line in lines):
        _show([line for line in lines if line["shape"] == shape])
    lacking = [line for line in lines if "reason" in line and not line["methods"] and not line["out_of_memory"]]
    absent = [line["arm"].removeprefix("dense, ") for line in lacking]
    say(f"backends that do not run here: {', '.join(dict.fromkeys(absent)) or 'none'}")
    failed = [f"{line['arm']}: {line['reason']}" for line in lines if "reason" in line and line["methods"]]
    if failed:
        raise ConfigError(f"requested, but it can't run here: {'; '.join(failed)}")


def _show(lines: list[Line]) -> None:
    """Print the table of one shape."""
    from dit_accel.methods.attention.sparse import SparseConfig
    from dit_accel.methods.registry import method

    first = lines[0]
    size = f"{first['tokens']:,} tokens ({first['width']} x {first['height']}, {first['num_frames']} frames)"
    blocks = f"{first['layers']} layers of {first['heads']} of {first['all_heads']} heads"
    machine = f"{first['dtype']}, {first['threads']} threads, {first['device']}"
    OUT.print(f"{first['family']}, {blocks}, {size}, {machine}", markup=False, soft_wrap=True)
    table = plain_table("arm", *COLUMNS, right=COLUMNS)
    for line in lines:
        if "reason" not in line:
            times = [_spread(line[f"{key}_seconds"], 1000, 1) for key in ("step", "block", "attention")]
            predicted = "" if line["predicted"] is None else f"{line['predicted']:.2f}"
            table.add_row(
                line["arm"], *times, f"{line['attention_ratio']:.2f}", f"{line['attended']:.3f}",
                f"{line['work']:.2f}", f"{line['tflops']:.3g}", _spread(line["ratio"], 1, 2), predicted,
            )  # fmt: skip
        elif line["out_of_memory"]:
            table.add_row(line["arm"], "memory")
    Console(highlight=False, width=max(OUT.width, WIDTH)).print(table)
    for line in lines:
        if line.get("out_of_memory"):
            OUT.print(f"{line['arm']} {line['reason']}", markup=False, soft_wrap=True)
        elif line.get("attended") == 1 and any(issubclass(method(name), SparseConfig) for name in line["methods"]):
            OUT.print(f"{line['arm']} computed every pair, so that no sparse part was timed; give it more steps, or a "
                      "larger output", markup=False, soft_wrap=True)  # fmt: skip


def _spread(figures: dict[str, float], factor: float, digits: int) -> str:
    median, low, high = (f"{factor * figures[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"
