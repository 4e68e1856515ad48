"""SeaCache: steps are skipped while the latents hardly change, seen through a filter that removes the step's noise.

Source: SeaCache (arXiv 2602.18993). Where we depart from it: the latents are filtered, as diffusers does, not the first
block's input, so that it works on every model; a forward is skipped whole, and what is continued is its output or
residual, not the last block's; the first branch of a step decides for all.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...plan.layout import TokenLayout
from ..noise import NeedsNoise
from ..site import ForwardContext
from .cache_config import MeasuredCacheConfig
from .signal import SignalHandler

CLOSEST = 1e-6
"""Noise level nearest to 0 and to 1 that is filtered for, as a gain at either end is 0 or without bound."""

POWER = 3.0
"""The power by which that of clean latents falls with the frequency: the paper's for videos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeaCache(MeasuredCacheConfig):
    """Skips steps whose latents hardly change but for noise (SeaCache, arXiv 2602.18993); needs no calibration.

    Each step adds mean|s - s'| / mean|s'|, with s the latents of this step and s' those of the step before after a
    Wiener filter for the step's noise level; steps are skipped while the sum stays below the threshold. With a = 1 -
    sigma, b = sigma and a power of 1 / f^3 at frequency f, the filter's gain along frames, height and width is a / (a^2
    + b^2 f^3), scaled to a mean of 1. So b / a alone counts: where a
    scheduler tells noise over signal, s, sigma is s / (1 + s). All rows of a batch are measured and skipped together.

    Attributes:
        threshold: relative change of the filtered latents; 0 skips nothing.
    """

    name: ClassVar[str] = "seacache"
    # diffusers' own
    defaults: ClassVar[Mapping[str, Any]] = {
        "threshold": 0.25, "warmup_steps": 1, "last_steps": 1, "max_consecutive": 2,
    }  # fmt: skip

    def noise_needed(self) -> NeedsNoise:
        return NeedsNoise(asks=self.name, instead="use easycache, or a scheduler that lists sigmas")


class SeaHandler(SignalHandler):
    """SeaCache on one model."""

    config_type = SeaCache
    settings: SeaCache

    def signal(self, context: ForwardContext) -> Tensor:
        """Return the latents without what the step's noise hides, in float32."""
        share = context.share_of_noise
        if share is None:
            raise self.settings.noise_needed().untold()
        latents = self.latents(context).float()
        latents, axes = on_grid(latents, context.layout, self.model.adapter.grid)
        return filtered(latents, axes, share)


def on_grid(latents: Tensor, layout: TokenLayout | None, grid: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Return latents with frames, height and width on axes of their own, and these axes.

    ``grid``: the adapter's; where it is `latents_grid`, it says which axes the latents have.
    """
    if latents.dim() == 3:
        tokens = latents.shape[1]
        if layout is None or layout.frames * layout.height * layout.width != tokens:
            return latents, (1,)
        return latents.unflatten(1, (layout.frames, layout.height, layout.width)), (1, 2, 3)
    known = grid.keywords if isinstance(grid, functools.partial) else {}
    last = latents.dim() - (2 if known.get("channels_last") else 1)
    frames = known.get("frames_axis", 2)
    return latents, (*((frames,) if latents.dim() == 5 and frames is not None else ()), last - 1, last)


def filtered(latents: Tensor, axes: tuple[int, ...], sigma: float, power: float = POWER) -> Tensor:
    """Return latents after the Wiener filter for a noise level in (0, 1), of the same shape, in float32."""
    sigma = min(max(sigma, CLOSEST), 1 - CLOSEST)
    gain = torch.ones((), device=latents.device)
    for axis in axes:
        frequency = torch.fft.fftfreq(latents.shape[axis], device=latents.device).abs()
        along = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2 * frequency**power)
        gain = gain * along.view(-1, *(1 for _ in range(latents.dim() - 1 - axis)))
    spectrum = torch.fft.fftn(latents, dim=axes) * (gain / gain.mean())
    return torch.fft.ifftn(spectrum, dim=axes).real
