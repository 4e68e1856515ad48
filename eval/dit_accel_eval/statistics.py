"""Statistics: the one rule by which arms are judged over the same clips, for all tables, pages and commands.

A mean difference has Student's t interval, widened to what Willink's skew-corrected one holds besides; a verdict is
given from `FEWEST` clips on, where the difference stands after Holm's correction for all that are judged together.
docs/evaluating.md says how often it is wrong.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit
from scipy.stats import rankdata

LEVEL = 0.95  # confidence of an interval
WRONG = 1 - LEVEL  # share of the times in which any verdict of a table may be wrong
FEWEST, TOO_FEW = 6, "too few"  # clips from which on there are intervals and verdicts; the verdict of fewer
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipMean:
    """A mean over clips with its 95 % interval, None under `FEWEST` clips, in the unit of the values."""

    mean: float
    median: float
    count: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self:}"

    def __format__(self, spec: str) -> str:
        spec = spec if "." in spec else f"{spec}.2f"  # a sign alone: two digits behind the point
        if self.low is None or self.high is None:
            return f"{self.mean:{spec}}"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def cell(self, spec: str = ".2f") -> str:
        """Return a table's cell: the mean with its interval, and the median in brackets."""
        spec = spec if "." in spec else f"{spec}.2f"
        return f"{self:{spec}}" + (f" ({self.median:{spec}})" if self.count > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged(ClipMean):
    """A mean paired difference with its verdict: ``ahead`` or ``behind`` of the margin, ``open``, or `TOO_FEW`."""

    margin: float = 0.0
    p: float | None = None
    p_holm: float | None = None
    together: int = 1
    verdict: str = TOO_FEW

    def judged(self, spec: str = "+.2f") -> str:
        """Return a table's cell with the verdict behind."""
        return f"{self.cell(spec)} {self.verdict}"


def clip_mean(values: Sequence[float]) -> ClipMean:
    """Return the mean and median of per-clip values, from `FEWEST` on with the interval of the mean.

    It holds Student's and, as that is too short on one side of skewed values, Willink's (2005, A confidence interval
    and test for the mean of an asymmetric distribution), which rests on their third moment.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value, got none")
    data = np.asarray(values, dtype=np.float64)
    result = ClipMean(mean=float(data.mean()), median=float(np.median(data)), count=len(data))
    if result.count < FEWEST:
        return result
    error, skew = map(float, _error(data))
    reach = float(stdtrit(result.count - 1, (1 + LEVEL) / 2))
    ends = [*_shortened(np.array([reach, -reach]), skew), reach, -reach]
    return replace(result, low=result.mean - error * max(ends), high=result.mean - error * min(ends))


def p_value(differences: Sequence[float], margin: float = 0.0) -> float:
    """Return the two-sided p-value of a mean difference being ``margin``, at most .05 where `clip_mean` excludes it."""
    return float(p_values(np.asarray(differences, dtype=np.float64), margin))


def p_values(data: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """Return `p_value` of each row of differences [..., clips], of shape [...]."""
    error, skew = _error(data)
    distance = data.mean(-1) - margin
    student = distance / np.where(error == 0, 1.0, error)
    willink = skew + student + 2 * skew * student**2 + 4 / 3 * skew**2 * student**3  # the inverse of `_shortened`
    p = 2 * stdtr(data.shape[-1] - 1, -np.minimum(np.abs(student), np.abs(willink)))
    p = np.where(student * willink <= 0, 1.0, p)  # to the other side of the margin, once its skewness is allowed for
    return np.where(error == 0, np.where(distance == 0, 1.0, 0.0), p)


def _error(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard error of each row's mean, and its skewness over 6 times the root of the number of values."""
    count, root, spread = data.shape[-1], math.sqrt(data.shape[-1]), data.std(-1, ddof=1)
    alike = spread <= 1e-9 * np.abs(data).max(-1)  # but for rounding
    divisor = np.where(alike, 1.0, spread)
    cubes = (((data - data.mean(-1, keepdims=True)) / divisor[..., None]) ** 3).sum(-1)
    skewness = count / ((count - 1) * (count - 2)) * cubes  # unbiased
    return np.where(alike, 0.0, spread / root), np.where(alike, 0.0, skewness / (6 * root))


def _shortened(reach: np.ndarray, skew: float) -> np.ndarray:
    """Return Willink's G: Student's quantiles as they are for values of that skewness."""
    if abs(skew) < 1e-9:
        return reach
    return (np.cbrt(1 + 6 * skew * (reach - skew)) - 1) / (2 * skew)


def judge(differences: Mapping[Key, Sequence[float]], margins: Mapping[Key, float] | None = None) -> dict[Key, Judged]:
    """Return what is said of paired differences that are judged together, such as those of all arms of a suite.

    What is 0 as tables print it is 0: a cache that skips nothing differs from dense by rounding alone.
    """
    means = {key: clip_mean(values) for key, values in differences.items() if len(values)}
    least = {key: (margins or {}).get(key, 0.0) for key in means}
    p = {key: p_value(differences[key], least[key]) for key, value in means.items() if value.count >= FEWEST}
    corrected = holm(p)
    return {
        key: Judged(
            **asdict(value), margin=least[key], p=p.get(key), p_holm=corrected.get(key), together=len(p),
            verdict=_verdict(value, least[key], corrected.get(key)),
        )
        for key, value in means.items()
    }  # fmt: skip


def _verdict(value: ClipMean, margin: float, p: float | None) -> str:
    if p is None or value.low is None or value.high is None:
        return TOO_FEW
    if p >= WRONG or round(value.low - margin, 2) <= 0 <= round(value.high - margin, 2):
        return "open"
    return "ahead" if value.mean > margin else "behind"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> ClipMean | None:
    """Return Spearman's rank correlation with its interval, None under `FEWEST` clips or where all of one are alike.

    The interval is Fisher's with the variance of Bonett and Wright (2000, Sample size requirements for estimating
    Pearson, Kendall and Spearman correlations).
    """
    count = len(first)
    if count < FEWEST or len({*first}) == 1 or len({*second}) == 1:
        return None
    value = float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])
    middle, reach = np.arctanh(np.clip(value, -1 + 1e-9, 1 - 1e-9)), math.sqrt((1 + value**2 / 2) / (count - 3))
    low, high = np.tanh([middle + side * ndtri((1 + LEVEL) / 2) * reach for side in (-1, 1)])
    return ClipMean(mean=value, median=value, count=count, low=float(low), high=float(high))


