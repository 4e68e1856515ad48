"""The heat map of a profile: every block's score at every step, by transformer and criterion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.files import written_whole


def write_heat_map(content: Mapping[str, Any], path: Path) -> None:
    """Write the heat map of a profile's content as a PNG: a row a transformer, a panel a criterion it knows."""
    from matplotlib.figure import Figure

    entries = content["transformers"]
    criteria = [name for name, rows in next(iter(entries.values()))["by_step"].items() if any(rows)]
    tallest = max(entry["blocks"] for entry in entries.values())
    size = (4.2 * len(criteria), max(2.6, 0.9 + 0.12 * tallest) * len(entries))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(entries), len(criteria), squeeze=False)
    for row, (name, entry) in zip(axes, entries.items(), strict=True):
        for axis, criterion in zip(row, criteria, strict=True):
            values = np.array(entry["by_step"][criterion], float)
            image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
            figure.colorbar(image, ax=axis)
            axis.set_title(f"{name}: {criterion}")
            axis.set_xlabel("step")
            axis.set_ylabel("block (>: cached)" if criterion == content["criterion"] else "block")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.yaxis.get_major_locator().set_params(integer=True)
            if criterion == content["criterion"]:
                for block in entry["cached"]:
                    axis.text(-0.7, block, ">", ha="right", va="center", color="red")
    figure.suptitle(f"{content['model']}: blocks by {content['criterion']}, {len(content['runs'])} runs")
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=100)
