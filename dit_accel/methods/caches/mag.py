"""MagCache: steps are skipped by a curve measured once, of how the size of what is stored changes from step to step.

Source: MagCache (arXiv 2506.09045). Where we depart from it: a forward is skipped whole, and what is continued is its
output or residual, not the last block's; a curve for another number of steps is interpolated in the cumulative
logarithm, not by the nearest step; the conditional branch's ratios decide for the unconditional one too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...report.sections import Section
from ...rules.caching import resampled, size_drift
from ..options import begins_with, gt
from ..saving import Saving
from ..site import ForwardContext
from .calibrated import CalibratedConfig, CalibratedHandler
from .engine import StepDecision
from .log import extended

Ratio = Annotated[float, gt(0), "measure them again"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MagCache(CalibratedConfig):
    """Skips steps in which what is stored hardly changes its size, by a measured curve (MagCache, arXiv 2506.09045).

    What is skipped is known before the run: nothing is measured in it, and the device is never waited for. A skipped
    step adds |1 - product of the ratios since the last computed one|, and steps are skipped while the sum stays below
    the threshold. ``max_consecutive`` is the paper's K, ``warmup_steps`` its retention ratio. The published scripts
    decide for the conditional and the unconditional branch by a curve each; here one curve decides for both, since by
    all of the published ones both skip the same steps.

    Attributes:
        threshold: share of the size; 0 skips nothing.
        ratios: size of what is stored over that of the step before, one for each step of a run; the first is 1. A run
            of other length takes them interpolated. Unset: those published for the model.
    """

    name: ClassVar[str] = "magcache"
    # the paper's for video
    defaults: ClassVar[Mapping[str, Any]] = {
        "threshold": 0.12, "max_consecutive": 4, "warmup_steps": 0.2, "ratios": None, "compute_at": None,
        "warmup_of": "run",
    }  # fmt: skip
    numbers: ClassVar[str] = "ratios"

    ratios: Annotated[tuple[Ratio, ...], begins_with(1)] | None = None


class MagHandler(CalibratedHandler):
    """MagCache on one model."""

    config_type = MagCache
    settings: MagCache
    _steps: int | None = None
    """Steps of the last run."""

    def indicator(self, context: ForwardContext, decision: StepDecision) -> float | None:
        count = self._steps = context.num_inference_steps
        if count is None:
            raise ConfigError(
                "magcache needs the number of steps, which is not known here; attach to the pipeline, or use easycache"
            )
        return size_drift(self._ratios(count), context.step_index, decision.in_a_row)

    def report(self) -> Section | None:
        return extended(super().report(), self._notes(self._steps) if self._steps else ())

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        ratios, threshold = self._ratios(steps), self.settings.threshold
        assert threshold is not None
        share = self.first_expert() if self.model.family and self.model.family.experts > 1 else None
        switch, notes = 0, self._notes(steps)
        if share is not None:
            switch = round(share * steps)
            notes += (f"magcache: the second transformer is counted from {share:.3g} of the run on",)
        skips = lambda index, row: size_drift(ratios, index, row) < threshold  # noqa: E731
        return self.counted(self.settings.skipped_steps(steps, skips, switch), notes)

    def _ratios(self, steps: int) -> Sequence[float]:
        assert self.settings.ratios is not None
        return resampled(self.settings.ratios, steps)

    def _notes(self, steps: int) -> tuple[str, ...]:
        measured = len(self.settings.ratios or ())
        return () if steps == measured else (f"magcache: ratios of {measured} steps, interpolated to {steps}",)
