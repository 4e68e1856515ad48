"""LVSA: sparse self-attention for clips longer than trained, over a window and anchor frames that move step by step.

Source: LVSA (arXiv 2605.31057); the rule is the released code's, see `dit_accel.rules.lvsa`. Where we depart from it:
any tile size, where a tile is exact if any two of its frames see each other; text is exact; the rest may be pooled; it
stands in one attention call with decay (`UltraViCo`) and with other lists and selections.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from dit_accel_kernels import TileLists

from ...plan.call import Call
from ...plan.context import CallContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...plan.tiling import tiles_without_text, visual_lists, visual_lists_bytes
from ...rules.lvsa import AnchorRule, met
from ..base import Model, Phase
from ..options import Count, ge
from ..saving import Saving
from .sparse import SparseConfig, SparseHandler


@dataclass(frozen=True, slots=True, kw_only=True)
class LVSA(SparseConfig):
    """Sparse attention for clips longer than trained: a window, and anchor frames that move on (arXiv 2605.31057).

    A latent frame sees about as many frames as the trained clips have, whatever the length: the first ones, every n-th
    (the anchors) and those around it. A clip that is no longer than the trained ones is left as it is. For
    unset options and those that begin with ``dense`` or ``block`` see `SparseConfig`; tiles of a whole frame leave out
    most.

    Attributes:
        window: latent frames to either side that a frame sees.
        first: first latent frames that every frame sees.
        rotate: anchors move on by one frame a step, so that every two frames meet in some step.
        rest: ``skip`` leaves the other tiles out, ``pooled`` lets each enter as one key, its tokens' mean, ``cached``
            as in the layer's last dense call, whose anchors stay until the next; see ``refresh``.
        trained_frames: latent frames of the clips that the model was trained on; unset: the released model's.
    """

    name: ClassVar[str] = "lvsa"

    window: Annotated[int, ge(0)] = 4
    first: Annotated[int, ge(0)] = 1
    rotate: bool = True
    rest: Literal["skip", "pooled", "cached"] = "skip"
    trained_frames: Count | None = None

    @property
    def rule(self) -> AnchorRule:
        """What decides which frames see which."""
        assert self.trained_frames is not None
        return AnchorRule(trained_frames=self.trained_frames, window=self.window, first=self.first)

    def offsets(self, layout: TokenLayout) -> range:
        """Return the anchors' offsets that steps have in turn."""
        return range(self.rule.stride(layout.frames) if self.rotate else 1)

    def runs(self, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        """Return the runs of frames that visual tiles hold, first and last, int [2, R], and each tile's run, int [N].

        Most tiles hold a run that others hold too, so that which see each other is known by few of them.
        """
        start = np.arange(0, layout.visual_tokens, self.tiling.block_size)
        ends = np.stack([start, np.append(start[1:], layout.visual_tokens) - 1]) // layout.tokens_per_frame
        new = np.diff(ends, axis=1, prepend=-1).any(0)
        return ends[:, new], new.cumsum() - 1

    def kept(self, layout: TokenLayout, offset: int) -> np.ndarray:
        """Return which visual tiles are exact, bool [N, N]: those in which any two frames see each other."""
        runs, of_tile = self.runs(layout)
        return met(self.rule.visible(layout.frames, offset), *runs)[np.ix_(of_tile, of_tile)]

    def tiles(self, layout: TokenLayout, step: int, device: torch.device | str = "cpu") -> TileLists:
        """Return the tile lists of a step, shared by all heads; the same object for the same arguments."""
        offsets = self.offsets(layout)
        return _tiles(self, layout, offsets[step % len(offsets)], str(torch.device(device)))


@lru_cache(maxsize=64)  # a round of steps is as many lists as the stride
def _tiles(settings: LVSA, layout: TokenLayout, offset: int, device: str) -> TileLists:
    return visual_lists(
        settings.kept(layout, offset), settings.rest == "pooled", layout, settings.tiling.block_size, device
    )


class LVSAHandler(SparseHandler):
    """LVSA on one model: the step's lists put into the plan of clips that are long enough."""

    config_type = LVSA
    phase = Phase.LISTS
    by_place = True
    extends = frozenset({"frames"})
    settings: LVSA

    def __init__(self, config: LVSA, model: Model) -> None:
        super().__init__(replace(config, trained_frames=model.trained_frames(config)), model)

    def check_layout(self, layout: TokenLayout) -> str:
        config, rule = self.settings, self.settings.rule
        stride, length = rule.stride(layout.frames), f"{layout.frames} latent frames"
        if stride == 1:
            return f"lvsa leaves nothing out: {length}, trained on {config.trained_frames}"
        turns = f"moving by one a step, {stride} steps a round" if config.rotate else "at the same places in every step"
        return (
            f"lvsa: {length}, trained on {config.trained_frames}; each sees {2 * config.window + 1} around it, the "
            f"first {config.first} and every {stride}th, {turns}; {rule.density(layout.frames):.1%} of the frame pairs"
        )

    def applies(self, layout: TokenLayout) -> bool:
        return self.settings.rule.stride(layout.frames) > 1

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        settings, layout, device = self.settings, context.layout, context.device
        step = 0 if context.training else context.step_index
        return plan.with_tiles(settings.tiles(layout, step, device), self.model.tiling.token_order(layout, device))

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        settings, note = self.settings, self.check_layout(layout)
        if not self.applies(layout):
            return Saving(notes=(note,))
        block, offsets, (runs, of_tile) = self.model.tiling.block_size, settings.offsets(layout), settings.runs(layout)
        text = tiles_without_text(layout, block)
        sparse = [step for step in range(steps) if not settings.is_dense(step, steps, settings.dense_layers or 0, 0.0)]
        held, size = {step % len(offsets) for step in sparse}, 0
        exact, alike = np.zeros((runs.shape[1],) * 2), np.bincount(of_tile[:text], minlength=runs.shape[1])
        for offset in offsets:
            meet = met(settings.rule.visible(layout.frames, offset), *runs)
            exact += meet
            if offset in held:
                size += visual_lists_bytes(int(alike @ ~meet @ alike), self.pools, layout, block)
        exact /= len(offsets)
        return self.saving_of(
            lambda share, rows: share * exact[np.ix_(of_tile[rows], of_tile)],
            layout,
            steps,
            list_bytes=size,
            notes=(note,),
        )
