"""StaticCache: steps are skipped by a list, all but every n-th, or by their noise level, whatever the data are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ..noise import NeedsNoise
from ..options import Count, Share, begins_with, within
from ..saving import Saving
from ..site import ForwardContext
from .cache_config import ALONE, ExpertSteps, StepCacheConfig
from .engine import StepCacheHandler, StepDecision

Computed = Annotated[int, within(0, 1), "1 is computed, 0 is skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCache(StepCacheConfig):
    """Skips the steps that a list names, or all but every n-th: searched schedules, and those of TaylorSeer and FORA.

    A list is ``steps``, for one number of steps, or ``compute_at``, for any. ``below_sigma`` needs none.

    Attributes:
        steps: one number for each step of the run: 1 is computed, 0 is skipped.
        every: one step in so many is computed, counted from the warm-up's last; instead of ``steps``. Beside it
            ``compute_at`` names further steps; without it those alone are computed.
        below_sigma: steps that begin below this share of noise are skipped, and no others: what is left to remove is as
            little as that, where some schedules spend the last of few steps. It goes best with ``stored = "output"``.
    """

    name: ClassVar[str] = "staticcache"
    # with ``steps``, or ``compute_at`` alone, the list decides
    defaults: ClassVar[Mapping[str, Any]] = {"warmup_steps": 0.1, "last_steps": 1, "every": 2}

    steps: Annotated[tuple[Computed, ...], begins_with(1)] | None = None
    every: Count | None = None
    below_sigma: Share | None = None

    def __post_init__(self) -> None:
        StepCacheConfig.__post_init__(self)
        self.require_one_of("steps", "every", "below_sigma", of="what is computed")

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with unset options filled in; beside a list nothing else decides unless it is set."""
        listed = self.steps is not None or (self.every is None and (self.compute_at, self.below_sigma) != (None, None))
        full: Any = self if listed else StepCacheConfig.filled(self, recipe)
        return full

    def noise_needed(self) -> NeedsNoise | None:
        asks = f"staticcache.below_sigma = {self.below_sigma}"
        needs = NeedsNoise(asks=asks, instead="name the steps by staticcache.steps")
        return StepCacheConfig.noise_needed(self) if self.below_sigma is None else needs

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

    def threshold(self) -> float | None:
        return self.settings.below_sigma

    def indicator(self, context: ForwardContext, decision: StepDecision) -> float | None:
        return context.share_of_noise

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        known = self.settings.below_sigma is None  # noise levels are known only while it runs
        return self.counted(self.settings.skipped_steps(steps) if known else ())
