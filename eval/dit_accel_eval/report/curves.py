"""Curves and maps of a report as data in the page: a metric by frame, work, seconds and tiles by step; and costs."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runs.results import Line
from ..suites.plots import new_figure
from .figures import Report, judged
from .lines import words_of

MOST = 8
"""Arms that are drawn at most, those of the highest mean PSNR; more can't be distinguished."""

MIB = 2**20
ACROSS = 4
"""Panels of the density maps beside each other."""


def curves(report: Report) -> list[tuple[str, str, str]]:
    """Return (metric in words, figure as a data URI, in words what it shows) of every metric kept by frame."""
    names = dict.fromkeys(name for line in report.results.lines for name in line.get("by_frame", ()))
    found = []
    for name in names:
        lines = _means(report, name)
        if any(len(values) > 1 for values in lines.values()):
            text = [f"{arm} {min(values):.4g} at {int(np.argmin(values)) + 1}" for arm, values in lines.items()]
            uri = svg_uri(lambda name=name, lines=lines: figure("frame, or pair of neighbours", words_of(name), lines))
            found.append((words_of(name), uri, f"Lowest value and its place by arm: {', '.join(text)}."))
    return found


def _means(report: Report, name: str) -> dict[str, list[float]]:
    """Return arm -> its mean over clips, frame by frame, of the arms whose clips are of one length."""
    best = sorted(judged(report), key=lambda arm: -arm.psnr.mean)[:MOST]
    found = {}
    for arm in best:
        rows = [line["by_frame"][name] for line in report.lines_of(arm) if name in line.get("by_frame", {})]
        if rows and len({len(row) for row in rows}) == 1:
            found[arm.name] = np.mean(rows, axis=0).tolist()
    return found


def figure(across: str, words: str, lines: Mapping[str, Sequence[float]], *, marked: bool = False) -> Any:
    """Return a figure of matplotlib: a line an arm.

    Args:
        across: what is counted from 1.
        marked: whether every value has a mark.
    """
    figure = new_figure(11, 3)
    axes = figure.subplots()
    for number, (arm, values) in enumerate(lines.items()):
        axes.plot(
            range(1, len(values) + 1), values, ".-" if marked else "-", color=f"C{number}", label=arm, linewidth=1
        )
    axes.set_xlabel(across)
    axes.set_ylabel(words)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    return figure


def svg_uri(draw: Callable[[], Any]) -> str:
    """Return a figure as a data URI; the same figures give the same bytes."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dit-accel"}):
        draw().savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue().encode()).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Means over the clips of an arm that tell of it.

    Attributes:
        clips: how many clips tell.
        text: seconds until the first step.
        denoise: seconds of all steps.
        decode: seconds from the last step to the frames.
        step: median seconds of a step.
        memory: the most MiB that were held, None where that is not known.
    """

    arm: str
    clips: int
    text: float
    denoise: float
    decode: float
    step: float
    memory: float | None


def costs(report: Report) -> list[Cost]:
    """Return what every arm's stages took, of the arms whose lines tell."""
    found = []
    for arm in report.arms:
        lines = [line for line in report.lines_of(arm) if "times" in line]
        if lines:
            means = {key: float(np.mean([one["times"][key] for one in lines])) for key in ("text", "denoise", "decode")}
            step = float(np.median([seconds for line in lines for seconds in line["times"]["steps"]]))
            held = [max(line["peak_memory_bytes"].values()) / MIB for line in lines if line.get("peak_memory_bytes")]
            memory = max(held, default=None)
            found.append(Cost(arm=arm.name, clips=len(lines), **means, step=step, memory=memory))
    return found


def threads_of(report: Report) -> str:
    """Return in words on how many threads the arms ran."""
    counts = sorted({line["times"]["threads"] for line in report.results.lines if "times" in line})
    return " or ".join(map(str, counts)) + (" thread" if counts == [1] else " threads")


