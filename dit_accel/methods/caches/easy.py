"""EasyCache: steps are skipped while the output is expected to change little, by the rate at which it did before.

Source: EasyCache (arXiv 2507.02860). It needs no coefficients and knows nothing of the model. Where we depart from it:
any predictor in place of holding the last residual, and the first branch of a step decides whichever it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from ...rules.forecast import growth, log_snr
from ..options import gt
from ..site import ForwardContext, target_sample
from .cache_config import MeasuredCacheConfig
from .engine import StepCacheHandler, StepDecision
from .history import History
from .ranks import ratio

GROWTH = 0.8
"""Power of the product of distances that a forecast's error was found to grow as: outputs change not quite smoothly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EasyCache(MeasuredCacheConfig):
    """Skips steps whose output is expected to change little (EasyCache, arXiv 2507.02860); needs no calibration.

    With x the latents that go in and v the output, k = |dv| / |dx| over the last two computed steps; each further step
    adds k |dx| / |v|, and is skipped while the sum stays below the threshold. |.| is the mean of the absolute values
    over all rows of a batch, which are skipped together: several prompts in one batch may be skipped at other steps
    than each alone.

    With ``error`` it is the forecast that decides. What it would have been off by is measured at every computed step,
    |forecast - v| / |v|, and expected to grow as the product of the distances to the computed steps that it goes
    through, to the power of .8; a step is skipped while it is expected to be off by less. Distances are those of the
    logarithm of the signal-to-noise ratio, along which outputs change most evenly; of steps, where no noise level is
    known.

    Attributes:
        threshold: share of the output's size, tau; 0 skips nothing. Twice as much skips about twice as many in a row.
        error: share of the output's size that a forecast may be expected to be off by, instead of ``threshold``.
    """

    name: ClassVar[str] = "easycache"
    # the paper's for Wan
    defaults: ClassVar[Mapping[str, Any]] = {"threshold": 0.05, "warmup_steps": 0.2, "last_steps": 1}

    error: Annotated[float, gt(0)] | None = None

    def __post_init__(self) -> None:
        MeasuredCacheConfig.__post_init__(self)
        self.require_one_of("threshold", "error", of="when a step is skipped")

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with unset options filled in; beside ``error`` no threshold is."""
        full: Any = MeasuredCacheConfig.filled(replace(self, error=None), recipe)
        return full if self.error is None else replace(full, threshold=None, error=self.error)


@dataclass(slots=True)
class EasyDecision(StepDecision):
    """What EasyCache measures of a branch; tensors on the device."""

    x: Tensor | None = None  # latents of the last step
    x_computed: Tensor | None = None  # of the last computed step
    v: Tensor | None = None  # output of the last computed step
    # mean of |dv| and of |dx| between the last two computed steps; None before there were two
    changes: tuple[Tensor, Tensor] | None = None
    total: float = math.nan  # what the steps since the last computed one add up to
    # mean of |forecast - v| and of |v| at the last computed step that there was a forecast for
    missed: tuple[Tensor, Tensor] | None = None
    grown: float = math.nan  # what the error of a forecast had grown to there, up to a factor
    places: tuple[float, ...] = ()  # of the last computed steps, along which it grows


class EasyHandler(StepCacheHandler):
    """EasyCache on one model."""

    config_type = EasyCache
    decision_type = EasyDecision
    settings: EasyCache

    def indicator(self, context: ForwardContext, decision: EasyDecision) -> float | None:
        """Return the expected changes of the steps since the last computed one, summed; waits for the device.

        With ``error``: what the forecast of this step is expected to be off by.
        """
        if self.settings.error is not None:
            if decision.missed is None:
                return None
            grown = self._grown(context, decision)
            return ratio(*self.numbers(context, *decision.missed)) * grown / decision.grown
        if decision.changes is None:
            return None
        assert decision.v is not None
        assert decision.x is not None
        moved = mean_change(self.latents(context), decision.x)
        change, by, now, size = self.numbers(context, *decision.changes, moved, mean_size(decision.v))
        decision.total += ratio(change, by) * ratio(now, size)
        return decision.total

    def threshold(self) -> float | None:
        return StepCacheHandler.threshold(self) if self.settings.error is None else self.settings.error

    def arrived(self, context: ForwardContext, decision: EasyDecision, history: History, output: Any) -> None:
        """Measure what the forecast of a computed step would have been off by, where that decides."""
        if self.settings.error is None or not (grown := self._grown(context, decision)):
            return
        latents = context.inputs[self.model.adapter.latents]
        off = history.sample_missed(output, latents, context.step_index, self._end(context))
        decision.missed = spent_size(off), mean_size(target_sample(output))
        decision.grown = grown

    def _grown(self, context: ForwardContext, decision: EasyDecision) -> float:
        """Return the growth of a forecast's error up to a step, up to a factor; 0 at a computed step."""
        passed = decision.places[-self.settings.passed_points :]
        return growth(passed, self._place(context)) ** GROWTH

    @staticmethod
    def _place(context: ForwardContext) -> float:
        """Return a step's place on the axis along which errors grow."""
        sigma = context.sigma
        return context.step_index if sigma is None else log_snr(sigma, flow=context.noise == "flow")

    def seen(self, context: ForwardContext, decision: EasyDecision) -> None:
        if self.settings.error is not None:
            return
        decision.x = self.latents(context)
        if not decision.reuse:
            decision.total = 0.0

    def computed(self, context: ForwardContext, decision: EasyDecision, output: Any) -> None:
        if self.settings.error is not None:
            decision.places = (*decision.places, self._place(context))[-self.settings.passed_points :]
            return
        x, v = decision.x, target_sample(output)
        assert x is not None
        if decision.v is not None:
            assert decision.x_computed is not None
            decision.changes = mean_change(v, decision.v), mean_change(x, decision.x_computed)
        decision.x_computed, decision.v = x, v


def mean_size(of: Tensor) -> Tensor:
    """Return the mean of the absolute values, summed in float32 or wider."""
    return spent_size(of.clone())


def spent_size(of: Tensor) -> Tensor:
    """Return what `mean_size` does, of a tensor that is overwritten."""
    return of.abs_().sum(dtype=torch.promote_types(of.dtype, torch.float32)) / of.numel()


def mean_change(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean of |first - second|, in float32."""
    return spent_size(first.float() - second.float())
