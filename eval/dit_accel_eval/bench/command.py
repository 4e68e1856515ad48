"""The command `bench` of the command line."""

from collections.abc import Callable, Sequence
from typing import Any

from dit_accel_pipelines.generation.options import with_option_fields
from rich.console import Console

from dit_accel.cli import MethodList
from dit_accel.cli.console import OUT, TALK, plain_table, print_json
from dit_accel.errors import ConfigError
from dit_accel.files import check_writable

from .options import BenchOptions

WIDTH = 140
"""Characters that the table takes; cells that wrap can't be compared."""

SHOWN = ("median", "low", "high")

Say = Callable[[str], None]


@with_option_fields
def bench_model(options: BenchOptions, *, methods: MethodList) -> None:
    """Time a model's real shapes with random weights, a few layers of it; downloads nothing.

    Dense attention by every backend of diffusers that runs here, the methods
    that are switched on, and caches of diffusers take turns. Beside each time
    stand the work that ran, useful TFLOP/s, and the speed-up that plan
    predicts for so many steps and layers. Random weights decide nothing: what
    a cache skips here is not what it would skip on the real model.

    With --shapes no model is made: single self-attention calls of real sizes
    and of a few heads, dense, by each preset's sparse part, and by
    FlexAttention. It says how long it will take before it starts; what the
    output file holds already is not timed again.

    Examples:

    dit-accel bench --family wan2.1-1.3b --height 256 --width 256 --radial

    dit-accel bench --family flux.1-dev --layers 3 --sol -o bench.jsonl

    dit-accel bench --shapes all --budget 1500 -o shapes.jsonl
    """
    import torch

    options.check(methods)
    if options.output is not None:
        check_writable(options.output, "the bench's lines")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    say = (lambda text: None) if options.quiet else (lambda text: TALK.print(text, markup=False, soft_wrap=True))
    if options.shapes is None:
        _bench_family(options, methods, say)
    else:
        from .attention_command import bench_attention, show_attention

        lines = bench_attention(options, say)
        print_json(lines) if options.json else show_attention(lines)


def _bench_family(options: BenchOptions, methods: Sequence[Any], say: Say) -> None:
    """Time a few layers of a family, append the lines and show them."""
    import torch
    from dit_accel_pipelines.generation.loading import pick_device

    from ..runs.results import append_line
    from .real_shapes import find_family
    from .timing import arms_of, make_bench, run_bench

    sizes, where = find_family(options.family or ""), pick_device(options.device)
    usual = "float32" if where.type == "cpu" else "bfloat16"
    bench = make_bench(
        *sizes, layers=options.layers, steps=options.num_inference_steps, height=options.height, width=options.width,
        num_frames=options.num_frames, device=where, dtype=getattr(torch, options.dtype or usual),
    )  # fmt: skip
    lines = run_bench(bench, arms_of(methods, native_caches=options.native_caches), rounds=options.rounds, say=say)
    if options.output is not None:
        for line in lines:
            append_line(options.output, line)
    if options.json:
        print_json(lines)
        return
    _show(lines)
    _tell_absent(lines, say)


def _tell_absent(lines: list[dict[str, Any]], say: Say) -> None:
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
