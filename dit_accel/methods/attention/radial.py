"""RadialAttention: a static sparse self-attention for video whose density falls with the distance of two frames.

Source: Radial Attention (arXiv 2506.19852); the rule is the published code's, see `dit_accel.rules.radial`. Beyond the
original: any token count, text tokens exact, pooled instead of skipped tiles, a 2-D tile order, a dense last step.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from dit_accel_kernels import TileLists
from torch import Tensor

from ...errors import ConfigError
from ...plan.call import Call
from ...plan.context import CallContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...plan.tiling import visual_lists
from ...rules.radial import RadialRule, kept_tiles
from ..base import Phase
from ..options import gt
from ..saving import Saving
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

    An option left unset takes the recipe of the model's family, or `DEFAULTS` where the family has none. For
    ``block_size`` and the options that begin with ``dense`` see `SparseConfig`.

    Attributes:
        decay_factor: > 0; scales the width of the bands at frame distance 2 and more; 1 is the paper's, smaller is
            sparser. No band gets narrower than a tile, so very small values make no further difference.
        near: the neighbouring frame: ``full``, or ``half`` a frame's tokens to either side.
        sink: let every token see all of the first frame.
        boundary: ``any`` keeps each tile with an allowed pair of tokens, so that every token sees 100 % of its own
            frame: 4 to 31 % more tiles than the paper's figures, by how frames align with tiles. ``published`` rounds
            like the original, which loses tokens at frame borders, and gives its figures.
        rest: what becomes of the other tiles: ``skip``, or ``pooled`` (each enters as one key, its tokens' mean).
        order: ``raster`` tiles are strips of a frame; ``tiles`` permutes the tokens so that they are patches, and keeps
            as many tiles, those nearest in the plane.
    """

    name: ClassVar[str] = "radial"
    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    decay_factor: Annotated[float, gt(0)] | None = None
    near: Literal["full", "half"] | None = None
    sink: bool | None = None
    boundary: Literal["any", "published"] = "any"
    rest: Literal["skip", "pooled"] = "skip"
    order: Literal["raster", "tiles"] = "raster"

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        if self.boundary == "published" and self.order == "tiles":
            raise ConfigError(
                "radial.boundary = 'published' rounds raster tiles and has no meaning with radial.order = 'tiles'; "
                "use boundary = 'any' or order = 'raster'"
            )

    def tile_order(self) -> str:
        """Return the order of tokens in tiles."""
        return self.order

    @property
    def rule(self) -> RadialRule:
        """The parameters of the mask alone."""
        return RadialRule(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RadialRule)})

    def tiles(self, layout: TokenLayout, device: torch.device | str = "cpu") -> TileLists:
        """Return the tile lists of a layout, shared by all heads; the same object for the same arguments.

        The lists count tokens as `token_order` sorts them: visual tokens, then text. A tile that holds any text token
        is exact in rows and columns.

        Raises:
            ConfigError: for a layout of one frame.
        """
        _refuse_one_frame(layout)
        return _tiles(self.rule, self.rest, layout, str(torch.device(device)))

    def token_order(self, layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor | None:
        """Return int64 [S], position in the tiles' order -> token index; None where that is the sequence's own."""
        return self.tiling.token_order(layout, device)

    def kept(self, layout: TokenLayout) -> np.ndarray:
        """Return which visual tiles are exact, bool [N, N].

        With ``boundary="published"`` only whole tiles count, floor(n / B) a side, as in the original's figures.

        Raises:
            ConfigError: for a layout of one frame.
        """
        _refuse_one_frame(layout)
        kept = kept_tiles(self.rule, layout.frames, layout.height, layout.width)
        whole = layout.visual_tokens // self.tiling.block_size
        return kept[:whole, :whole] if self.boundary == "published" and whole else kept

    def density(self, layout: TokenLayout) -> float:
        """Return the share of the visual tiles that are exact, in (0, 1].

        Raises:
            ConfigError: for a layout of one frame.
        """
        return float(self.kept(layout).mean())

    def advice(self, layout: TokenLayout) -> str | None:
        """Return what the user should know about radial on this layout, or None where it fits well.

        Raises:
            ConfigError: for a layout of one frame, or one in which it keeps no visual tile at all.
        """
        kept = self.kept(layout)
        empty, tokens = int((~kept.any(axis=1)).sum()), layout.visual_tokens
        if empty == len(kept):
            raise ConfigError(
                f"radial.boundary = 'published' leaves none of the {kept.size} tiles of {tokens} visual tokens; use "
                "boundary = 'any', or smaller tiles"
            )
        parts = []
        if kept.all():
            parts.append(f"radial keeps all {kept.size} tiles of {tokens} visual tokens, so it can't be faster here")
        elif tokens < WORTHWHILE_TOKENS:
            parts.append(f"radial seldom pays below {WORTHWHILE_TOKENS} visual tokens, and there are {tokens} here")
        if empty:
            parts.append(f"boundary = 'published' leaves {empty} of {len(kept)} block rows no visual tile; use 'any'")
        return "; ".join(parts) or None


def _refuse_one_frame(layout: TokenLayout) -> None:
    if layout.frames < 2:
        raise ConfigError(
            f"radial needs at least 2 latent frames, got {layout.frames} ({layout.height} x {layout.width} tokens): on "
            "one frame it is dense attention; leave it out for images"
        )


@lru_cache(maxsize=16)
def _tiles(rule: RadialRule, rest: str, layout: TokenLayout, device: str) -> TileLists:
    kept = kept_tiles(rule, layout.frames, layout.height, layout.width)
    return visual_lists(kept, rest == "pooled", layout, rule.block_size, device)


class RadialHandler(SparseHandler):
    """RadialAttention on one model: its lists put into the plan."""

    config_type = RadialAttention
    phase = Phase.LISTS
    by_place = only_saves = True
    settings: RadialAttention

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Put the layout's tile lists and token order into the plan."""
        settings, layout, device = self.settings, context.layout, context.device
        return plan.with_tiles(settings.tiles(layout, device), settings.token_order(layout, device))

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return the tiles that the lists leave, and the lists' size."""
        settings = self.settings
        kept = settings.kept(layout)
        advice = settings.advice(layout)
        return replace(self.saving(kept, [kept], layout, steps), warnings=(advice,) if advice else ())
