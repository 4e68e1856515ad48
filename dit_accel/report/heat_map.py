"""The report's picture: kept share of every step, layer and head as a heat map. Loads matplotlib when called.

Reports are read by their fields alone, so that the report may import this file.
"""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, MissingBackend
from ..files import written_whole

DENSE, NOT_RUN = "0.82", "1.0"
"""Greys of attention calls that stayed dense and of steps that did not run."""


def write_heat_map(report: Any, path: Path) -> None:
    """Write the heat map of a report as a PNG, whole or not at all: one panel per transformer and branch.

    Raises:
        ConfigError: if nothing followed a plan, or the path is not a .png in an existing folder.
        MissingBackend: without matplotlib.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"report().plot writes a PNG, got {path}; end the name in .png")
    if not path.parent.is_dir():
        raise ConfigError(f"report().plot can't write {path}: {path.parent} is not a folder; create it first")
    if not report.calls:
        raise ConfigError("report().plot has nothing to show: no attention call followed a plan; generate first")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingBackend("report().plot needs matplotlib, found none; pip install 'matplotlib>=3.8'")
    figure = _draw(report)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)


def heat_map_png(report: Any, dpi: int = 80) -> bytes | None:
    """Return the heat map as the bytes of a PNG; None where there is nothing to show, or no matplotlib."""
    if not report.calls or importlib.util.find_spec("matplotlib") is None:
        return None
    image = io.BytesIO()
    _draw(report).savefig(image, dpi=dpi, format="png")
    return image.getvalue()


def kept_shares(report: Any, transformer: str, branch: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the kept share [layers x heads, steps] of one transformer and branch, and which calls were dense.

    Shares are NaN where nothing followed a plan; the second array is bool, of the same shape. Where no selection chose
    by head, a layer's rows are all alike.
    """
    forwards = [step for step in report.steps if (step.transformer, step.branch) == (transformer, branch)]
    calls = [call for call in report.calls if (call.transformer, call.branch) == (transformer, branch)]
    heads = max((len(call.by_head) for call in calls), default=0) or 1
    layers = max(step.dense_layers + step.sparse_layers for step in forwards)
    steps = max(step.step_index for step in report.steps) + 1
    shares = np.full((layers, heads, steps), np.nan)
    for call in calls:
        shares[call.layer, :, call.step_index] = call.by_head or call.density
    ran = np.zeros(steps, bool)
    ran[[step.step_index for step in forwards]] = True
    dense = np.isnan(shares) & ran
    return shares.reshape(layers * heads, steps), dense.reshape(layers * heads, steps)


def _draw(report: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((step.transformer, step.branch) for step in report.steps))
    data = [kept_shares(report, *panel) for panel in panels]
    height = min(14.0, max(3.2, 1.4 + max(len(shares) for shares, _ in data) * 0.06))
    figure = Figure(figsize=(1.6 + 4.2 * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    images, by_head = [], False
    for axis, panel, (shares, dense) in zip(axes, panels, data, strict=True):
        layers = max(s.dense_layers + s.sparse_layers for s in report.steps if (s.transformer, s.branch) == panel)
        images.append(_panel(axis, shares, dense, layers))
        by_head |= len(shares) > layers
        axis.set_title(", ".join(panel))
    axes[0].set_ylabel("layer (a line in it is a head)" if by_head else "layer")
    figure.colorbar(images[-1], ax=list(axes), label="kept share of the tiles (grey: dense)")
    figure.suptitle(f"{', '.join(report.methods)}: density {report.density:.3f} over the run")
    return figure


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
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    return image
