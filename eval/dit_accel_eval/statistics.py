"""Statistics: the mean difference of two arms over the same clips, its interval, tests of many at once, and ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

LEVEL, DRAWS = 0.95, 10_000
"""Confidence of an interval; resamples of it, or choices of signs."""

EXACT = 12
"""Clips up to which all signs are tried, 4096 of them."""

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self:}"

    def __format__(self, spec: str) -> str:
        spec = spec if "." in spec else f"{spec}.2f"  # a sign alone: two digits behind the point
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(values: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Return the mean of per-clip values with its 95 % percentile bootstrap interval (Efron 1979), seeded.

    Args:
        values: one value per clip; for a paired comparison the difference of the two arms on that clip.
        seed: of the resampling.

    Raises:
        ValueError: for no values.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value, got none")
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (draws, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean=float(data.mean()), low=float(low), high=float(high))


def paired_cell(
    own: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]], name: str, *, scale: float = 1.0,
    ratio: bool = False,
) -> str:  # fmt: skip
    """Return a table's cell of the paired difference of a measure, "" without a clip that has both.

    The mean with its interval, the mean alone of one clip, and the number of clips where some have no finite value.

    Args:
        own: clip -> measures of the arm.
        others: the same of the arm that it is held against.
        scale: factor on the difference.
        ratio: whether to give the arm's over the other's instead.
    """
    both = sorted(set(own) & set(others))
    pairs = [(own[clip].get(name, np.nan), others[clip].get(name, np.nan)) for clip in both]
    values = [scale * (one / other if ratio else one - other) for one, other in pairs if np.isfinite(one - other)]
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return str(bootstrap(values)) + (f" ({len(values)})" if len(values) < len(both) else "")


def sign_flips(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a mean difference being 0, by flipping signs (Fisher 1935); in (0, 1].

    Up to `EXACT` clips every choice of signs is tried, else `DRAWS` of them and the one at hand.

    Args:
        differences: of the two arms, one per clip.

    Raises:
        ValueError: for no differences.
    """
    if not len(differences):
        raise ValueError("a test needs at least one difference, got none")
    data = np.asarray(differences, dtype=np.float64)
    if len(data) <= EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(data))[:, None] >> np.arange(len(data))) & 1)
        more = 0
    else:
        signs = np.random.default_rng(0).choice([-1, 1], (DRAWS, len(data)))
        more = 1
    found, least = np.abs(signs @ data), abs(data.sum()) * (1 - 1e-12)
    return float((np.sum(found >= least) + more) / (len(signs) + more))


def holm(values: Mapping[Key, float]) -> dict[Key, float]:
    """Return p-values corrected for their number by Holm's step-down rule (1979), each at most 1."""
    corrected, most = {}, 0.0
    for place, key in enumerate(sorted(values, key=lambda one: values[one])):
        most = max(most, min(1.0, (len(values) - place) * values[key]))
        corrected[key] = most
    return {key: corrected[key] for key in values}


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two lists, ties by their mean; not a number for a constant one."""
    ranks = np.stack([_ranks(np.asarray(values, float)) for values in (one, other)])
    if not np.ptp(ranks, axis=1).all():
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of values, the mean of those that are alike."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])
