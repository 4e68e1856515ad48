"""The command line that modules with suites of their own share: run what is missing, then print the table."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dit_accel import DitAccelError

from .results import Line, read_lines
from .suite import Suite, read_suite


def suite_command(
    about: str | None,
    arguments: Sequence[str] | None,
    run: Callable[[Suite, Path], None],
    table: Callable[[Suite, Sequence[Line]], str],
) -> int:
    """Run a suite, or only print the table of what has run; returns the exit code.

    Args:
        about: the module's docstring.
        arguments: of the command line; None: those of the process.
        run: appends what the file lacks.
        table: the suite's lines as a table.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--out", type=Path, help="JSON lines; default: results/<suite>.jsonl beside the suite's folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the table of an earlier run, generate nothing")
    options = parser.parse_args(arguments)
    try:
        suite = read_suite(options.suite)
        out = options.out or options.suite.parent.parent / "results" / f"{suite.name}.jsonl"
        if not options.table:
            torch.set_num_threads(options.threads)
            run(suite, out)
        print(table(suite, read_lines(out)))
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
