"""What methods of guidance share: the part of a run in which they act; and those that guide away from a prediction."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from ...errors import ConfigError
from ...rules.steps import is_short, window
from ..config import MethodConfig
from ..options import Share, ge, within


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedConfig(MethodConfig):
    """A method that acts in a part of the run.

    Attributes:
        start: share of the run at which it begins: step i of n is in from start <= i / n on.
        stop: share of the run at which it ends: step i of n is in while i / n < stop.
    """

    start: Share | None = None
    stop: Share | None = None

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise ConfigError(
                f"{self.name} acts from start = {self.start} to stop = {self.stop} of the run, which is no step; let "
                "stop lie above start"
            )

    def steps(self, count: int) -> range:
        """Return the steps of a run in which it acts."""
        return window(self.start or 0.0, 1.0 if self.stop is None else self.stop, count)

    def acts(self, index: int, count: int | None) -> bool:
        """Tell whether it acts in a step; raise `ConfigError` if that needs an unknown number of steps."""
        if not self.start and self.stop in (None, 1.0):
            return True
        if count is None:
            raise ConfigError(
                f"{self.name} acts from {self.start} to {self.stop} of the run, whose number of steps is not known "
                "here; attach to the pipeline, or set start to 0 and stop to 1"
            )
        return index in self.steps(count)

    def too_short(self, count: int | None) -> str | None:
        """Tell that the window is shorter than one of so many steps, or None."""
        start, stop = self.start or 0.0, 1.0 if self.stop is None else self.stop
        if count is None or not is_short(start, stop, count):
            return None
        return (
            f"{self.name}'s window from {start:g} to {stop:g} is shorter than one of {count} steps; it acts in step "
            f"{self.steps(count)[0]} alone"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PerturbedConfig(WindowedConfig):
    """What such methods share; a model's recipe may fill what is unset.

    The result is unc + s (cond - unc) + w (cond - perturbed), or cond + w (cond - perturbed) without guidance by a
    negative prompt.

    Attributes:
        scale: w; 0 changes nothing.
        rescale: phi in [0, 1]: how far cond + w (cond - perturbed) is scaled back to cond's standard deviation.
        mode: ``branch`` runs a third forward; ``free`` perturbs the unconditional one instead, at no cost, and then w
            plays no part: unc is perturbed in unc + s (cond - unc).
        share_prefix: the third forward begins at the first perturbed block, from what the conditional one had there.
    """

    scale: Annotated[float, ge(0), "0 changes nothing"] | None = None
    rescale: Annotated[float, within(0, 1), "0.7 where it is used"] = 0.0
    mode: Literal["branch", "free"] = "branch"
    share_prefix: bool = True

    def __post_init__(self) -> None:
        WindowedConfig.__post_init__(self)
        if self.mode == "free" and (self.rescale or self.scale):
            what = f"scale = {self.scale}" if self.scale else f"rescale = {self.rescale}"
            raise ConfigError(
                f"{self.name}.{what} says how far to go from a third forward, and with mode = 'free' there is none; "
                "leave it out, guidance_scale decides"
            )

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with every unset option filled in; with ``mode = 'free'`` no scale is."""
        full: Any = MethodConfig.filled(replace(self, mode="branch"), recipe)
        return full if self.mode == "branch" else replace(full, mode="free", scale=None)
