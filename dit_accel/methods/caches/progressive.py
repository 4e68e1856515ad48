"""Progressive resolution: steps at half the height and width, while noise hides what the full size would add.

Bottleneck Sampling (arXiv 2503.18940) and Jenga (arXiv 2505.16864) change it in the pipeline, here the forward does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...report.sections import Section
from ...rules.steps import whole_steps
from ..base import Handler, Model, Phase, Place
from ..config import MethodConfig
from ..gradients import is_recorded
from ..noise import FLOW, NeedsNoise
from ..options import Count, Share, Steps
from ..saving import Saving
from ..site import ForwardContext, Site, sample_of, with_sample
from .log import CachedForward, section_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressiveResolution(MethodConfig):
    """Runs noisy steps, or those between full ones, at half the height and width, with a quarter of the tokens.

    Attributes:
        until: noise level from 0 to 1 above which steps are small; 1: none is.
        every: below that one step in so many is full, and small ones between keep the high frequencies that it
            predicted: a step cache whose skipped steps compute a little. 1: all are full.
        tau: correct those by what both sizes differed by at the full one, as multigrid's full approximation scheme
            does, which takes a small forward beside each full one.
        last_steps: last steps that are full; below 1 a share of the run's steps, rounded up.
    """

    name: ClassVar[str] = "progressive"

    until: Share = 0.8
    every: Count = 1
    tau: bool = True
    last_steps: Steps = 1

    def noise_needed(self) -> NeedsNoise:
        """Return that the small forward is told the noise level of a flow."""
        return NeedsNoise(asks=self.name, instead="take a step cache such as EasyCache", kinds=FLOW)

    def is_small(self, index: int, count: int | None, sigma: float, since: int | None) -> bool:
        """Tell whether a step is small, ``since`` steps after the branch's last full one, if it had any."""
        wanted = sigma > self.until or (since is not None and since < self.every)
        return wanted and (count is None or index < count - whole_steps(self.last_steps, count))


class ProgressiveHandler(Handler):
    """ProgressiveResolution on one model."""

    config_type = ProgressiveResolution
    phase = Phase.SIZES
    places = frozenset({Place.FORWARD})
    settings: ProgressiveResolution

    def __init__(self, config: ProgressiveResolution, model: Model) -> None:
        super().__init__(config, model)
        # (transformer, branch) -> its last full step, what this predicted of high frequencies, and what it adds to low
        self._full: dict[tuple[str, str], tuple[int, Tensor, Tensor]] = {}
        self._log: list[CachedForward] = []
        self.exclusive = frozenset({"cache"} if config.every > 1 else ())  # type: ignore[misc] - of these settings
        if not model.adapter.flow:
            raise _refused(
                f"what {model.adapter.name} predicts: its adapter does not say that it is a flow (Adapter.flow)"
            )
        taken, given = ((model.config or {}).get(f"{side}_channels") for side in ("in", "out"))
        if taken and given and taken not in (given, 4 * given):
            raise _refused(f"a transformer that takes {taken} channels, conditions among them, and gives {given}")

    def check_with(self, others: Sequence[Handler]) -> None:
        """Refuse what makes a small picture too and, beside steps of two sizes, what follows a step's one forward."""
        for other in others:
            follows = self.settings.every > 1 and "perturbed prediction" in other.exclusive
            if follows or getattr(other, "two_stages", False):
                raise _refused(f"the forwards of {other.name} with progressive.every = {self.settings.every}")

    def install(self, site: Site) -> None:
        """Run around every forward of the transformer."""
        site.around_forward(lambda context, run: self._around(site, context, run))

    def _around(self, site: Site, context: ForwardContext, run: Callable[..., Any]) -> Any:
        latents, sigma, settings = context.inputs[site.adapter.latents], context.sigma, self.settings
        if context.training or is_recorded(latents) or sigma == 0:
            return run()
        if sigma is None or context.noise != "flow":
            raise settings.noise_needed().untold(noise="none" if sigma is None else context.noise)
        index, count, key = context.step_index, context.num_inference_steps, (context.transformer, context.branch)
        full = self._full.pop(key, None)
        small = settings.is_small(index, count, sigma, full and index - full[0])
        self._log.append(CachedForward(
            transformer=key[0], step_index=index, branch=key[1], reused=small, reason="" if small else "full size",
        ))  # fmt: skip
        if not (small or settings.is_small(index + 1, count, 0.0, 1)):
            return run()
        layout = poolable_layout(site, context)
        x = unpacked(latents.to(torch.promote_types(latents.dtype, torch.float32)), layout)
        # before the full forward, beside which no method would learn from it
        low, output = _run_small(site, context, run, x, layout) if small or settings.tau else (x.new_zeros(()), None)
        if small:
            clean = doubled(low) if full is None else doubled(low + full[2]) + full[1]
            output = with_sample(output, packed((x - clean) / sigma, like=latents))
        else:
            output = run()
            clean = x - sigma * unpacked(sample_of(output), layout)
            full = index, clean - doubled(halved(clean)), halved(clean) - low if settings.tau else low
        if full is not None:
            self._full[key] = full
            self.note_held(sum(high.nbytes + tau.nbytes for _, high, tau in self._full.values()))
        return output

    def reset(self) -> None:
        self._full.clear()

    def begin_run(self) -> None:
        self._log.clear()

    def report(self) -> Section | None:
        section, small = section_of(self.name, self._log, None), sum(entry.reused for entry in self._log)
        return section and replace(section, title=f"progressive: {small} of {len(self._log)} small (# full, . small)")

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        family: Any = self.model.family
        settings, small, since = self.settings, set[int](), None
        for index in range(steps):  # as if noise levels fell evenly
            if settings.is_small(index, steps, 1 - index / steps, since):
                small.add(index)
            since = 1 if index not in small else since and since + 1
        width, sizes = family.heads * family.head_dim, (_half(layout).tokens, layout.tokens)
        one, whole = (tokens * (2 * width + family.ffn_dim + tokens) for tokens in sizes)  # FLOPs, but for a factor
        beside = steps - len(small) if settings.every > 1 and settings.tau else 0
        note = f"{len(small)} of {steps} steps of progressive are counted as small; a noise shift above 1 has more"
        saved, further = (
            family.forwards_per_step * count for count in (len(small), (len(small) + beside) * one / whole)
        )
        return Saving(forwards=saved, skipped=frozenset(small), extra_forwards=further, notes=(note,) if small else ())


