"""`dit-accel doctor`: what this machine has and lacks, whether its kernels are right, and how fast they are."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..estimate.examination import DENSITY, Examination, examine
from .console import OUT, TALK, note, plain_table, print_json


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False) -> None:
    """Check and time the attention kernels on this machine; say what would make it faster.

    Takes up to two minutes. What is measured is kept: backend "auto" takes
    what won here, `dit-accel plan` and `dit-accel recommend` count by it.
    DIT_ACCEL_MEASURE=0 measures nothing.

    \b
    Examples:
      dit-accel doctor
      dit-accel doctor --json > machine.json
    """
    columns = TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=TALK, disable=not TALK.is_terminal, transient=True) as bar:
        task = bar.add_task("looking at the machine", total=None)
        found = examine(lambda text, done, total: bar.update(task, description=text, completed=done, total=total))
    for text in found.notes:
        note(text)
    if json:
        print_json(asdict(found))
    else:
        _print(found)


def _print(found: Examination) -> None:
    machine, versions = found.machine, found.versions
    table = Table.grid(padding=(0, 2))
    for label, value in (
        ("processor", f"{machine['processor']}  ({machine['instructions']}; torch uses {machine['torch_uses']})"),
        ("threads", f"{machine['threads']} of {machine['cores']} cores, {machine['memory_gib'] or '?'} GiB of memory"),
        ("cards", "; ".join(machine["cards"]) or "none that torch can use"),
        ("examined", machine["device"]),
        ("versions", ", ".join(f"{name} {version or '-'}" for name, version in versions.items())),
    ):
        table.add_row(label, value)
    OUT.print(table)
    table = plain_table("kernel", "version", "here")
    for one in found.candidates:
        table.add_row(one["name"], one["version"] or "", one["missing"] or _checked(found, one["name"]))
    OUT.print("", table, sep="\n")
    if found.races:
        OUT.print(
            f"\nTimes as fast as dense attention at a density of {DENSITY:g} (ideal: {1 / DENSITY:g}). Backend "
            '"auto" takes the fastest for such calls from now on.'
        )
        OUT.print(_race_table(found.races))
    if found.install:
        OUT.print("\nTo be faster:", *found.install, sep="\n- ", markup=False, soft_wrap=True)
    report = "`dit-accel doctor --json`, the command or the code that fails, and what it prints with --traceback"
    OUT.print(f"\nA bug report should hold the output of {report}.", style="dim")


def _checked(found: Examination, name: str) -> str:
    checks = [one for one in found.checks if one["kernel"] == name]
    wrong = [f"not used for {one['kind']}, since {one['fault']}" for one in checks if one["fault"]]
    right = f"right in {len(checks) - len(wrong)} of {len(checks)} self checks" if checks else "not checked"
    return "; ".join([right, *wrong])


def _race_table(races: list[dict[str, Any]]) -> Table:
    """Return a row for each shape: seconds of dense attention, and how many times as fast each kernel is."""
    names = list(dict.fromkeys(name for race in races for name in race.get("seconds", ()) if name != "dense"))
    table = plain_table("call", "tokens", "dtype", "dense", *names, right=("tokens", "dense", *names))
    for race in races:
        cells, dense = ["not measured"], race.get("seconds", {}).get("dense")
        if dense:
            speeds = {name: dense / seconds for name, seconds in race["seconds"].items()}
            best = max(speeds, key=speeds.__getitem__)
            cells = [f"{dense:.3g} s", *(f"{speeds[name]:.2f}" if name in speeds else "-" for name in names)]
            place = ["dense", *names].index(best)
            cells[place] = f"[bold]{cells[place]}"
        table.add_row(f"{race['model']} {race['size']}", f"{race['tokens']:,}", race["dtype"], *cells)
    return table
