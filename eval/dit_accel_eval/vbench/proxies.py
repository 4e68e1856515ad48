"""How well metrics stand in for VBench's dimensions, where its networks are missing: Spearman's rank correlations.

Of each clip the embedded world's own scores are known, and the metrics that one might take for them. The figure is the
rank correlation within a scene: whether a metric orders what was done to one clip as the world does.
"""

from collections.abc import Iterable, Sequence

from ..metrics import metric
from ..runs.results import Line
from ..statistics import estimate, rank_correlation

PROXIES: dict[str, tuple[str, ...]] = {
    "subject_consistency": ("consistency@efflite0",),
    "background_consistency": ("consistency@efflite0",),
    "temporal_flickering": ("flickering", "warp-error@dis"),
    "motion_smoothness": ("smoothness@rife", "warp-error@dis"),
    "dynamic_degree": ("dynamic@dis", "motion"),
    "imaging_quality": ("sharpness", "brisque"),
}
"""Dimension -> metrics that one might take for it; for the others there is none without a network of VBench's."""

NAMES = tuple(dict.fromkeys(name for names in PROXIES.values() for name in names))


def by_scene(lines: Iterable[Line], dimension: str, name: str) -> list[float]:
    """Return the rank correlation of a metric with the world's score within each scene; turned where less is better."""
    sign = -1 if metric(name).better == "less" else 1
    kept: dict[int, list[tuple[float, float]]] = {}
    for line in lines:
        if dimension in line["world"] and name in line["metrics"]:
            kept.setdefault(line["scene"], []).append((line["world"][dimension], sign * line["metrics"][name]))
    found = (rank_correlation(*zip(*pairs, strict=True)) for pairs in kept.values() if len(pairs) > 2)
    return [one for one in found if one == one]


def correlations(lines: Sequence[Line], what: str) -> list[str]:
    """Return the rows of a table of each proxy's rank correlation, a mean over scenes, which are called ``what``."""
    rows = [f"| dimension | metric | rank correlation within a {what} | {what}s |", "|---|---|---|---|"]
    for dimension, names in PROXIES.items():
        for name in names:
            found = by_scene(lines, dimension, name)
            both = any(dimension in line["world"] and name in line["metrics"] for line in lines)
            said = str(estimate(found)) if found else "constant" if both else "not measured"
            rows.append(f"| {dimension} | `{name}` | {said} | {len(found)} |")
    return rows