def step_curves(report: Report) -> list[tuple[str, str, str]]:
    """Return (what is drawn, figure as a data URI, in words what it shows) of the steps' work and seconds."""
    kinds: dict[str, tuple[str, Callable[[Line], Sequence[float]]]] = {
        "work of a step, in dense steps": ("Cheapest", lambda line: line.get("step_work", ())),
        "seconds of a step": ("Quickest", lambda line: line.get("times", {}).get("steps", ())),
    }
    found = []
    for words, (least, values_of) in kinds.items():
        best = sorted(judged(report), key=lambda arm: -arm.psnr.mean)[:MOST]
        means = {arm.name: mean for arm in best if (mean := _mean(report.lines_of(arm), values_of))}
        if means:
            uri = svg_uri(lambda words=words, means=means: figure("step", words, means, marked=True))
            lows = [f"{arm} {min(values):.2g} at {int(np.argmin(values)) + 1}" for arm, values in means.items()]
            found.append((words, uri, f"{least} step and its place by arm: {', '.join(lows)}."))
    return found


def step_map(report: Report) -> Mapping[str, list[float]]:
    """Return arm -> the mean work of each of its steps, in dense steps, of the arms that are not dense runs."""
    arms = [arm for arm in report.arms if not report.is_dense(arm)]
    found = {arm.name: _mean(report.lines_of(arm), lambda line: line.get("step_work", ())) for arm in arms}
    return {arm: values for arm, values in found.items() if values}


def _mean(lines: Sequence[Line], values_of: Callable[[Line], Sequence[float]]) -> list[float]:
    """Return the mean over the lines that tell, step by step."""
    rows = [values_of(line) for line in lines]
    rows = [row for row in rows if row]
    return np.mean(rows, axis=0).tolist() if rows and len({len(row) for row in rows}) == 1 else []


def density_figure(report: Report) -> tuple[str, str] | None:
    """Return a map of the exact share of tiles by step and layer, a panel an arm, as a data URI, and in words.

    None where no attention call of any arm followed a plan.
    """
    maps = {}
    for arm in report.arms:
        rows = [line["density"] for line in report.lines_of(arm) if line.get("density")]
        if rows and len({len(row) for row in rows}) == 1:
            maps[arm.name] = _mean_map(rows)
    if not maps:
        return None
    message = [f"{arm} {np.nanmean(values):.2f}, from {np.nanmin(values):.2f}" for arm, values in maps.items()]
    words = f"Mean over its planned calls, and the lowest, by arm: {'; '.join(message)}."
    return svg_uri(lambda: _panels(maps)), words


def _mean_map(rows: Sequence[Sequence[Sequence[float | None]]]) -> np.ndarray:
    """Return the mean over clips [steps, layers] of the calls that followed a plan; nan where none did."""
    layers = max(len(step) for row in rows for step in row)
    values = np.array([[[*step, *[None] * (layers - len(step))] for step in row] for row in rows], dtype=np.float64)
    known = ~np.isnan(values)
    counts = known.sum(0)
    return np.where(counts > 0, np.where(known, values, 0).sum(0) / np.maximum(counts, 1), np.nan)


def _panels(maps: Mapping[str, np.ndarray]) -> Any:
    across = min(len(maps), ACROSS)
    down = -(-len(maps) // across)
    figure = new_figure(11, 0.6 + 2.4 * down)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(maps) :]:
        panel.axis("off")
    for panel, (arm, values) in zip(panels, maps.items(), strict=False):
        panel.set_facecolor("0.85")
        steps, layers = (range(count) for count in values.shape)
        drawn = panel.pcolormesh(
            [step + 1 for step in steps], layers, np.ma.masked_invalid(values.T), vmin=0, vmax=1, cmap="viridis"
        )
        panel.set_title(arm, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.set_ylabel("layer", fontsize=8)
        panel.tick_params(labelsize=7)
    figure.colorbar(drawn, ax=panels.tolist(), label="exact share of tiles", fraction=0.03)
    return figure
