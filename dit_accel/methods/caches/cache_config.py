"""StepCacheConfig: what all step caches share, the steps that are always computed and how a skipped one is forecast."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from ...errors import ConfigError
from ...rules.steps import whole_steps
from ..config import MethodConfig
from ..noise import NeedsNoise
from ..options import Count, Share, Steps, begins_with, ge, gt, lt, within
from ..steps import end_steps, unknown_steps


@dataclass(frozen=True, slots=True)
class Turn:
    """Which steps of a run one of its transformers makes.

    Attributes:
        since: the first of them.
        last: no other transformer takes over after it.
    """

    since: int = 0
    last: bool = True


Computed = Annotated[int, within(0, 1), "1 is computed, 0 may be skipped"]

ALONE = Turn()
"""A transformer that makes all steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCacheConfig(MethodConfig):
    """What step caches share; a model's recipe may fill what is unset.

    A skipped forward gives a forecast: the input is known, and what was stored is continued in time.

    Attributes:
        warmup_steps: first steps that are computed; below 1 a share of the run's steps, rounded up.
        last_steps: last steps that are computed, likewise.
        compute_at: further steps that are computed, each as a point of the run from 0, its first step, to 1, its last:
            the step nearest to it.
        min_steps: runs of fewer steps are computed whole, as those of distilled models; unset: any number is cached.
        warmup_of: what ``warmup_steps`` are the first steps of: ``run``; ``each`` transformer, as Wan 2.2's second
            expert begins anew and a share is one of its own steps; or the ``last`` transformer, before which nothing is
            skipped.
        switch: share of the run's steps that the first of two transformers makes. ``each`` needs it for a share of
            them, `plan` to know when the second begins.
        max_consecutive: most steps that are skipped in a row; below 1 a share of the run's steps, rounded up, so that
            runs of fewer and longer steps skip fewer of them; unset: any number.
        growing: true: ``max_consecutive`` holds at the run's end alone, and the bound grows to it evenly from 1 over
            the steps after the warm-up, as outputs change ever less from step to step.
        max_skips: most steps that are skipped in a run; unset: any number.
        steps: one number for each step of the run: 1 is computed, 0 may be skipped; unset: every step may.
        predictor: ``hold`` repeats what was stored last; ``taylor`` continues the polynomial through the last
            ``order + 1`` stored (arXiv 2503.06923), ``chebyshev`` one fitted to more of them (arXiv 2603.01623),
            ``heun`` the mean of two slopes (arXiv 2508.16211).
        order: degree of the polynomial.
        reach: steps past the last computed one that the predictor is used for; below 1 a share of the run's steps,
            rounded down. Those farther on repeat what was stored, as a line that is followed too far leads astray;
            unset: it is used for all.
        variable: what the polynomial is one of: ``step``, the step's index, or ``sigma``, its noise level.
        stored: what is continued: ``residual``, the output minus the latents that went in, or the ``output``. Where
            the latents do not cover the output, it is the output.
        damping: share of the change from what was stored last that ``taylor`` does not follow.
        corrected: true: what the skipped steps were off by, as the next computed one shows, is partly made good in it,
            as a predictor-corrector solver does; needs the noise level. For caches of whole forwards.
        branches: ``all`` are skipped together, as the first one of a step decides; with ``uncond`` only the
            unconditional one may be.
    """

    warmup_steps: Steps | None = None
    last_steps: Steps | None = None
    compute_at: tuple[Share, ...] | None = None
    min_steps: Count | None = None
    warmup_of: Literal["run", "each", "last"] | None = None
    switch: Annotated[float, gt(0), lt(1)] | None = None
    max_consecutive: Annotated[Steps, gt(0)] | None = None
    growing: bool | None = None
    max_skips: Annotated[int, ge(0)] | None = None
    steps: Annotated[tuple[Computed, ...], begins_with(1)] | None = None
    predictor: Literal["hold", "taylor", "heun", "chebyshev"] = "hold"
    order: Annotated[int, within(1, 4), "predictor = 'hold' is order 0"] = 1
    reach: Annotated[Steps, gt(0)] | None = None
    variable: Literal["step", "sigma"] = "step"
    stored: Literal["residual", "output"] = "residual"
    damping: Share | None = None
    corrected: bool | None = None
    branches: Literal["all", "uncond"] = "all"

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.growing and self.max_consecutive is None:
            raise ConfigError(f"{self.name}.growing = True needs {self.name}.max_consecutive, got None; set the bound")
        if self.damping and self.predictor != "taylor":
            raise ConfigError(
                f"{self.name}.damping = {self.damping:g} is for {self.name}.predictor = 'taylor', "
                f"got {self.predictor!r}; leave it out"
            )

    def reached(self, count: int | None) -> int | None:
        """Return how many steps of a run of ``count`` the predictor reaches; None: any number.

        Raises:
            ConfigError: for a share of a run whose steps are not known.
        """
        if self.reach is None or self.reach >= 1:
            return None if self.reach is None else int(self.reach)
        if count is None:
            raise unknown_steps(self, "reach", "set a whole number")
        return int(round(self.reach * count, 9))

    @property
    def kept_points(self) -> int:
        """How many computed values a forecast reads."""
        return {"hold": 1, "taylor": self.order + 1, "heun": 2, "chebyshev": 2 * self.order + 2}[self.predictor]

    @property
    def passed_points(self) -> int:
        """How many computed values a forecast is right at, were it made for their time."""
        return {"hold": 1, "taylor": self.order + 1}.get(self.predictor, 2)

    def noise_needed(self) -> NeedsNoise | None:
        """Return the option that asks for it, where one does."""
        if self.variable == "sigma":
            return NeedsNoise(asks=f"{self.name}.variable = 'sigma'", instead="use 'step'")
        corrected = NeedsNoise(asks=f"{self.name}.corrected = True", instead="use corrected = False")
        return corrected if self.corrected else None

    def always_computed(self, index: int, count: int | None, turn: Turn = ALONE) -> str | None:
        """Return why a step, 0-based, of a run of ``count`` (None: unknown) is computed whatever is measured, or None.

        Raises:
            ConfigError: if the options need the run's steps, which are not known, or are for another number of them.
        """
        if count is not None and count < (self.min_steps or 0):
            return "few steps"
        _, last = end_steps(self, "warmup_steps", "last_steps", count)
        if self.steps is not None and len(self.steps) != count:
            raise ConfigError(
                f"{self.name}.steps has {len(self.steps)} entries, this run has {count or 'an unknown number of'} "
                "steps; give one for each"
            )
        if index < self.first_steps(count, turn):
            return "first steps"
        if count is not None and index >= count - last:
            return "last steps"
        if self.steps is not None and self.steps[index]:
            return "listed"
        if self.compute_at and count is None:
            raise unknown_steps(self, "compute_at", "leave it out")
        return "listed" if index in {round(at * ((count or 0) - 1)) for at in self.compute_at or ()} else None

    def first_steps(self, count: int | None, turn: Turn = ALONE) -> int:
        """Return the step of a run of ``count`` before which a transformer's are all computed.

        Raises:
            ConfigError: for a share of a first transformer's steps where it is not known how many these are.
        """
        warmup, of = self.warmup_steps or 0, self.warmup_of or "run"
        if of == "last" and not turn.last:
            return sys.maxsize
        if of == "run":
            return whole_steps(warmup, count or 0)
        if not turn.last and 0 < warmup < 1 and self.switch is None:
            raise ConfigError(
                f"{self.name}.warmup_of = 'each' with {self.name}.warmup_steps = {warmup} is a share of each "
                f"transformer's steps, and how many the first makes is not known; set {self.name}.switch to their "
                "share of the run, or warmup_steps to a whole number"
            )
        own = (count or 0) - turn.since if turn.last else self._switch_of(count or 0)
        return turn.since + whole_steps(warmup, own)

    def _switch_of(self, count: int) -> int:
        """Return the step at which the second transformer is expected to take over."""
        return round((self.switch or 0) * count)

    def skipped_steps(
        self, count: int, skips: Callable[[int, int], bool] = lambda index, in_a_row: True, experts: int = 1
    ) -> tuple[int, ...]:
        """Return the steps of a run that are skipped where no data decide.

        Args:
            count: steps of the run.
            skips: (step, steps skipped right before it) -> whether one that may be skipped is.
            experts: transformers that share the steps; where ``switch`` is unset, they count as one.
        """
        switch = self._switch_of(count) if experts > 1 and self.switch is not None else 0
        in_a_row, skipped = 0, list[int]()
        for index in range(count):
            begins = index in (0, switch)  # nothing is stored
            turn = Turn(switch if index >= switch else 0, index >= switch)
            must = begins or self.always_computed(index, count, turn)
            must = must or self.most_skipped(in_a_row, len(skipped), index, count, turn)
            if not must and skips(index, in_a_row):
                in_a_row += 1
                skipped.append(index)
            else:
                in_a_row = 0
        return tuple(skipped)

    def most_skipped(self, in_a_row: int, skips: int, index: int, count: int | None, turn: Turn = ALONE) -> str | None:
        """Return why a step is computed after so many that were skipped, in a row and in all, or None.

        Raises:
            ConfigError: if the bound grows over the run's steps, and how many they are is not known.
        """
        bound = self.max_consecutive
        if bound is not None and count is None and (self.growing or bound < 1):
            raise unknown_steps(self, "growing" if self.growing else "max_consecutive", "leave it out")
        bound = None if bound is None else whole_steps(bound, count or 0)
        if bound is not None and count is not None and self.growing:
            first = self.first_steps(count, turn)
            bound = min(bound, 1 + bound * (index - in_a_row - first) // max(count - first, 1))
        if bound is not None and in_a_row >= bound:
            return f"{in_a_row} skipped in a row"
        if self.max_skips is not None and skips >= self.max_skips:
            return f"{skips} skipped in all"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCacheConfig(StepCacheConfig):
    """What step caches share that skip a step while something stays below a threshold.

    Attributes:
        threshold: 0 skips nothing.
    """

    threshold: Annotated[float, ge(0), "0 skips nothing"] | None = None


def is_unconditional(branch: str, method: str) -> bool:
    """Tell by its name whether a branch is the unconditional one; raise `ConfigError` where names don't tell."""
    own = branch.rsplit("/", 1)[-1]
    if own == "cond_uncond":
        raise ConfigError(
            f"{method}.branches = 'uncond' needs a forward of its own for the unconditional branch; this pipeline "
            "calls both in one; use branches = 'all'"
        )
    if own.startswith("call "):
        raise ConfigError(
            f"{method}.branches = 'uncond' needs to know the unconditional branch, and this pipeline does not tell "
            "its branches (it opens no cache_context); use branches = 'all'"
        )
    return own.startswith(("uncond", "pred_uncond"))  # the latter is what diffusers' guiders say
