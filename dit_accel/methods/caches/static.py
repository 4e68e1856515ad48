"""StaticCache: steps are skipped by a list, or all but every n-th, whatever the data are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ..options import Count, begins_with, within
from ..saving import Saving
from .cache_config import ALONE, ExpertSteps, StepCacheConfig
from .engine import StepCacheHandler

Computed = Annotated[int, within(0, 1), "1 is computed, 0 is skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCache(StepCacheConfig):
    """Skips the steps that a list names, or all but every n-th: searched schedules, and those of TaylorSeer and FORA.

    A list is ``steps``, for one number of steps, or ``compute_at``, for any.

    Attributes:
        steps: one number for each step of the run: 1 is computed, 0 is skipped.
        every: one step in so many is computed, counted from the warm-up's last; instead of ``steps``. Beside it
            ``compute_at`` names further steps; without it those alone are computed.
    """

    name: ClassVar[str] = "staticcache"
    # with ``steps``, or ``compute_at`` alone, the list decides
    defaults: ClassVar[Mapping[str, Any]] = {"warmup_steps": 0.1, "last_steps": 1, "every": 2}

    steps: Annotated[tuple[Computed, ...], begins_with(1)] | None = None
    every: Count | None = None

    def __post_init__(self) -> None:
        StepCacheConfig.__post_init__(self)
        self.require_one_of("steps", "every", of="what is computed")

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with unset options filled in; beside a list nothing else decides unless it is set."""
        listed = self.steps is not None or (self.compute_at is not None and self.every is None)
        full: Any = self if listed else StepCacheConfig.filled(self, recipe)
        return full

    def always_computed(self, index: int, count: int | None, expert: ExpertSteps = ALONE) -> str | None:
        if self.steps is not None and len(self.steps) != count:
            raise ConfigError(
                f"{self.name}.steps has {len(self.steps)} entries, this run has {count or 'an unknown number of'} "
                "steps; give one for each"
            )
        why = StepCacheConfig.always_computed(self, index, count, expert)
        if why is None and self.steps is not None:
            return "listed" if self.steps[index] else None
        if why is None and self.every is not None:
            why = None if (index - max(self.first_steps(count, expert) - 1, 0)) % self.every else "listed"
        return why


class StaticHandler(StepCacheHandler):
    """StaticCache on one model."""

    config_type = StaticCache
    settings: StaticCache

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        return self.counted(self.settings.skipped_steps(steps))
