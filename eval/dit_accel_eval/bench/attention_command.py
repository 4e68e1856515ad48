"""What `dit-accel bench --shapes` does: the plan of what is timed, the lines as they come, the table."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dit_accel.cli.console import OUT, plain_table
from dit_accel.errors import ConfigError
from dit_accel.files import held

from ..runs.results import Line, append_line, read_lines
from .options import BenchOptions

BUSY = 0.5
"""Load of the system from which on it is not quiet."""

if TYPE_CHECKING:
    from .attention_budget import Group

DTYPES = ("float32", "bfloat16")
"""Both are timed where none is named: which is the quicker one depends on the processor."""

WIDTH = 200
"""Characters that the table takes; cells that wrap can't be compared."""


def bench_attention(options: BenchOptions, say: Callable[[str], None]) -> list[Line]:
    """Time the shapes that a user names; return the lines of all of them, earlier ones from the output included.

    Raises:
        ConfigError: for unknown shapes, heads that a model has not, or a device that can't be used.
        Busy: if another run writes to the output.
    """
    import torch
    from dit_accel_pipelines.generation.loading import pick_device

    from .attention_budget import Machine, plan_groups, system_load
    from .attention_shapes import shapes_of
    from .attention_timing import run_groups

    started, shapes = time.perf_counter(), shapes_of(options.shapes or "")
    machine = Machine(
        device=pick_device(options.device), heads=options.heads, most_rounds=options.rounds, limit=options.limit,
        load=system_load(),
    )  # fmt: skip
    dtypes = [getattr(torch, name) for name in ([options.dtype] if options.dtype else DTYPES)]
    with held(options.output) if options.output else contextlib.nullcontext():
        lines = _known(options.output)
        groups = plan_groups(shapes, dtypes, machine, options.budget, lines)
        _say_plan(groups, options, machine.load, say)
        for made in run_groups(groups, machine, started + options.budget, say):
            for line in made:
                if options.output:
                    append_line(options.output, line)
                lines.append(line)
    return lines


def _known(output: Path | None) -> list[Line]:
    """Return the lines of an earlier run; refuse a file that holds something else."""
    from .attention_budget import KEY

    lines = read_lines(output) if output else []
    if any(name not in line for line in lines for name in KEY):
        raise ConfigError(f"{output} has lines that are none of bench --shapes; name another file, or a new one")
    return lines


def _say_plan(groups: "Sequence[Group]", options: BenchOptions, load: float | None, say: Callable[[str], None]) -> None:
    """Say what is about to be timed, how long it should take, and what there is no time for."""
    if not groups:
        say(f"nothing is left to time: {options.output} holds all of it")
        return
    expected = sum(group.expected() for group in groups)
    say(f"heads of each call: {options.heads}; about {expected:,.0f} s of at most {options.budget:,.0f} s (--budget)")
    if load is not None and load >= BUSY:
        say(f"the system's load is {load:.1f}: other processes take part of the time that is measured")
    for group in groups:
        parts = [f"{len(group.arms)} calls in turn, rounds: {group.rounds}"] if group.arms else []
        parts += [f"{arm.name} left out: {reason}" for arm, reason in group.left_out.items()]
        say(f"  {group.label}: {'; '.join(parts)}")


def show_attention(lines: Sequence[Line]) -> None:
    """Print the table, machine by machine, and what follows from it."""
    from .attention_table import COLUMNS, RIGHT, cells, conditions, last_of, machine_of, verdicts

    found = last_of(lines)
    for machine in dict.fromkeys(machine_of(line) for line in found):
        own = [line for line in found if machine_of(line) == machine]
        OUT.print(conditions(own), markup=False, soft_wrap=True)
        table = plain_table(*COLUMNS, right=RIGHT)
        for line in own:
            if "reason" not in line:
                table.add_row(*cells(line))
        Console(highlight=False, width=max(OUT.width, WIDTH)).print(table)
        left_out = [f"{line['shape']}, {line['dtype']}, {line['arm']}: {line['reason']}" for line in own
                    if "reason" in line]  # fmt: skip
        for text in [*(f"left out: {one}" for one in left_out), *verdicts(own)]:
            OUT.print(text, markup=False, soft_wrap=True)
