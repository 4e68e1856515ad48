"""A generation's report drawn: kept share of every step, layer and head, and which steps ran; a PNG or HTML.

`Report.plot` and notebooks find it by the entry points of ``dit_accel.drawings``. It loads matplotlib when called.
"""

import base64
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.errors import ConfigError, MissingBackend
from dit_accel.files import written_whole
from dit_accel.report.html import folded, lines, piece, table
from dit_accel.report.report import Report
from dit_accel.report.sections import Section, Strip

DENSE, NOT_RUN = "0.82", "1.0"
"""Greys of attention calls that stayed dense and of steps that did not run."""

_COLUMNS = ("transformer", "step", "branch", "dense", "planned", "density", "pooled")

RAN, VALUE = "#3b528b", "#d95f02"
"""Colours of steps in which a method acted, as a cache that computes does, and of what it measured."""


def write_heat_map(report: Report, path: Path) -> None:
    """Write the heat map of a report as a PNG, whole or not at all: one panel per transformer and branch.

    Below it, or alone where all attention was dense, the steps that a cache computed and those that guidance changed.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"report().plot writes a PNG, got {path}; end the name in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"report().plot can't write {path}: {path.parent} is not a folder; create it first")
    if not _has_content(report):
        raise ConfigError(
            "report().plot has nothing to show: no attention call followed a plan, no cache decided on a step, and no "
            "guidance acted; "
            "generate first"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingBackend("report().plot needs matplotlib, found none; pip install 'matplotlib>=3.8'")
    figure = _draw(report)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)


def heat_map_png(report: Report, dpi: int = 80) -> bytes | None:
    """Return the heat map as the bytes of a PNG; None where there is nothing to show, or no matplotlib."""
    if not _has_content(report) or importlib.util.find_spec("matplotlib") is None:
        return None
    image = io.BytesIO()
    _draw(report).savefig(image, dpi=dpi, format="png")
    return image.getvalue()


def _has_content(report: Report) -> bool:
    return bool(report.calls) or any(section.strips for section in report.sections)


def kept_shares(report: Report, transformer: str, branch: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the kept share [layers x heads, steps] of one transformer and branch, and which calls were dense.

    Shares are NaN where nothing followed a plan; the second array is bool, of the same shape. Where no selection chose
    by head, a layer's rows are all alike.
    """
    forwards = [step for step in report.steps if (step.transformer, step.branch) == (transformer, branch)]
    calls = [call for call in report.calls if (call.transformer, call.branch) == (transformer, branch)]
    heads = max((len(call.by_head) for call in calls), default=0) or 1
    layers = _layers(report, transformer)
    steps = _steps(report)
    shares = np.full((layers, heads, steps), np.nan)
    for call in calls:
        shares[call.layer, :, call.step_index] = call.by_head or call.density
    ran = np.zeros(steps, bool)
    ran[[step.step_index for step in forwards]] = True
    dense = np.isnan(shares) & ran
    return shares.reshape(layers * heads, steps), dense.reshape(layers * heads, steps)


def _layers(report: Report, transformer: str) -> int:
    """Return the attention layers of a transformer, of which some forwards run a part."""
    ran = [step.dense_layers + step.sparse_layers for step in report.steps if step.transformer == transformer]
    return max([1, *ran, *(1 + call.layer for call in report.calls if call.transformer == transformer)])


def _steps(report: Report) -> int:
    """Return the steps of the run, skipped ones included."""
    skipped = [step for section in report.sections for strip in section.strips for step in strip.steps]
    return max([*skipped, *(step.step_index for step in report.steps)]) + 1


