"""A recommendation: what could be attached to a model at a size, as values, as JSON and as a table."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..methods.few_steps import FEW

WIDTH = 80
"""Columns of the text where no terminal tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One thing that could be attached, or nothing.

    Attributes:
        name: a preset's level, ``dense``, or the name of a tuned file.
        methods: method -> what it does in this run, in words; of a preset those alone that act in it.
        speedup: of the denoising loop. Predicted, as `dit-accel plan` does: by the FLOPs of the sparse attention, and
            by the share of the forwards that the cache skipped where that was measured. Of a tuned file measured, by
            work.
        seconds: the least that the loop takes on the hardware, by its data sheet; None: not known.
        losses: method -> dB to the user's own dense run that nine of ten prompts reached where it was measured, with as
            many steps or the nearest, the least of the tiny models; None: not measured; without those for outputs
            beyond the trained size, where the dense run is no measure. Of a tuned file its metric -> the mean against
            the converged run.
        medians: method -> the same dB of the median prompt, where it was measured.
        sources: method, or tuned file -> the figure that this rests on.
        state_bytes: memory that the methods hold besides the model, but for what a cache stores.
        needs: what else it takes, such as a GPU with Triton; and what of a preset waits for a larger run.
    """

    name: str
    methods: Mapping[str, str] = field(default_factory=dict)
    speedup: float = 1.0
    seconds: float | None = None
    losses: Mapping[str, float | None] = field(default_factory=dict)
    medians: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    state_bytes: int = 0
    needs: tuple[str, ...] = ()

    @property
    def psnr(self) -> float | None:
        """The least of the presets' dB to the dense run; None where a method of it was not measured, or none acts."""
        measured = [loss for loss in self.losses.values() if loss is not None]
        return min(measured, default=None) if len(measured) == len(self.losses) else None

    def source(self, name: str) -> str:
        """Return the figure that a method, or a tuned file's metric, rests on, with the method's name."""
        return f"{name} {self.sources[name]}" if name in self.methods else self.sources[self.name]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Recommendation:
    """What could be attached to a model at a size: what was tuned on it, then presets and dense, the fastest first.

    Attributes:
        family: the model's sizes.
        height: output height in pixels.
        width: output width in pixels.
        num_frames: output frames, rounded as the pipeline does.
        num_inference_steps: denoising steps.
        tokens: visual tokens of one attention call.
        hardware: name of the card or its memory, or None.
        weight_bytes: of the transformers: of a pipeline what it has, of a named model at least the matrices of its
            blocks in 16 bits.
        settings: the rows.
        notes: what a user should know.
    """

    family: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    tokens: int
    hardware: str | None
    weight_bytes: int
    settings: Sequence[Setting]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the recommendation as plain values, for JSON."""
        rows = [{**asdict(row), "needs": list(row.needs), "psnr": row.psnr} for row in self.settings]
        values = {name: getattr(self, name) for name in Recommendation.__slots__}
        return {**values, "settings": rows, "notes": list(self.notes)}

    def __rich__(self) -> Group:
        """Return the table, what each setting attaches, the sources and the notes, for a rich console."""
        marks: dict[str, str] = {}
        for row in self.settings:
            for name in row.sources:
                marks.setdefault(row.source(name), f"[{len(marks) + 1}]")
        frames = f", {self.num_frames} frames" if self.num_frames > 1 else ""
        size = f"{self.width} x {self.height} pixels{frames}, {self.num_inference_steps} steps, {self.tokens:,} tokens"
        title = Text.assemble((self.family, "bold"), f"  {size}{f', {self.hardware}' if self.hardware else ''}")
        parts = [title, Text(), _table(self.settings, marks), Text(), _grid(_attached(self.settings, marks))]
        if marks:
            parts += [Text(), _grid([(mark, text) for text, mark in marks.items()])]
        parts += [Text(), *(Text(f"note: {text}") for text in self.notes)]
        level = FEW if any(setting.name == FEW for setting in self.settings) else "balanced"
        return Group(*parts, Text(), Text(f'Attach one: attach(pipe, preset="{level}"), or --preset {level}.'))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))

    __repr__ = __str__


def _table(rows: Sequence[Setting], marks: Mapping[str, str]) -> Table:
    timed = any(row.seconds is not None for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in (
        "setting",
        "faster",
        *(["seconds"] if timed else []),
        "PSNR to dense on tiny models",
        "memory",
        "needs",
    ):
        table.add_column(
            column, justify="right" if column in ("faster", "seconds", "memory") else "left", overflow="fold"
        )
    for row in rows:
        seconds = [f"> {row.seconds:,.{0 if (row.seconds or 0) >= 10 else 1}f}"] if timed else []
        held = f"{row.state_bytes / 2**20:,.0f} MiB" if row.state_bytes else "0"
        losses = Text(", ".join(_losses(row, marks)) or "none")
        needs = Text("; ".join(row.needs) or "nothing")
        table.add_row(Text(row.name), f"{row.speedup:.2f}x", *seconds, losses, held, needs)
    return table


def _losses(row: Setting, marks: Mapping[str, str]) -> list[str]:
    """Return each loss in words, with the number of its source."""
    parts: list[str] = []
    for name, loss in row.losses.items():
        text = f"{name} not measured" if loss is None else f"{name} {loss:.4g}"
        if loss is not None and name in row.medians:
            text = f"{row.medians[name]:.0f} dB, of 9 in 10 {loss:.0f} or more"
        parts.append(f"{text} {marks[row.source(name)]}")
    return parts


def _attached(rows: Sequence[Setting], marks: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return what each setting attaches, with the sources that its loss does not name."""
    lines: list[tuple[str, str]] = []
    for row in rows:
        parts = [
            f"{name} {what}" + (f" {marks[row.source(name)]}" if name in row.sources.keys() - row.losses else "")
            for name, what in row.methods.items()
        ]
        nothing = "nothing acts in this run" if row.needs else "the model as it is"
        lines.append((row.name, "; ".join(parts) or nothing))
    return lines


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for left, right in rows:
        grid.add_row(Text(left), Text(right))
    return grid
