"""A method for tests that thins out any grid, images too: tiles of visual tokens far from the diagonal are skipped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from dit_accel_kernels import EXACT, SKIPPED, TileLists

from dit_accel.config import MethodConfig
from dit_accel.methods import METHODS
from dit_accel.methods.base import Handler
from dit_accel.plan import AttentionPlan, Moment
from dit_accel.testing import TRIALS, Trial

BLOCK = 4
"""Tokens of a tile side: small, so that tiles of few tokens are all visual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinImages(MethodConfig):
    """Keep tiles up to ``reach`` tiles from the diagonal, and all that hold text.

    Attributes:
        reach: distance in tiles.
        dense_steps: first steps that stay dense.
    """

    name: ClassVar[str] = "thin-images"
    reach: int = 1
    dense_steps: int = 0


class _ThinHandler(Handler):
    def is_active(
        self, depth: int, step_index: int, num_inference_steps: int | None, sigma: float | None = None
    ) -> bool:
        return step_index >= self.config.dense_steps

    def contribute(self, plan: AttentionPlan, moment: Moment) -> AttentionPlan:
        layout = moment.layout
        tokens, tile = layout.tokens, torch.arange(-(-layout.tokens // BLOCK))
        before, behind = layout.text_before, layout.text_before + layout.visual_tokens
        visual = (tile * BLOCK >= before) & (((tile + 1) * BLOCK).clamp(max=tokens) <= behind)
        far = (tile[:, None] - tile[None]).abs() > self.config.reach
        skipped = far & visual[:, None] & visual[None]
        states = torch.where(skipped, SKIPPED, EXACT).to(torch.uint8)
        tiles = TileLists.from_states(states, block_q=BLOCK, block_k=BLOCK, num_q=tokens, num_k=tokens)
        return replace(plan, tiles=tiles)


@contextmanager
def thin_images() -> Iterator[None]:
    """Register the method, and its trial, while the context lasts."""
    trial = Trial(neutral=ThinImages(dense_steps=1000), active=ThinImages())
    METHODS[ThinImages], TRIALS[ThinImages.name] = _ThinHandler, trial
    try:
        yield
    finally:
        del METHODS[ThinImages], TRIALS[ThinImages.name]