def _draw(report: Report) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [section for section in report.sections if section.strips]
    panels = list(dict.fromkeys((one.transformer, one.branch) for one in _forwards(report, drawn)))
    maps = [kept_shares(report, *panel) for panel in panels] if report.calls else []
    tall = [min(12.8, max(2.0, 0.2 + max(len(shares) for shares, _ in maps) * 0.06))] if maps else []
    heights = [*tall, *(0.9 for _ in drawn)]
    figure = Figure(figsize=(1.6 + 4.2 * len(panels), 1.2 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), len(panels), squeeze=False, sharex=True, height_ratios=heights)
    if maps:
        _draw_maps(figure, axes[0], report, panels, maps)
    for row, section in zip(axes[len(tall) :], drawn, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            own = [strip for strip in section.strips if (strip.transformer, strip.branch) == panel]
            for strip in own:
                _strip(axis, strip)
            if not own:
                axis.set_axis_off()
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


def _forwards(report: Report, sections: list[Section]) -> list[Any]:
    """Return all that has a transformer and a branch of its own."""
    return [*report.steps, *(strip for section in sections for strip in section.strips)]


def _draw_maps(figure: Any, axes: Any, report: Report, panels: list[Any], maps: list[Any]) -> None:
    images, by_head = [], False
    for axis, panel, (shares, dense) in zip(axes, panels, maps, strict=True):
        layers = _layers(report, panel[0])
        images.append(_panel(axis, shares, dense, layers))
        by_head |= len(shares) > layers
    axes[0].set_ylabel("layer (a line in it is a head)" if by_head else "layer")
    figure.colorbar(images[-1], ax=list(axes), label="kept share of the tiles (grey: dense)")


def _strip(axis: Any, strip: Strip) -> None:
    """Draw the steps in which a method acted as bars, and what it measured over its threshold as a line."""
    acted = [step for step, reused in zip(strip.steps, strip.reused, strict=True) if not reused]
    axis.set_facecolor(NOT_RUN)
    axis.bar(acted, 1.0, width=0.9, color=RAN)
    axis.set_ylim(0, 1)
    axis.set_yticks([])
    note = ""
    measured = [(step, value) for step, value in zip(strip.steps, strip.values, strict=True) if value is not None]
    if measured:
        steps, values = zip(*measured, strict=True)
        known = [value for value in (*values, strip.threshold) if value is not None and np.isfinite(value)]
        top = 1.15 * max(known, default=1.0) or 1.0
        line = axis.twinx()
        line.plot(steps, np.nan_to_num(np.array(values), nan=top, posinf=top), "o-", color=VALUE, ms=2.5, lw=0.8)
        line.set_ylim(0, top)
        line.tick_params(labelsize=7)
        line.yaxis.get_major_locator().set_params(nbins=3)
        note = f"; line: {strip.measured}"
        if strip.threshold is not None:
            line.axhline(strip.threshold, color=VALUE, linewidth=0.8, linestyle="--")
            note += f", dashed: its threshold {strip.threshold:g}"
    skips = any(strip.reused) or strip.did == "computed"
    count = f"{len(acted)} of {len(strip.steps)}" if skips else f"{len(acted)} times"
    axis.set_xlabel(f"step; bars: {strip.did} {count}{note}", fontsize=8)


def _panel(axis: Any, shares: np.ndarray, dense: np.ndarray, layers: int) -> Any:
    from matplotlib.colors import ListedColormap

    rows, steps = shares.shape
    heads = rows // layers
    extent = (-0.5, steps - 0.5, layers - 0.5, -0.5)
    options = dict(aspect="auto", extent=extent, interpolation="nearest")
    axis.set_facecolor(NOT_RUN)
    axis.imshow(np.where(dense, 0.0, np.nan), cmap=ListedColormap([DENSE]), **options)
    image = axis.imshow(shares, cmap="viridis", vmin=0.0, vmax=1.0, **options)
    if heads > 1 and layers <= 60:
        for layer in range(1, layers):
            axis.axhline(layer - 0.5, color="white", linewidth=0.6)
    axis.yaxis.get_major_locator().set_params(integer=True)
    return image


def report_html(report: Report) -> str:
    """Return a report as one piece of HTML that needs nothing else: first whether it helped, the rest folded."""
    first = report.first_lines()
    title = first[0] if first else ", ".join(report.methods) or "no method attached"
    others = [line for line in str(report).splitlines() if line not in first]
    parts = [lines(first[1:]) if first[1:] else "", _picture(report), folded("all that ran", lines(others))]
    if report.steps:
        rows = [
            (one.transformer, one.step_index, one.branch, one.dense_layers, one.sparse_layers, f"{one.density:.3f}",
             f"{one.pooled:.3f}") for one in report.steps
        ]  # fmt: skip
        parts.append(folded("steps", table(_COLUMNS, rows)))
    return piece(title, *parts)


def _picture(report: Report) -> str:
    image = heat_map_png(report)
    if image is None:
        return ""
    data = base64.b64encode(image).decode()
    return f'<img alt="what ran, by step" style="max-width:100%" src="data:image/png;base64,{data}">'
