"""VBench's sixteen dimensions with their ranges and weights, and the totals of their raw scores, of all or not at all.

Source: Huang et al., arXiv 2311.17982; the constants are those of the official totals (scripts/constant.py). The
official script takes 0 for a dimension that is missing, which its range turns into less than 0.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

Group = Literal["quality", "semantic"]
GROUP_WEIGHTS: dict[Group, int] = {"quality": 4, "semantic": 1}  # what the groups weigh in the total


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One dimension of VBench: the raw scores that become 0 and 1, and the least that its formula can give."""

    name: str
    group: Group
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    least: float = 0.0


_ALL = (
    Dimension(name="subject_consistency", group="quality", low=0.1462),
    Dimension(name="background_consistency", group="quality", low=0.2615),
    Dimension(name="temporal_flickering", group="quality", low=0.6293),
    Dimension(name="motion_smoothness", group="quality", low=0.706, high=0.9975),
    Dimension(name="dynamic_degree", group="quality", weight=0.5),
    *(Dimension(name=name, group="quality") for name in ("aesthetic_quality", "imaging_quality")),
    *(Dimension(name=name, group="semantic") for name in
      ("object_class", "multiple_objects", "human_action", "color", "spatial_relationship")),
    Dimension(name="scene", group="semantic", high=0.8222),
    Dimension(name="appearance_style", group="semantic", low=0.0009, high=0.2855, least=-1.0),
    Dimension(name="temporal_style", group="semantic", high=0.364, least=-1.0),
    Dimension(name="overall_consistency", group="semantic", high=0.364, least=-1.0),
)  # fmt: skip

DIMENSIONS: dict[str, Dimension] = {entry.name: entry for entry in _ALL}  # in the official order


def dimension(name: str) -> Dimension:
    """Return a dimension; blanks and hyphens are as good as underscores, and unknown names are refused."""
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    if plain not in DIMENSIONS:
        raise ConfigError(f"there is no dimension {name!r} of VBench; {did_you_mean(plain, DIMENSIONS)}")
    return DIMENSIONS[plain]


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """VBench's three totals, 1 at the range's upper end; ``normalized`` is each dimension's score before weights."""

    quality: float
    semantic: float
    total: float
    normalized: dict[str, float]


def totals(raw: Mapping[str, Any]) -> Totals:
    """Return the totals of raw scores, dimension -> score; refuses missing, doubled and impossible ones."""
    scores: dict[str, float] = {}
    for spelling, score in raw.items():
        entry = dimension(spelling)
        if entry.name in scores:
            raise ConfigError(f"dimension {entry.name} is given twice, last as {spelling!r}; leave one out")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ConfigError(f"the score of {entry.name} must be a number, got {score!r}")
        if not entry.least <= score <= 1:
            percent = "; divide percentages by 100" if 1 < score <= 100 else ""
            raise ConfigError(f"the raw score of {entry.name} must lie in [{entry.least:g}, 1], got {score}{percent}")
        scores[entry.name] = float(score)
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing:
        listed = f"{len(missing)} are missing: {', '.join(missing)}"
        raise ConfigError(f"VBench's totals take all {len(DIMENSIONS)} dimensions, and {listed}; measure those, too")
    normalized = {name: (scores[name] - bounds.low) / (bounds.high - bounds.low) for name, bounds in DIMENSIONS.items()}
    groups = {}
    for group in GROUP_WEIGHTS:
        parts = [part for part in DIMENSIONS.values() if part.group == group]
        groups[group] = sum(part.weight * normalized[part.name] for part in parts) / sum(part.weight for part in parts)
    total = sum(weight * groups[group] for group, weight in GROUP_WEIGHTS.items()) / sum(GROUP_WEIGHTS.values())
    return Totals(**groups, total=total, normalized=normalized)


def read_scores(path: Path) -> dict[str, Any]:
    """Return dimension -> raw score of a JSON file: an object of numbers, or of an official result's lists."""
    held = read_json(path, "scores")
    if not isinstance(held, dict):
        raise ConfigError(f"scores {path} must be a JSON object dimension -> raw score, got {type(held).__name__}")
    return {name: score[0] if isinstance(score, list) and score else score for name, score in held.items()}


def read_json(path: Path, what: str) -> Any:
    """Return what a JSON file holds, in which no key may stand twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)
    except OSError as error:
        raise ConfigError(f"{what} {path} can't be read: {error.strerror}; name a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"{what} {path} are not JSON ({error}); name a JSON file") from None


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{double!r} is there twice")
    return dict(pairs)
