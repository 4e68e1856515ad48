"""A generation's report drawn: kept share of every step, layer and head, and which steps ran; a PNG or HTML."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.errors import ConfigError
from dit_accel.files import check_writable, written_whole
from dit_accel.report.html import folded, lines, piece, table
from dit_accel.report.report import Report
from dit_accel.report.sections import Strip

RAN, VALUE, DENSE = "#3b528b", "#d95f02", "0.82"  # steps in which a method acted, what it measured, dense calls
STAYED = -1.0  # stands for the kept share of attention calls that stayed dense
_COLUMNS = ("transformer", "step", "branch", "dense", "planned", "density", "pooled")


def write_heat_map(report: Report, path: Path) -> None:
    """Write the heat map of a report as a PNG, whole or not at all: one panel per transformer and branch."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"report().plot writes a PNG, got {path}; end the name in .png")
    check_writable(path, "the picture of report().plot")
    figure = _draw(report)
    if figure is None:
        nothing = "no attention call followed a plan, no cache decided on a step, and no guidance acted"
        raise ConfigError(f"report().plot has nothing to show: {nothing}; generate first")
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)


def report_html(report: Report) -> str:
    """Return a report as one piece of HTML that needs nothing else: first whether it helped, the rest folded."""
    first, figure, image = report.first_lines(), _draw(report), io.BytesIO()
    title = first[0] if first else ", ".join(report.methods) or "no method attached"
    parts = [lines(first[1:])] if first[1:] else []
    if figure is not None:
        figure.savefig(image, dpi=80, format="png")
        data = base64.b64encode(image.getvalue()).decode()
        parts.append(f'<img alt="what ran, by step" style="max-width:100%" src="data:image/png;base64,{data}">')
    parts.append(folded("all that ran", lines(line for line in str(report).splitlines() if line not in first)))
    if report.steps:
        rows = [
            (step.transformer, step.step_index, step.branch, step.dense_layers, step.sparse_layers,
             f"{step.density:.3f}", f"{step.pooled:.3f}") for step in report.steps
        ]  # fmt: skip
        parts.append(folded("steps", table(_COLUMNS, rows)))
    return piece(title, *parts)


def kept_shares(report: Report, transformer: str, branch: str) -> np.ndarray:
    """Return the kept share [layers, heads, steps] of one transformer and branch.

    `STAYED` stands for dense calls, NaN for those that did not run. Where no selection chose by head, heads are one.
    """
    ran = [step for step in report.steps if step.transformer == transformer]
    calls = [call for call in report.calls if call.transformer == transformer]
    layers = max([1, *(step.dense_layers + step.sparse_layers for step in ran), *(1 + call.layer for call in calls)])
    planned = [call for call in calls if call.branch == branch]
    shares = np.full((layers, max([1, *(len(call.by_head) for call in planned)]), _steps(report)), np.nan)
    shares[..., [step.step_index for step in ran if step.branch == branch]] = STAYED
    for call in planned:
        shares[call.layer, :, call.step_index] = call.by_head or call.density
    return shares


def _steps(report: Report) -> int:
    """Return the steps of the run, skipped ones included."""
    skipped = [step for section in report.sections for strip in section.strips for step in strip.steps]
    return 1 + max([*skipped, *(step.step_index for step in report.steps)])


def _draw(report: Report) -> Any:
    """Return the figure of matplotlib; None where there is nothing to show."""
    sections = [section for section in report.sections if section.strips]
    if not (report.calls or sections):
        return None
    from matplotlib.figure import Figure

    forwards = [*report.steps, *(strip for section in sections for strip in section.strips)]
    panels = list(dict.fromkeys((part.transformer, part.branch) for part in forwards))
    maps = [kept_shares(report, *panel) for panel in panels] if report.calls else []
    rows = max((shares.shape[0] * shares.shape[1] for shares in maps), default=0)
    heights = [*([min(12.8, max(2.0, 0.2 + rows * 0.06))] if maps else []), *(0.9 for _ in sections)]
    figure = Figure(figsize=(1.6 + 4.2 * len(panels), 1.2 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), len(panels), squeeze=False, sharex=True, height_ratios=heights)
    images = [_map(axis, shares) for axis, shares in zip(axes[0], maps, strict=False)]  # no maps: strips alone
    if images:
        by_head = any(shares.shape[1] > 1 for shares in maps)
        axes[0][0].set_ylabel("layer (a line in it is a head)" if by_head else "layer")
        figure.colorbar(images[-1], ax=list(axes[0]), label="kept share of the tiles (grey: dense)")
    for row, section in zip(axes[len(heights) - len(sections) :], sections, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            _strips(axis, [strip for strip in section.strips if (strip.transformer, strip.branch) == panel])
        row[0].set_ylabel(section.method)
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title(", ".join(panel))
    for axis in axes[-1]:
        axis.set_xlabel(axis.get_xlabel() or "step")
        axis.set_xlim(-0.5, _steps(report) - 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
    note = f": density {report.density:.3f} over the run" if maps else ""
    figure.suptitle(f"{', '.join(report.methods)}{note}")
    return figure


def _map(axis: Any, shares: np.ndarray) -> Any:
    from matplotlib import colormaps

    layers, heads, steps = shares.shape
    image = axis.imshow(
        shares.reshape(layers * heads, steps), cmap=colormaps["viridis"].with_extremes(under=DENSE, bad="white"),
        vmin=0.0, vmax=1.0, aspect="auto", extent=(-0.5, steps - 0.5, layers - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    for layer in range(1, layers if heads > 1 and layers <= 60 else 0):
        axis.axhline(layer - 0.5, color="white", linewidth=0.6)
    axis.yaxis.get_major_locator().set_params(integer=True)
    return image


def _strips(axis: Any, strips: list[Strip]) -> None:
    """Draw the steps in which a method acted as bars, and what it measured over its threshold as a line."""
    axis.set(ylim=(0, 1), yticks=[])
    if not strips:
        axis.set_axis_off()
    for strip in strips:
        acted = [step for step, reused in zip(strip.steps, strip.reused, strict=True) if not reused]
        axis.bar(acted, 1.0, width=0.9, color=RAN)
        skips = any(strip.reused) or strip.did == "computed"
        count = f"{len(acted)} of {len(strip.steps)}" if skips else f"{len(acted)} times"
        axis.set_xlabel(f"step; bars: {strip.did} {count}{_values(axis, strip)}", fontsize=8)


def _values(axis: Any, strip: Strip) -> str:
    """Draw what a method measured, and return it in words; "" where it measured nothing."""
    measured = [(step, value) for step, value in zip(strip.steps, strip.values, strict=True) if value is not None]
    if not measured:
        return ""
    steps, values = zip(*measured, strict=True)
    known = [value for value in (*values, strip.threshold) if value is not None and np.isfinite(value)]
    top = 1.15 * max(known, default=1.0) or 1.0
    line = axis.twinx()
    line.plot(steps, np.nan_to_num(np.array(values), nan=top, posinf=top), "o-", color=VALUE, ms=2.5, lw=0.8)
    line.set_ylim(0, top)
    line.tick_params(labelsize=7)
    line.yaxis.get_major_locator().set_params(nbins=3)
    if strip.threshold is None:
        return f"; line: {strip.measured}"
    line.axhline(strip.threshold, color=VALUE, linewidth=0.8, linestyle="--")
    return f"; line: {strip.measured}, dashed: its threshold {strip.threshold:g}"
