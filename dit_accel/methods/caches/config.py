"""StepCacheConfig: what all step caches share, the steps that are always computed and how a skipped one is forecast."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError
from ...rules.steps import whole_steps
from ..config import MethodConfig
from ..steps import check_steps, end_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCacheConfig(MethodConfig):
    """What step caches share; a model's recipe may fill what is unset.

    A skipped forward gives a forecast: the input is known, and what was stored is continued in time.

    Attributes:
        warmup_steps: first steps that are computed; below 1 a share of the run's steps, rounded up.
        last_steps: last steps that are computed, likewise.
        max_consecutive: most steps that are skipped in a row; unset: any number.
        max_skips: most steps that are skipped in a run; unset: any number.
        steps: one number for each step of the run: 1 is computed, 0 may be skipped; unset: every step may.
        predictor: ``hold`` repeats what was stored last; ``taylor`` continues the polynomial through the last
            ``order + 1`` stored (arXiv 2503.06923), ``chebyshev`` one fitted to more of them (arXiv 2603.01623),
            ``heun`` the mean of two slopes (arXiv 2508.16211).
        order: degree of the polynomial.
        variable: what the polynomial is one of: ``step``, the step's index, or ``sigma``, its noise level.
        stored: what is continued: ``residual``, the output minus the latents that went in, or the ``output``. Where
            the latents do not cover the output, it is the output.
        branches: ``all`` are skipped together, as the first one of a step decides; with ``uncond`` only the
            unconditional one may be.

    Raises:
        ConfigError: for an option out of range.
    """

    warmup_steps: int | float | None = None
    last_steps: int | float | None = None
    max_consecutive: int | None = None
    max_skips: int | None = None
    steps: tuple[int, ...] | None = None
    predictor: Literal["hold", "taylor", "heun", "chebyshev"] = "hold"
    order: int = 1
    variable: Literal["step", "sigma"] = "step"
    stored: Literal["residual", "output"] = "residual"
    branches: Literal["all", "uncond"] = "all"

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        check_steps(self, "warmup_steps", "last_steps")
        for field, least in (("max_consecutive", 1), ("max_skips", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ConfigError(f"{self.name}.{field} must be >= {least}, got {value}; leave it unset for the usual")
        if not 1 <= self.order <= 4:
            raise ConfigError(f"{self.name}.order must be from 1 to 4, got {self.order}; predictor = 'hold' is order 0")
        if self.steps is not None and (wrong := sorted({*self.steps} - {0, 1})):
            raise ConfigError(
                f"{self.name}.steps must hold 1 (computed) and 0 (may be skipped) alone, got {wrong[0]}; write one for "
                "each step"
            )
        if self.steps is not None and self.steps[:1] != (1,):
            raise ConfigError(
                f"{self.name}.steps must begin with 1, got {list(self.steps)[:4]}: nothing is stored before the first "
                "step to forecast it from"
            )

    @property
    def kept_points(self) -> int:
        """How many computed values a forecast reads."""
        return {"hold": 1, "taylor": self.order + 1, "heun": 2, "chebyshev": 2 * self.order + 2}[self.predictor]

    def always_computed(self, index: int, count: int | None) -> str | None:
        """Return why a step is computed whatever is measured, or None.

        Args:
            index: the step's, from 0.
            count: steps of the run; None: not known.

        Raises:
            ConfigError: if the options need the run's steps, which are not known, or are for another number of them.
        """
        first, last = end_steps(self, "warmup_steps", "last_steps", count)
        if self.steps is not None and len(self.steps) != count:
            raise ConfigError(
                f"{self.name}.steps has {len(self.steps)} entries, this run has {count or 'an unknown number of'} "
                "steps; give one for each"
            )
        if index < first:
            return "first steps"
        if count is not None and index >= count - last:
            return "last steps"
        return "listed" if self.steps is not None and self.steps[index] else None

    def first_steps(self, count: int | None) -> int:
        """Return how many first steps of a run of ``count`` are computed."""
        return whole_steps(self.warmup_steps or 0, count or 0)

    def skipped_steps(self, count: int, skips: Callable[[int, int], bool] = lambda index, in_a_row: True) -> int:
        """Return how many steps of a run are skipped where no data decide.

        Args:
            count: steps of the run.
            skips: (step, steps skipped right before it) -> whether one that may be skipped is.
        """
        in_a_row = skipped = 0
        for index in range(count):
            must = index == 0 or self.always_computed(index, count) or self.most_skipped(in_a_row, skipped)
            skip = not must and skips(index, in_a_row)
            in_a_row, skipped = (in_a_row + 1, skipped + 1) if skip else (0, skipped)
        return skipped

    def most_skipped(self, in_a_row: int, skips: int) -> str | None:
        """Return why a step is computed after so many that were skipped, in a row and in all, or None."""
        if self.max_consecutive is not None and in_a_row >= self.max_consecutive:
            return f"{in_a_row} skipped in a row"
        if self.max_skips is not None and skips >= self.max_skips:
            return f"{skips} skipped in all"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCacheConfig(StepCacheConfig):
    """What step caches share that skip a step while something stays below a threshold.

    Attributes:
        threshold: 0 skips nothing.

    Raises:
        ConfigError: for an option out of range.
    """

    threshold: float | None = None

    def __post_init__(self) -> None:
        StepCacheConfig.__post_init__(self)
        if self.threshold is not None and self.threshold < 0:
            usual = self.defaults["threshold"]
            raise ConfigError(
                f"{self.name}.threshold must be >= 0, got {self.threshold}; {usual:g} is usual, 0 skips nothing"
            )
