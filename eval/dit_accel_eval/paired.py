"""Paired statistics: the mean difference of two arms over the same clips, with a bootstrap interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its confidence interval, in the unit of the values.

    Attributes:
        mean: the mean.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self:}"

    def __format__(self, sign: str) -> str:
        return f"{self.mean:{sign}.2f} [{self.low:{sign}.2f}, {self.high:{sign}.2f}]"


def bootstrap(values: Sequence[float], *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of per-clip values with a percentile bootstrap interval (Efron 1979), seeded.

    Args:
        values: one value per clip; for a paired comparison the difference of the two arms on that clip.
        level: confidence level, in (0, 1).
        draws: resamples.
        seed: of the resampling.

    Raises:
        ValueError: for no values.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value, got none")
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (draws, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(data.mean()), low=float(low), high=float(high))
