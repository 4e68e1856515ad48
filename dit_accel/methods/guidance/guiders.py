"""diffusers' guiders: pipelines that mix their predictions by one get what a perturbed branch adds behind it.

So any guider may be combined, also one that does more with the conditional prediction than to weigh it. What is added
is a difference of the transformer's own predictions: a pipeline that hands others to its guider is refused.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...errors import ConfigError
from ..site import Site
from .rows import Sample, plus

GUIDERS = ("guider", "guider_2")
"""What pipelines call their guiders; Wan 2.2 has one for each expert."""


def guided_by(site: Site, further: Callable[[Any], Sample | None]) -> tuple[Any, ...]:
    """Let a pipeline's guiders add something to their results until the methods are detached; return the guiders.

    ``further``: what is added to the next result, which the guider mixes from this conditional prediction; None:
    nothing.
    """
    components: list[Any] = [getattr(site.pipe, name, None) for name in GUIDERS]
    guiders: tuple[Any, ...] = tuple(
        {id(component): component for component in components if callable(getattr(component, "forward", None))}.values()
    )
    for guider in guiders:
        site.replace(guider, "forward", _adding(guider.forward, further))
    return guiders


def require_own(method: str, given: Any, own: Sample) -> None:
    """Raise `ConfigError` if a pipeline changed what the transformer gave before its guider mixes it."""
    if given is own or (isinstance(given, torch.Tensor) and isinstance(own, torch.Tensor) and given.shape == own.shape
                        and torch.equal(given, own.to(given.dtype))):  # fmt: skip
        return
    raise ConfigError(
        f"{method} adds to what the guider gives, and this pipeline changes the transformer's prediction before its "
        f"guider mixes it; use {method}.mode = 'free', or the pipeline's class among Guidance.converted of the adapter"
    )


def _adding(forward: Callable[..., Any], further: Callable[[Any], Sample | None]) -> Callable[..., Any]:
    def guided(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        more = further(kwargs.get("pred_cond", args[0] if args else None))
        if more is not None:
            out.pred = plus(out.pred, more)
        return out

    return guided
