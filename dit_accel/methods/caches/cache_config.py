"""StepCacheConfig: what all step caches share, the steps that are always computed and how a skipped one is forecast."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from ...errors import ConfigError
from ...rules.steps import steps_of, whole_steps
from ..config import MethodConfig
from ..noise import NeedsNoise
from ..options import Count, Share, Steps, ge, gt, within
from ..steps import end_steps, unknown_steps


@dataclass(frozen=True, slots=True)
class ExpertSteps:
    """Which steps of a run one of its transformers makes."""

    first: int = 0  # the first of them
    until: int | None = None  # the step at which another transformer takes over; None: that is not known
    last: bool = True  # no other transformer takes over after it


ALONE = ExpertSteps()
"""A transformer that makes all steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCacheConfig(MethodConfig):
    """What step caches share; a model's recipe may fill what is unset.

    A skipped forward gives a forecast: the input is known, and what was stored is continued over the steps.

    Attributes:
        warmup_steps: first steps that are computed; below 1 a share of the run's steps, rounded up.
        last_steps: last steps that are computed, likewise.
        compute_at: further steps that are computed, each as a point of the run from 0, its first step, to 1, its last:
            the step nearest to it.
        min_steps: runs of fewer steps are computed whole, as those of distilled models; unset: any number is cached.
        warmup_of: what ``warmup_steps`` are the first steps of: ``run``; ``each`` transformer, as Wan 2.2's second
            expert begins anew and a share is one of its own steps; or the ``last`` transformer, before which nothing is
            skipped.
        max_consecutive: most steps that are skipped in a row; below 1 a share of the run's steps, rounded up, so that
            runs of fewer and longer steps skip fewer of them; unset: any number.
        growing: true: ``max_consecutive`` holds at the run's end alone, and the bound grows to it evenly from 1 over
            the steps after the warm-up, as outputs change ever less from step to step.
        predictor: ``hold`` repeats what was stored last; ``taylor`` continues the polynomial through the last
            ``order + 1`` stored (arXiv 2503.06923), ``chebyshev`` one fitted to more of them (arXiv 2603.01623),
            ``heun`` the mean of two slopes (arXiv 2508.16211). ``corrected``, for caches of whole forwards, follows
            four fifths of ``taylor``'s change, and makes partly good in the next computed step what the skipped ones
            were off by, as a predictor-corrector solver does; it needs the noise level.
        order: degree of the polynomial.
        reach: steps past the last computed one that the predictor is used for; below 1 a share of the run's steps,
            rounded down. Those farther on repeat what was stored, as a line that is followed too far leads astray;
            unset: it is used for all.
        stored: what is continued: ``residual``, the output minus the latents that went in, or the ``output``. Where
            the latents do not cover the output, it is the output.
        branches: ``all`` are skipped together, as the first one of a step decides; with ``uncond`` only the
            unconditional one may be.
    """

    warmup_steps: Steps | None = None
    last_steps: Steps | None = None
    compute_at: tuple[Share, ...] | None = None
    min_steps: Count | None = None
    warmup_of: Literal["run", "each", "last"] | None = None
    max_consecutive: Annotated[Steps, gt(0)] | None = None
    growing: bool | None = None
    predictor: Literal["hold", "taylor", "heun", "chebyshev", "corrected"] = "hold"
    order: Annotated[int, within(1, 4), "predictor = 'hold' is order 0"] = 1
    reach: Annotated[Steps, gt(0)] | None = None
    stored: Literal["residual", "output"] = "residual"
    branches: Literal["all", "uncond"] = "all"

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.growing and self.max_consecutive is None:
            raise ConfigError(f"{self.name}.growing = True needs {self.name}.max_consecutive, got None; set the bound")

    def reached(self, count: int | None) -> int | None:
        """Return the number of steps past a computed one that the predictor is used for; None: any number."""
        reach = self.reach
        if reach is None:
            return None
        if int(reach) == reach:
            return int(reach)
        if count is None:
            raise unknown_steps(self, "reach", "set a whole number")
        return count - steps_of(1 - reach, count)

    @property
    def kept_points(self) -> int:
        """How many computed values a forecast reads."""
        return {"hold": 1, "heun": 2, "chebyshev": 2 * self.order + 2}.get(self.predictor, self.order + 1)

    @property
    def passed_points(self) -> int:
        """How many computed values a forecast is right at, were it made for their time."""
        return {"hold": 1, "heun": 2, "chebyshev": 2}.get(self.predictor, self.order + 1)

    def noise_needed(self) -> NeedsNoise | None:
        if self.predictor != "corrected":
            return None
        return NeedsNoise(asks=f"{self.name}.predictor = 'corrected'", instead="use 'taylor'")

    def always_computed(self, index: int, count: int | None, expert: ExpertSteps = ALONE) -> str | None:
        """Return the reason why step ``index`` must be computed, or None if it may be skipped.

        ``count``: steps of the run; None: not known.

        Raises:
            ConfigError: if the options need the run's steps, which are not known.
        """
        _, last = end_steps(self, "warmup_steps", "last_steps", count)
        if self.compute_at and count is None:
            raise unknown_steps(self, "compute_at", "leave it out")
        total = sys.maxsize if count is None else count
        if self.min_steps is not None and total < self.min_steps:
            return "few steps"
        if index < self.first_steps(count, expert):
            return "first steps"
        if index >= total - last:
            return "last steps"
        return "listed" if index in {round(at * (total - 1)) for at in self.compute_at or ()} else None

    def first_steps(self, count: int | None, expert: ExpertSteps = ALONE) -> int:
        """Return the step of a run of ``count`` before which a transformer computes all of its steps."""
        warmup, of = self.warmup_steps or 0, self.warmup_of or "run"
        if of == "last" and not expert.last:
            return sys.maxsize
        if of == "run":
            return end_steps(self, "warmup_steps", "last_steps", count)[0]
        until = count if expert.last else expert.until
        if until is not None:
            return expert.first + whole_steps(warmup, until - expert.first)
        if int(warmup) != warmup:
            raise ConfigError(
                f"{self.name}.warmup_of = 'each' with {self.name}.warmup_steps = {warmup} is a share of each "
                "transformer's steps, and how many the first makes is not known of this model; set warmup_steps to a "
                "whole number"
            )
        return expert.first + int(warmup)

    def skipped_steps(
        self, count: int, skips: Callable[[int, int], bool] = lambda index, in_a_row: True, switch: int = 0
    ) -> tuple[int, ...]:
        """Return the steps of a run that are skipped where no data decide.

        Args:
            skips: (step, steps skipped right before it) -> whether one that may be skipped is.
            switch: the step at which a second transformer takes over; 0: there is none.
        """
        in_a_row, skipped = 0, list[int]()
        experts = (ExpertSteps(until=switch, last=False), range(switch)), (ExpertSteps(switch), range(switch, count))
        for expert, steps in experts:
            for index in steps:
                must = index == steps.start or self.always_computed(index, count, expert)  # nothing is stored at first
                must = must or self.most_skipped(in_a_row, index, count, expert)
                if not must and skips(index, in_a_row):
                    in_a_row += 1
                    skipped.append(index)
                else:
                    in_a_row = 0
        return tuple(skipped)

    def most_skipped(self, in_a_row: int, index: int, count: int | None, expert: ExpertSteps = ALONE) -> str | None:
        """Return the reason why step ``index`` must be computed after so many skipped in a row, or None."""
        bound = self.max_consecutive
        if bound is None:
            return None
        if count is not None:
            bound = whole_steps(bound, count)
            if self.growing:
                first = self.first_steps(count, expert)
                bound = 1 + bound * (index - in_a_row - first) // (count - first)
        elif self.growing or int(bound) != bound:
            raise unknown_steps(self, "growing" if self.growing else "max_consecutive", "leave it out")
        return f"{in_a_row} skipped in a row" if in_a_row >= bound else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCacheConfig(StepCacheConfig):
    """What step caches share that skip a step while something stays below a threshold.

    Attributes:
        threshold: 0 skips nothing.
    """

    threshold: Annotated[float, ge(0), "0 skips nothing"] | None = None


def is_unconditional(branch: str, method: str) -> bool:
    """Tell whether a branch is named as the unconditional one; raise `ConfigError` if its name does not say."""
    name = branch.split("/")[-1]
    if name == "cond_uncond":
        raise ConfigError(
            f"{method}.branches = 'uncond' needs a forward of its own for the unconditional branch; this pipeline "
            "calls both in one; use branches = 'all'"
        )
    if name.startswith("call "):
        raise ConfigError(
            f"{method}.branches = 'uncond' needs to know the unconditional branch, and this pipeline does not tell "
            "its branches (it opens no cache_context); use branches = 'all'"
        )
    return name.startswith(("uncond", "pred_uncond"))  # the latter is what diffusers' guiders say
