"""Which steps of a run are computed: the best list of so many, found from what one run of all steps shows.

Every forecast is a weighted sum of computed values (`dit_accel.rules.forecast`), so that what it is off by is one too.
The products of the run's own values, a matrix of steps by steps, thus tell the error of any list without another run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dit_accel.rules import forecast

Predictor = Literal["hold", "taylor", "heun", "chebyshev"]

Listed = tuple[float, tuple[int, ...]]
Lists = dict[int, Listed]
"""Number of computed steps -> the error that their best list is expected to leave, and the list."""

ROUNDS = 3  # how often `searched` weighs the prompts anew
SETTLES = 3  # steps after a skipped one until its error has passed a solver's corrector and history, and only grows


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipCosts:
    """What it costs to skip all steps between two computed ones.

    The cost is the mean square, over prompts, of what the forecasts of the gap add to the latents: the errors of its
    steps, each times its weight, summed before they are squared, since those of one gap point the same way.
    """

    products: np.ndarray  # float64 [P, N, N]: by prompt the mean product of what steps i and j store
    weights: np.ndarray  # float64 [P, N]: how far the solver moves in a step, times how much of its error is left
    times: Sequence[float]  # of each step and of the run's end, N + 1: what the polynomial is one of
    predictor: Predictor
    order: int = 1
    _known: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def reads(self) -> int:
        """How many computed steps a forecast depends on; none of Heun's is forgotten."""
        steps = len(self.times) - 1
        return {"hold": 1, "taylor": self.order + 1, "heun": steps, "chebyshev": 2 * self.order + 2}[self.predictor]

    def __call__(self, path: Sequence[int], upto: int) -> float:
        """Return the cost of the steps from a list's last one to ``upto``, which is computed next, or the run's end."""
        key = (*path[-self.reads :], upto)
        if key not in self._known:
            self._known[key] = self._squares(path, upto)
        return float(self._known[key].mean())

    def of_list(self, path: Sequence[int]) -> np.ndarray:
        """Return what a whole list costs each prompt, [P]."""
        gaps = zip(range(1, len(path) + 1), [*path[1:], len(self.times) - 1], strict=True)
        return np.sum([self._squares(path[:count], upto) for count, upto in gaps], 0)

    def _squares(self, path: Sequence[int], upto: int) -> np.ndarray:
        rows, skipped = self.forecasts(path[-self.reads :], upto), [*range(path[-1] + 1, upto)]
        rows[np.arange(len(rows)), skipped] -= 1.0
        off = self.weights[:, skipped] @ rows
        return np.maximum(np.einsum("pn,pnm,pm->p", off, self.products, off), 0.0)

    def forecasts(self, path: Sequence[int], upto: int) -> np.ndarray:
        """Return the weights of the computed steps in each forecast from a list's last step to ``upto``, [gap, N]."""
        units = np.eye(len(self.times) - 1)
        before: tuple[float, np.ndarray] | None = None  # the forecast right before the last step, which Heun's reads
        if self.predictor == "heun" and len(path) > 1 and path[-1] - path[-2] > 1:
            before = self.times[path[-1] - 1], self.forecasts(path[:-1], path[-1])[-1]
        steps = [*path[-self.reads :]] if self.predictor != "heun" else [*path[-2:]]
        values, times = [units[step] for step in steps], [self.times[step] for step in steps]
        if before is not None:
            values.insert(1, before[1])
            times.insert(1, before[0])
        rows = np.zeros((upto - path[-1] - 1, len(units)))
        for row, step in enumerate(range(path[-1] + 1, upto)):
            rows[row] = np.array(self._weights(times, path[-1], step, before)) @ np.array(values)
        return rows

    def _weights(
        self, times: Sequence[float], last: int, step: int, before: tuple[float, np.ndarray] | None
    ) -> Sequence[float]:
        at = self.times[step]
        if self.predictor == "taylor":
            return forecast.taylor(times, at, self.order)
        if self.predictor == "chebyshev":
            return forecast.chebyshev(times, at, self.order, (self.times[0], self.times[-1]))
        if self.predictor == "heun":
            skipped = [self.times[index] for index in range(last + 1, step)]
            return forecast.heun(times, skipped, at, None if before is None else before[0])
        return [1.0]


def best_lists(cost: Callable[[Sequence[int], int], float], steps: int, computed: int) -> Lists:
    """Return for each number of computed steps up to ``computed`` the least sum of costs and the list that has it.

    Source: DPCache, whose state is the last computed step; LeMiCa (arXiv 2511.00090) takes the least largest gap. Here
    the state is the last two, exact for forecasts that read two. The first step is always computed.
    """
    best: dict[tuple[int, int], Listed] = {(-1, 0): (0.0, (0,))}
    lists: Lists = {}
    for count in range(1, computed + 1):
        lists[count] = min((so_far + cost(path, steps), path) for so_far, path in best.values())
        longer: dict[tuple[int, int], Listed] = {}
        for so_far, path in best.values():
            for following in range(path[-1] + 1, steps):
                candidate = so_far + cost(path, following), (*path, following)
                longer[path[-1], following] = min(candidate, longer.get((path[-1], following), candidate))
        best = longer
    return lists


def grown(moved: Sequence[float], early: int) -> np.ndarray:
    """Return how much an error that is made in each step has grown by the run's end, [N]."""
    steps = len(moved) - 1
    since = [moved[min(max(step + 1, early + SETTLES), steps)] for step in range(steps)]
    return moved[-1] / np.array(since) if min(since) > 0 else np.ones(steps)


def searched(costs: SkipCosts, computed: int) -> Lists:
    """Return `best_lists` by the mean logarithm of the prompts' costs, as a mean PSNR has it, and their errors.

    A logarithm is no sum over gaps; weighing each prompt by one over what the last list cost it comes down to it.
    """
    steps, scale = len(costs.times) - 1, np.ones(len(costs.products))
    lists: Lists = {}
    for _ in range(ROUNDS):
        even = dataclasses.replace(costs, products=costs.products / scale[:, None, None])
        lists = best_lists(even, steps, computed)
        total = costs.of_list(lists[computed][1])
        scale = total if total.min() > 0 else scale
    roots = {count: np.sqrt(costs.of_list(path)) for count, (_, path) in lists.items()}
    return {
        count: (float(np.exp(np.log(roots[count]).mean())) if roots[count].min() > 0 else 0.0, path)
        for count, (_, path) in lists.items()
    }
