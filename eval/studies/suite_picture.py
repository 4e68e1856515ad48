"""Draws a suite's results as a PNG: `python eval/studies/suite_picture.py SUITE.toml`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dit_accel_eval.runs.results import read_lines
from dit_accel_eval.suites.comparison import figures
from dit_accel_eval.suites.plots import draw
from dit_accel_eval.suites.suite import read_suite

from dit_accel import DitAccelError


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a suite's results; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--results", type=Path, help="JSON lines; default: results/<suite>.jsonl beside the suites")
    parser.add_argument("--out", type=Path, help="PNG; default: docs/evidence/<suite>.png")
    options = parser.parse_args(arguments)
    try:
        suite = read_suite(options.suite)
        lines = options.results or options.suite.parent.parent / "results" / f"{suite.name}.jsonl"
        arms = figures(suite, read_lines(lines))
        clips = max((arm.clips for arm in arms), default=suite.clips)
        title = f"{suite.name}: {suite.model}, {clips} held-out clips"
        draw(arms, title, options.out or Path("docs/evidence") / f"{suite.name}.png")
    except DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
