"""What studies share: their command lines, and result lines under the table that they make."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from dit_accel_eval.runs.conditions import processor_name
from dit_accel_eval.runs.results import Line, append_line, read_lines, write_lines

RESULTS = Path(__file__).parents[1] / "results"


def study(
    doc: str | None,
    arguments: Sequence[str] | None,
    measure: Callable[[argparse.Namespace, list[Line]], Iterable[Line]],
    table: Callable[[list[Line]], str],
    *,
    out: str,
    resumes: bool = False,
    threads: int = 1,
    **defaults: Any,
) -> int:
    """Run a study's command: measure, write one JSON line each, and print the table; returns the exit code.

    Args:
        doc: the study's, whose first line describes the command.
        arguments: of the command line; None: this process's.
        measure: (options, lines of an earlier run) -> further lines.
        table: lines -> Markdown.
        out: file in eval/results, where ``--out`` names no other.
        resumes: whether an earlier run's lines stay, and each line is written as it is made; else all replace them.
        threads: of torch, where ``--threads`` gives no others.
        defaults: option -> what it is by default.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name, value in {**defaults, "threads": threads, "out": RESULTS / out}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(%(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of an earlier run, measure nothing")
    options = parser.parse_args(arguments)
    if not options.table:
        torch.set_num_threads(options.threads)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        made = []
        for line in measure(options, read_lines(options.out) if resumes else []):
            if resumes:
                append_line(options.out, line)
            made.append(line)
            print(json.dumps(line)[:200], file=sys.stderr, flush=True)
        if not resumes:
            write_lines(options.out, made)
    print(table(read_lines(options.out)))
    return 0


def about() -> dict[str, Any]:
    """Return what every timed line says of the machine."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "processor": processor_name()}
