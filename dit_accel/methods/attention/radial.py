"""RadialAttention: a static sparse self-attention for video whose density falls with the distance of two frames.

Source: Radial Attention (arXiv 2506.19852); the rule is the published code's, see `dit_accel.rules.radial`. Beyond the
original: any token count, text tokens exact, pooled instead of skipped tiles, a 2-D tile order, a dense last step.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED, TileLists
from torch import Tensor

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan, CallContext
from ...plan.tiling import visual_first
from ...rules.radial import RadialRule, kept_tiles
from ..base import handles
from .sparse import SparseConfig, SparseHandler

DEFAULTS: Mapping[str, Any] = {
    "decay_factor": 1.0,
    "block_size": 128,
    "near": "full",
    "sink": True,
    "dense_steps": 0.24,
    "dense_last_steps": 0,
    "dense_layers": 1,
}
"""What an option is where neither the user nor the model's recipe sets it: the paper's mask and warm-up (12 of 50)."""

WORTHWHILE_TOKENS = 20_000
"""Visual tokens below which radial rarely pays: the rest of the network then costs more than attention does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RadialAttention(SparseConfig):
    """Sparse self-attention that keeps all of near frames and ever thinner bands of far ones (arXiv 2506.19852).

    An option left unset takes the recipe of the model's family, or `DEFAULTS` where the family has none. For the options
    that begin with ``dense`` see `SparseConfig`.

    Attributes:
        decay_factor: > 0; scales the width of the bands at frame distance 2 and more; 1 is the paper's, smaller is
            sparser. No band gets narrower than a tile, so very small values change nothing more.
        block_size: tokens of a tile; a power of two, 16 to 512.
        near: the neighbouring frame: ``full``, or ``half`` a frame's tokens to either side.
        sink: let every token see all of the first frame.
        boundary: ``any`` keeps each tile with an allowed pair of tokens, so that every token sees 100 % of its own
            frame; ``published`` rounds like the original, for comparison, which loses tokens at frame borders.
        rest: what becomes of the other tiles: ``skip``, or ``pooled`` (each enters as one key, its tokens' mean).
        order: ``raster`` tiles are strips of a frame; ``tiles`` permutes the tokens so that they are patches, and keeps
            as many tiles, those nearest in the plane.

    Raises:
        ConfigError: for an option out of range, or ``published`` with ``tiles``.
    """

    name: ClassVar[str] = "radial"
    generic: ClassVar[Mapping[str, Any]] = DEFAULTS

    decay_factor: float | None = None
    block_size: int | None = None
    near: Literal["full", "half"] | None = None
    sink: bool | None = None
    boundary: Literal["any", "published"] = "any"
    rest: Literal["skip", "pooled"] = "skip"
    order: Literal["raster", "tiles"] = "raster"

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        decay, block = self.decay_factor, self.block_size
        if decay is not None and not (math.isfinite(decay) and decay > 0):
            raise ConfigError(f"radial.decay_factor must be a finite number > 0, got {decay!r}; 1 is the paper's")
        if block is not None and (not 16 <= block <= 512 or block & (block - 1)):
            raise ConfigError(f"radial.block_size must be a power of two from 16 to 512, got {block}; 128 is usual")
        if self.boundary == "published" and self.order == "tiles":
            raise ConfigError(
                "radial.boundary = 'published' rounds raster tiles and has no meaning with radial.order = 'tiles'; "
                "use boundary = 'any' or order = 'raster'"
            )

    def rule(self) -> RadialRule:
        """Return the parameters of the mask alone, `DEFAULTS` where unset."""
        return _rule(self)

    def tiles(self, layout: TokenLayout, device: torch.device | str = "cpu") -> TileLists:
        """Return the tile lists of a layout, shared by all heads; cached by (layout, rule, rest, device).

        The lists count tokens as `token_order` sorts them: visual tokens, then text. A tile that holds any text token
        is exact in rows and columns.

        Raises:
            ConfigError: for a layout of one frame.
        """
        _refuse_one_frame(layout)
        return _tiles(self.rule(), self.rest, layout, str(torch.device(device)))

    def token_order(self, layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor | None:
        """Return int64 [S], position in the tiles' order -> token index; None where that is the sequence's own order.

        Visual tokens come first (by patches with ``order="tiles"``), then the text before them, then the text after.
        """
        rule = self.rule()
        patches = rule.block_size if rule.order == "tiles" and layout.tokens_per_frame > rule.block_size else None
        return visual_first(layout, patches, device)

    def tile_counts(self, layout: TokenLayout) -> tuple[int, int]:
        """Return (tiles kept, tiles in all) over the visual tokens alone.

        With ``boundary="published"`` only whole tiles count, floor(n / B) a side, as in the original's figures.

        Raises:
            ConfigError: for a layout of one frame.
        """
        kept = self._whole(layout)
        return int(np.count_nonzero(kept)), kept.size

    def density(self, layout: TokenLayout) -> float:
        """Return the kept share of `tile_counts`, in (0, 1].

        Raises:
            ConfigError: for a layout of one frame.
        """
        kept, total = self.tile_counts(layout)
        return kept / total

    def advice(self, layout: TokenLayout) -> str | None:
        """Return what the user should know of radial on this layout, or None where it fits well.

        Raises:
            ConfigError: for a layout of one frame.
        """
        kept = self._whole(layout)
        empty, tokens = int((~kept.any(axis=1)).sum()), layout.visual_tokens
        parts = []
        if kept.all():
            parts.append(f"radial keeps all {kept.size} tiles of {tokens} visual tokens, so it can't be faster here")
        elif tokens < WORTHWHILE_TOKENS:
            parts.append(f"radial seldom pays below {WORTHWHILE_TOKENS} visual tokens, and here are {tokens}")
        if empty:
            parts.append(f"boundary = 'published' leaves {empty} of {len(kept)} block rows no visual tile; use 'any'")
        return "; ".join(parts) or None

    def _whole(self, layout: TokenLayout) -> np.ndarray:
        """Return the kept map of the visual tiles that count, bool [N, N]."""
        _refuse_one_frame(layout)
        rule = self.rule()
        kept = kept_tiles(rule, layout.frames, layout.height, layout.width)
        whole = layout.visual_tokens // rule.block_size
        return kept[:whole, :whole] if rule.boundary == "published" and whole else kept


def _refuse_one_frame(layout: TokenLayout) -> None:
    if layout.frames < 2:
        raise ConfigError(
            f"radial needs at least 2 latent frames, got {layout.frames} ({layout.height} x {layout.width} tokens): on "
            "one frame it is dense attention; leave it out for images"
        )


@lru_cache(maxsize=64)
def _rule(config: RadialAttention) -> RadialRule:
    full = config.resolved({})
    return RadialRule(**{field.name: getattr(full, field.name) for field in dataclasses.fields(RadialRule)})


@lru_cache(maxsize=16)
def _tiles(rule: RadialRule, rest: str, layout: TokenLayout, device: str) -> TileLists:
    kept = kept_tiles(rule, layout.frames, layout.height, layout.width)
    count = -(-layout.tokens // rule.block_size)
    states = np.full((count, count), EXACT, np.uint8)
    states[: len(kept), : len(kept)] = np.where(kept, EXACT, POOLED if rest == "pooled" else SKIPPED)
    if layout.tokens > layout.visual_tokens:
        text = layout.visual_tokens // rule.block_size
        states[text:] = EXACT
        states[:, text:] = EXACT
    size, tokens = rule.block_size, layout.tokens
    # Lists made in inference mode could not serve a training run later.
    with torch.inference_mode(False):
        lists = TileLists.from_states(torch.from_numpy(states), block_q=size, block_k=size, num_q=tokens, num_k=tokens)
        return lists.to(device)


@handles(RadialAttention)
class RadialHandler(SparseHandler):
    """RadialAttention on one model: its recipe filled in, its lists put into the plan."""

    config: RadialAttention

    def contribute(self, plan: AttentionPlan, context: CallContext) -> AttentionPlan:
        """Put the layout's tile lists and token order into the plan."""
        tiles = self.config.tiles(context.layout, context.device)
        order = self.config.token_order(context.layout, context.device)
        return dataclasses.replace(plan, tiles=tiles, token_order=order)
