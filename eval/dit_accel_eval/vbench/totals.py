"""Quality, Semantic and Total of VBench from the raw scores of all its dimensions, or not at all.

The official script takes 0 for a dimension that is missing, which its range turns into less than 0; no total is given
here before all sixteen are there.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel import ConfigError

from .dimensions import DIMENSIONS, GROUP_WEIGHTS, dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """VBench's three totals, on a scale on which 1 is the range's upper end; the leaderboard shows them times 100.

    Attributes:
        quality: weighted mean of the seven dimensions of quality.
        semantic: mean of the nine semantic ones.
        total: (4 quality + semantic) / 5.
        normalized: dimension -> its score in its range, before weights.
    """

    quality: float
    semantic: float
    total: float
    normalized: dict[str, float]


def totals(raw: Mapping[str, Any]) -> Totals:
    """Return the totals of raw scores, dimension -> score, of which all must be there.

    Raises:
        ConfigError: for unknown dimensions, scores that no video can have, and dimensions that are missing, by name.
    """
    scores = _checked(raw)
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing:
        raise ConfigError(
            f"VBench's totals take all {len(DIMENSIONS)} dimensions, and {len(missing)} are missing: "
            f"{', '.join(missing)}; measure those, too, no total stands for a part"
        )
    normalized = {name: one.normalized(scores[name]) for name, one in DIMENSIONS.items()}
    groups = {}
    for group in GROUP_WEIGHTS:
        own = [one for one in DIMENSIONS.values() if one.group == group]
        groups[group] = sum(one.weight * normalized[one.name] for one in own) / sum(one.weight for one in own)
    total = sum(weight * groups[group] for group, weight in GROUP_WEIGHTS.items()) / sum(GROUP_WEIGHTS.values())
    return Totals(**groups, total=total, normalized=normalized)


def _checked(raw: Mapping[str, Any]) -> dict[str, float]:
    """Return dimension -> score by official names; refuses other names, those given twice, and impossible scores."""
    found: dict[str, float] = {}
    for given, score in raw.items():
        one = dimension(given)
        if one.name in found:
            raise ConfigError(f"dimension {one.name} is given twice, last as {given!r}; leave one out")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ConfigError(f"the score of {one.name} must be a number, got {score!r}")
        if not one.least <= score <= 1:
            percent = "; divide percentages by 100" if 1 < score <= 100 else ""
            raise ConfigError(f"the raw score of {one.name} must lie in [{one.least:g}, 1], got {score}{percent}")
        found[one.name] = float(score)
    return found


def read_scores(path: Path) -> dict[str, Any]:
    """Return dimension -> raw score of a JSON file: an object of numbers, or of an official result's lists.

    Official results are {dimension: [score, [one entry a video]]}. Any other file is refused.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)
    except OSError as error:
        raise ConfigError(f"scores {path} can't be read: {error.strerror}; name a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"scores {path} are not JSON ({error}); write an object dimension -> raw score") from None
    if not isinstance(held, dict):
        raise ConfigError(f"scores {path} must be a JSON object dimension -> raw score, got {type(held).__name__}")
    return {name: score[0] if isinstance(score, list) and score else score for name, score in held.items()}


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{double!r} is there twice")
    return dict(pairs)
