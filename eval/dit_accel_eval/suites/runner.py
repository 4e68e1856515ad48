"""Runs a suite's model within its budget, with the runs that warm it up, and those that repeat a sample."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.solvers import BEST

from ..runs.budget import Budget, Spending
from ..runs.model import Run, SuiteModel
from .arms import Arm


class Runner:
    """Stands for a model, loaded when it is first asked for something, whose every run is counted.

    Args:
        load: returns the model.
        budget: what the runs may take; None: any amount.
        warmup: runs of every arm that are not told, before its first.
        repeats: times that each sample is made.
    """

    def __init__(
        self, load: Callable[[], SuiteModel], budget: Budget | None = None, *, warmup: int = 0, repeats: int = 1
    ) -> None:
        self._load, self._warmup, self.repeats = load, warmup, repeats
        self._spending, self._warm = Spending(budget), set[str]()

    @cached_property
    def loaded(self) -> SuiteModel:
        """The model itself, whose runs are not counted."""
        return self._load()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loaded, name)

    def run(self, clip: int, *, steps: int, **options: Any) -> Run:
        """Run the model, as `SuiteModel.run` does.

        Raises:
            BudgetSpent: before a run that the budget does not hold.
        """
        return self._spending.run(steps, lambda: self.loaded.run(clip, steps=steps, **options))

    def sample(self, arm: Arm, clip: int) -> list[Run]:
        """Return the runs of an arm on a clip, as many as each sample is repeated, after its warm-up.

        Raises:
            BudgetSpent: before a run that the budget does not hold.
        """
        self.warm_up(arm, clip)
        return [self.run(clip, **arm.run_options()) for _ in range(self.repeats)]

    def beside(self, arm: Arm, clip: int) -> tuple[list[Run], list[Run]]:
        """Return the runs of an arm, and after each of them a dense one of as many steps.

        Raises:
            BudgetSpent: before a run that the budget does not hold.
        """
        self.warm_up(arm, clip)
        found: tuple[list[Run], list[Run]] = [], []
        for _ in range(self.repeats):
            found[0].append(self.run(clip, **arm.run_options()))
            found[1].append(self.run(clip, steps=arm.num_inference_steps, solver=BEST))
        return found

    def warm_up(self, arm: Arm, clip: int) -> None:
        """Make the runs of an arm that are not told, if this process has not yet.

        Raises:
            BudgetSpent: before a run that the budget does not hold.
        """
        if arm.name not in self._warm:
            for _ in range(self._warmup):
                self.run(clip, **arm.run_options())
            self._warm.add(arm.name)


def median_run(runs: list[Run]) -> Run:
    """Return the run whose denoising loop took the median time, of an even number the longer one of the two."""
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def repeated(runs: list[Run]) -> dict[str, Any]:
    """Return the seconds of the denoising loop of repeated runs, in order, with their median and quartiles."""
    seconds = [run.seconds for run in runs]
    low, middle, high = (round(float(one), 4) for one in np.percentile(seconds, [25, 50, 75]))
    return {"seconds": [round(one, 4) for one in seconds], "median": middle, "quartiles": [low, high]}
