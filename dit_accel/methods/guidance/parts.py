"""Which prompts a forward holds, and in which rows."""

from typing import Any, Literal

from ..site import ForwardContext, Site
from .passes import Rows
from .rows import halves_alike

Part = Literal["cond", "uncond", "both"]


class Parts:
    """Tells which prompts forwards hold; what it found out of latents it keeps for a run."""

    def __init__(self) -> None:
        self._both: dict[tuple[str, str, int], bool] = {}

    def of(self, site: Site, context: ForwardContext, latents: Any) -> Part:
        """Return which prompts a forward holds, by the branch's name and, where that leaves it open, its latents."""
        own = context.branch.rsplit("/", 1)[-1]
        if own in ("cond", "pred_cond"):
            return "cond"
        if own not in ("cond_uncond", "call 0"):
            return "uncond"
        key = context.transformer, context.branch, len(latents)
        if key not in self._both:
            off = getattr(site.pipe, "do_classifier_free_guidance", True) is False
            self._both[key] = not off and halves_alike(latents)
        return "both" if self._both[key] else "cond"

    def forget(self) -> None:
        """Forget what was found: another run begins."""
        self._both.clear()


def rows_in(site: Site, part: Part, batch: int, wanted: Literal["cond", "uncond"]) -> Rows:
    """Return the rows of one prompt in a forward; None: it holds no other."""
    if part != "both":
        return None
    half = batch // 2
    return (slice(0, half) if site.adapter.guidance.first_rows == wanted else slice(half, batch)), batch
