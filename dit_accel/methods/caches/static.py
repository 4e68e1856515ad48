"""StaticCache: steps are skipped by a list, or all but every n-th, whatever the data are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...plan.layout import TokenLayout
from ..options import Count
from ..saving import Saving
from .cache_config import ALONE, StepCacheConfig, Turn
from .engine import StepCacheHandler


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCache(StepCacheConfig):
    """Skips the steps that a list names, or all but every n-th: searched schedules, and those of TaylorSeer and FORA.

    A list is ``steps``, for one number of steps, or ``compute_at``, for any.

    Attributes:
        every: one step in so many is computed, counted from the warm-up's last; instead of ``steps``. Beside it
            ``compute_at`` names further steps; without it those alone are computed.
    """

    name: ClassVar[str] = "staticcache"
    # with ``steps``, or ``compute_at`` alone, the list decides
    defaults: ClassVar[Mapping[str, Any]] = {"warmup_steps": 0.1, "last_steps": 1, "every": 2}

    every: Count | None = None

    def __post_init__(self) -> None:
        StepCacheConfig.__post_init__(self)
        self.require_one_of("steps", "every", of="what is computed")

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with unset options filled in; beside a list nothing else decides unless it is set."""
        listed = self.steps is not None or (self.compute_at is not None and self.every is None)
        full: Any = self if listed else StepCacheConfig.filled(self, recipe)
        return full

    def always_computed(self, index: int, count: int | None, turn: Turn = ALONE) -> str | None:
        """Return why a step is computed, or None: it is skipped."""
        why = StepCacheConfig.always_computed(self, index, count, turn)
        if why is None and self.every is not None:
            why = None if (index - max(self.first_steps(count, turn) - 1, 0)) % self.every else "listed"
        return why


class StaticHandler(StepCacheHandler):
    """StaticCache on one model."""

    config_type = StaticCache
    settings: StaticCache

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return the forwards that the list skips."""
        return self.counted(self.settings.skipped_steps(steps))
