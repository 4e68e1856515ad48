"""diffusers' guiders: pipelines that mix their predictions by one get what a perturbed branch adds behind it.

So any guider may be combined, also one that does more with the conditional prediction than to weigh it.
"""

from collections.abc import Callable
from typing import Any

from ..site import Site
from .rows import Sample, plus

GUIDERS = ("guider", "guider_2")
"""What pipelines call their guiders; Wan 2.2 has one for each expert."""


def guided_by(site: Site, further: Callable[[], Sample | None]) -> tuple[Any, ...]:
    """Let a pipeline's guiders add something to their results until the methods are detached; return the guiders.

    Args:
        site: a transformer of the pipeline.
        further: what is added to the next result; None: nothing.
    """
    found: list[Any] = [getattr(site.pipe, name, None) for name in GUIDERS]
    guiders: tuple[Any, ...] = tuple(
        {id(one): one for one in found if callable(getattr(one, "forward", None))}.values()
    )
    for guider in guiders:
        site.replace(guider, "forward", _adding(guider.forward, further))
    return guiders


def _adding(forward: Callable[..., Any], further: Callable[[], Sample | None]) -> Callable[..., Any]:
    def guided(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        more = further()
        if more is not None:
            out.pred = plus(out.pred, more)
        return out

    return guided
