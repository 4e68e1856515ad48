"""The command `dit-accel eval vbench`; what it needs is loaded when it runs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from dit_accel_pipelines.options import Json

from dit_accel import ConfigError
from dit_accel.cli.console import OUT, plain_table, print_json


def evaluate(
    totals: Annotated[
        Path | None,
        typer.Option(help="JSON of all sixteen raw scores, of which to print the totals.", metavar="SCORES.json"),
    ] = None,
    json: Json = False,
) -> None:
    """Measure videos by VBench's sixteen dimensions, and give its totals where all are there.

    Examples:

    dit-accel eval vbench --totals scores.json --json
    """
    if totals is None:
        raise ConfigError("nothing to do; name raw scores with --totals")
    _print_totals(totals, json)


def _print_totals(path: Path, json: bool) -> None:
    from .dimensions import DIMENSIONS
    from .totals import read_scores, totals

    raw = read_scores(path)
    found = totals(raw)
    if json:
        print_json(asdict(found))
        return
    table = plain_table("dimension", "group", "in its range", right=("in its range",))
    for name, value in found.normalized.items():
        table.add_row(name, DIMENSIONS[name].group, f"{100 * value:.2f}")
    OUT.print(table)
    OUT.print(f"Quality {100 * found.quality:.2f}  Semantic {100 * found.semantic:.2f}  Total {100 * found.total:.2f}")
