"""What is known of how a family's pipelines guide: which rows hold which prompt, and what can't be folded.

Every pipeline mixes its predictions by weights that sum to 1, cond + (s - 1) (cond - uncond), in whatever space. So
what is added to all of them alike is added to the result, whatever s is, at each step, with one expert or two: the
scale need not be known. What rescales by the conditional prediction is no such mix.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError

RESCALING_OPTIONS = ("guidance_rescale", "_guidance_rescale", "_cfg_normalization")
"""Attributes of pipelines that, above 0, rescale the guided prediction by the conditional one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How the pipelines of a family guide.

    Attributes:
        first_rows: which rows come first where one forward holds both prompts.
        rescales: pattern of pipeline classes -> in words, how these rescale the guided prediction by the conditional
            one, whatever their attributes say; the others do only where one of `RESCALING_OPTIONS` asks for it.
        share_prefix: what a block takes besides its streams does not depend on earlier blocks, so that a second pass
            may begin at any block.

    Raises:
        ConfigError: for another ``first_rows``.
    """

    first_rows: Literal["uncond", "cond"] = "uncond"
    rescales: Mapping[str, str] = field(default_factory=dict)
    share_prefix: bool = True

    def __post_init__(self) -> None:
        if self.first_rows not in ("uncond", "cond"):
            raise ConfigError(f"first_rows must be 'uncond' or 'cond', got {self.first_rows!r}; use one of them")

    def why_not_folded(self, pipe: Any) -> str | None:
        """Return how a pipeline rescales the guided prediction by the conditional one, or None."""
        guider = getattr(pipe, "guider", None)
        if guider is not None:
            if type(guider).__name__ != "ClassifierFreeGuidance":
                return f"its guider {type(guider).__name__} does more with the conditional prediction than to weigh it"
            rescale = guider.guidance_rescale
            return f"the guider's guidance_rescale = {rescale:g} scales by the conditional one" if rescale else None
        for pattern, why in self.rescales.items():
            if fnmatch.fnmatch(type(pipe).__name__, pattern):
                return why
        for option in RESCALING_OPTIONS:
            value = getattr(pipe, option, None)
            if isinstance(value, (int, float)) and value > 0:
                return f"{option.lstrip('_')} = {value:g} scales the guided prediction by the conditional one"
        return None
