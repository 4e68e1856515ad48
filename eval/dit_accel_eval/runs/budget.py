"""What one call of `eval run` may take: a suite's ``budget``, and the clock that keeps to it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel import ConfigError
from dit_accel.errors import DitAccelError, did_you_mean

KINDS = ("steps", "seconds")


class BudgetSpent(DitAccelError):  # noqa: N818 - reads as what it is
    """The next run would go beyond the budget; all before it are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one call of `eval run` may take; each process of several has its share of the steps.

    Attributes:
        steps: denoising steps that are run, converged runs, warm-up and repeats among them; None: any number.
        seconds: from the first run to the last one's end; None: any time.
    """

    steps: int | None = None
    seconds: float | None = None

    def share(self, processes: int) -> "Budget":
        """Return one process's share."""
        return Budget(steps=None if self.steps is None else self.steps // processes, seconds=self.seconds)

    def __str__(self) -> str:
        text = (("steps", self.steps), ("seconds", self.seconds))
        return " and ".join(f"{value:g} {key}" for key, value in text if value is not None)


def read_budget(values: Mapping[str, Any], where: str) -> Budget:
    """Read a suite's ``budget = { steps = 2000 }``, ``{ seconds = 3600 }`` or both.

    Raises:
        ConfigError: for another key, or a number that is not above 0.
    """
    for key, value in values.items():
        if key not in KINDS:
            raise ConfigError(f"{where} has a budget of {key!r}; {did_you_mean(key, KINDS)}")
        whole = isinstance(value, int) or (key == "seconds" and isinstance(value, float))
        if isinstance(value, bool) or not whole or not 0 < value < math.inf:
            kind = "whole number" if key == "steps" else "number"
            raise ConfigError(f"{where} has a budget of {key} = {value!r}; give a {kind} above 0")
    if not values:
        raise ConfigError(f"{where} has an empty budget; write budget = {{ steps = 2000 }} or {{ seconds = 3600 }}")
    return Budget(**values)


class Spending:
    """What one process has spent of its budget.

    Args:
        budget: what it may spend; None: any amount.
        clock: seconds by which time is told.
    """

    def __init__(self, budget: Budget | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget, self._clock = budget or Budget(), clock
        self._begun: float | None = None
        self._busy = 0.0
        self.steps = 0

    def run(self, steps: int, work: Callable[[], Any]) -> Any:
        """Return what a run of so many denoising steps makes, if the budget holds it.

        A run's seconds are foretold from the runs so far, a step like another; the first is always begun.

        Raises:
            BudgetSpent: before the run, if it would go beyond.
        """
        now = self._clock()
        self._begun = now if self._begun is None else self._begun
        most = self.budget
        if most.steps is not None and self.steps + steps > most.steps:
            raise BudgetSpent(
                f"the next run takes {steps} steps, and {self.steps} of the budget of {most.steps} are spent"
            )
        if most.seconds is not None and self.steps:
            took, needed = now - self._begun, steps * self._busy / self.steps
            if took + needed > most.seconds:
                raise BudgetSpent(
                    f"the next run takes about {needed:.3g} seconds, and {took:.3g} of the budget of {most.seconds:g} "
                    "are spent"
                )
        made = work()
        self._busy += self._clock() - now
        self.steps += steps
        return made