def reach_words(means: Iterable[ClipMean], unit: str) -> str:
    """Return in words how wide the intervals of differences are, "" where there are none or no value differs."""
    reaches = [(value.high - value.low) / 2 for value in means if value.low is not None and value.high is not None]
    most = round(max(reaches, default=0.0))
    return f"95 % intervals of up to ±{most} {unit}" if most else ""


def p_words(p: float | None) -> str:
    """Return a p-value as tables print it, "" for none."""
    return "" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def holm(values: Mapping[Key, float]) -> dict[Key, float]:
    """Return p-values corrected for their number by Holm's step-down rule (1979), each at most 1."""
    corrected, most = {}, 0.0
    for place, key in enumerate(sorted(values, key=lambda key: values[key])):
        most = max(most, min(1.0, (len(values) - place) * values[key]))
        corrected[key] = most
    return {key: corrected[key] for key in values}


def frontier(points: Iterable[Key], place: Callable[[Key], tuple[float, float]]) -> list[Key]:
    """Return the points that none surpasses at as little cost, cheapest first, by a function of cost and worth."""
    best: list[Key] = []
    for point in sorted(points, key=lambda point: (place(point)[0], -place(point)[1])):
        if not best or place(point)[1] > place(best[-1])[1]:
            best.append(point)
    return best
