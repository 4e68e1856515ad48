"""Curves of a report, a line an arm: a metric from frame to frame; and figures as data in the page."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..suites.plots import new_figure
from .figures import Report, judged
from .lines import words_of

MOST = 8
"""Arms that are drawn at most, those of the highest mean PSNR; more can't be told apart."""


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
        words: what is drawn.
        lines: arm -> its values.
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