def _run_small(
    site: Site, context: ForwardContext, run: Callable[..., Any], x: Tensor, layout: TokenLayout
) -> tuple[Tensor, Any]:
    """Run a forward at half the height and width; return the clean latents that it predicts, and its output.

    The means of 2 x 2 latents (1 - s) clean + s noise, by 1 - s / 2, are latents of the noise level s / (2 - s).
    """
    inputs, adapter, sigma = context.inputs, site.adapter, context.sigma or 0.0
    half, pooled, level = _half(layout), halved(x) / (1 - sigma / 2), sigma / (2 - sigma)
    # the last of an odd number of rows or columns is laid twice
    ends = zip((2 * half.height, 2 * half.width), pooled.shape[-2:], strict=True)
    rows, columns = (torch.arange(end, device=x.device).clamp(max=size - 1) for end, size in ends)
    even = pooled[..., rows[:, None], columns]
    timestep = inputs[adapter.timestep] * (level / sigma)
    given = {adapter.latents: packed(even, like=inputs[adapter.latents]), adapter.timestep: timestep}
    if (ids := inputs.get("img_ids")) is not None:  # those of the first rows and columns, as of a small picture
        placed = ids.unflatten(-2, (layout.height, layout.width))
        given["img_ids"] = placed[..., : half.height, : half.width, :].flatten(-3, -2)
    if (shapes := inputs.get("img_shapes")) is not None:
        given["img_shapes"] = [[half.grid[:3]]] * len(shapes)
    with site.branch("small"):
        output = run(**given)
    clean = even - level * unpacked(sample_of(output).to(x.dtype), half)
    return clean[..., : pooled.shape[-2], : pooled.shape[-1]], output


def poolable_layout(site: Site, context: ForwardContext) -> TokenLayout:
    """Return a forward's layout; raise `ConfigError` for tokens or other inputs that can't be pooled."""
    layout, latents = context.layout, context.inputs[site.adapter.latents]
    further = [name for name, value in context.inputs.items() if "control" in name and value is not None]
    if layout is None or not isinstance(latents, Tensor):
        raise _refused("latents whose rows and columns are not known")
    if further or (latents.dim() == 3 and latents.shape[1] != layout.visual_tokens):
        raise _refused(f"control or reference tokens, which came in {[*further, site.adapter.latents][0]}")
    if context.inputs[site.adapter.timestep].dim() > 1:
        raise _refused("a timestep for each token")
    return layout


def _half(layout: TokenLayout) -> TokenLayout:
    return replace(layout, height=-(-layout.height // 2), width=-(-layout.width // 2))


def halved(x: Tensor) -> Tensor:
    """Return the means of 2 x 2 of a tensor [..., H, W]."""
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-3, -1))


def doubled(x: Tensor) -> Tensor:
    """Return a tensor [..., H, W] with each value four times, [..., 2 H, 2 W]."""
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def unpacked(latents: Tensor, layout: TokenLayout) -> Tensor:
    """Return latents [..., H, W], also of those packed as [B, tokens, 4 C]."""
    return latents if latents.dim() != 3 else F.pixel_shuffle(latents.unflatten(1, layout.grid[:3]).movedim(-1, 2), 2)


def packed(x: Tensor, like: Tensor) -> Tensor:
    """Return latents [..., H, W] as those of ``like`` lie, packed or not, in their dtype."""
    return (F.pixel_unshuffle(x, 2).movedim(2, -1).flatten(1, 3) if like.dim() == 3 else x).to(like.dtype)


def _refused(what: str) -> ConfigError:
    return ConfigError(f"progressive can't halve {what}; detach it, or take a step cache such as EasyCache")
