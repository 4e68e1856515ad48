"""What a recommendation looks like in a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .recommend import Recommendation, Setting

WIDTH = 80
"""Columns of the text where no terminal tells."""


def text_of(found: Recommendation) -> str:
    """Return a recommendation as plain text."""
    shown = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
    with shown.capture() as captured:
        shown.print(drawn(found))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))


def drawn(found: Recommendation) -> Group:
    """Return the table, what each setting attaches, the sources and the notes, for a rich console."""
    sources = list(
        dict.fromkeys(text for one in found.settings for text in (_source(one, name) for name in one.sources))
    )
    marks = {text: f"[{number}]" for number, text in enumerate(sources, start=1)}
    frames = f", {found.num_frames} frames" if found.num_frames > 1 else ""
    size = f"{found.width} x {found.height} pixels{frames}, {found.num_inference_steps} steps, {found.tokens:,} tokens"
    title = Text.assemble((found.family, "bold"), f"  {size}")
    if found.hardware:
        title.append(f", {found.hardware}")
    parts = [title, Text(), _table(found, marks), Text(), _attached(found, marks)]
    if sources:
        parts += [Text(), _grid([(marks[text], text) for text in sources])]
    parts += [Text(), *(Padding(Text(f"note: {text}"), 0) for text in found.notes)]
    parts += [Text(), Text('Attach one: attach(pipe, preset="balanced"), or --preset balanced.')]
    return Group(*parts)


def _table(found: Recommendation, marks: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    timed = any(one.seconds is not None for one in found.settings)
    columns = ["setting", "faster", *(["seconds"] if timed else []), "PSNR to dense on tiny models", "memory", "needs"]
    for column in columns:
        table.add_column(
            column, justify="right" if column in ("faster", "seconds", "memory") else "left", overflow="fold"
        )
    for one in found.settings:
        seconds = [f"> {one.seconds:,.{0 if (one.seconds or 0) >= 10 else 1}f}"] if timed else []
        table.add_row(
            Text(one.name), f"{one.speedup:.2f}x", *seconds, Text(_loss(one, marks)), _bytes(one.state_bytes),
            Text("; ".join(one.needs) or "nothing"),
        )  # fmt: skip
    return table


def _loss(one: Setting, marks: dict[str, str]) -> str:
    """Return the losses in words, each with the number of its source."""
    parts: list[str] = []
    for name, value in one.losses.items():
        if value is None:
            text = f"{name} not measured"
        else:
            text = (
                f"{one.medians[name]:.0f} dB, of 9 in 10 {value:.0f} or more"
                if name in one.medians
                else f"{name} {value:.4g}"
            )
        parts.append(f"{text} {marks[_source(one, name if name in one.methods else one.name)]}")
    return ", ".join(parts) or "none"


def _source(one: Setting, name: str) -> str:
    text = one.sources[name]
    return f"{name} {text}" if name in one.methods else text


def _attached(found: Recommendation, marks: dict[str, str]) -> Table:
    """Return what each setting attaches, with the sources that its loss does not name."""
    rows: list[tuple[str, str]] = []
    for one in found.settings:
        parts = [
            f"{name} {what}" + (f" {marks[_source(one, name)]}" if name in one.sources.keys() - one.losses else "")
            for name, what in one.methods.items()
        ]
        rows.append((one.name, "; ".join(parts) or ("nothing acts in this run" if one.needs else "the model as it is")))
    return _grid(rows)


def _grid(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for left, right in rows:
        grid.add_row(Text(left), Text(right))
    return grid


def _bytes(value: int) -> str:
    return f"{value / 2**20:,.0f} MiB" if value else "0"
