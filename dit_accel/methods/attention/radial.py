"""RadialAttention: a static sparse self-attention for video whose density falls with the distance of two frames.

Source: Radial Attention (arXiv 2506.19852); the rule is the published code's, see `dit_accel.rules.radial`. Beyond the
original: any token count, text tokens exact, pooled instead of skipped tiles, a 2-D tile order, a dense last step.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
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
from ..base import Model, Phase
from ..options import gt
from ..saving import Saving
from .sparse import SparseConfig, SparseHandler


@dataclass(frozen=True, slots=True, kw_only=True)
class RadialAttention(SparseConfig):
    """Sparse self-attention that keeps all of near frames and ever thinner bands of far ones (arXiv 2506.19852).

    For unset options and those that begin with ``dense`` or ``block`` see `SparseConfig`. A layout of one frame is
    refused, by every function here.

    Attributes:
        decay_factor: scales the width of the bands at frame distance 2 and more; 1 is the paper's, smaller is
            sparser. No band gets narrower than a tile, so very small values make no further difference.
        near: the neighbouring frame: ``full``, or ``half`` a frame's tokens to either side.
        sink: let every token see all of the first frame.
        boundary: ``any`` keeps each tile with an allowed pair of tokens, so that every token sees 100 % of its own
            frame: 4 to 31 % more tiles than the paper's figures, by how frames align with tiles. ``published`` rounds
            like the original, which loses tokens at frame borders, and gives its figures.
        rest: what becomes of the other tiles: ``skip``, ``pooled`` (each enters as one key, its tokens' mean), or
            ``cached`` (they enter as they did in the layer's last dense call; see ``refresh``).
        order: ``raster`` tiles are strips of a frame; ``tiles`` permutes the tokens so that they are patches, and keeps
            as many tiles, those nearest in the plane.
    """

    name: ClassVar[str] = "radial"
    worthwhile_tokens: ClassVar[int] = 20_000
    # the paper's mask and warm-up (12 of 50)
    defaults: ClassVar[Mapping[str, Any]] = {
        "decay_factor": 1.0, "block_size": 128, "near": "full", "sink": True, "dense_steps": 0.24,
        "dense_last_steps": 0, "dense_layers": 1,
    }  # fmt: skip

    decay_factor: Annotated[float, gt(0)] | None = None
    near: Literal["full", "half"] | None = None
    sink: bool | None = None
    boundary: Literal["any", "published"] = "any"
    rest: Literal["skip", "pooled", "cached"] = "skip"
    order: Literal["raster", "tiles"] = "raster"

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        if self.boundary == "published" and self.order == "tiles":
            raise ConfigError(
                "radial.boundary = 'published' rounds raster tiles and has no meaning with radial.order = 'tiles'; "
                "use boundary = 'any' or order = 'raster'"
            )

    def tile_order(self) -> str:
        return self.order

    @property
    def rule(self) -> RadialRule:
        """The parameters of the mask alone."""
        return RadialRule(**{field.name: getattr(self, field.name) for field in dataclasses.fields(RadialRule)})

    def tiles(self, layout: TokenLayout, device: torch.device | str = "cpu") -> TileLists:
        """Return the tile lists of a layout, shared by all heads; the same object for the same arguments.

        The lists count tokens as `token_order` sorts them: visual tokens, then text. A tile that holds any text token
        is exact in rows and columns.
        """
        return _tiles(self.rule, self.rest, layout, str(torch.device(device)))

    def token_order(self, layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor | None:
        """Return int64 [S], position in the tiles' order -> token index; None where that is the sequence's own."""
        return self.tiling.token_order(layout, device)

    def kept(self, layout: TokenLayout) -> np.ndarray:
        """Return which visual tiles are exact, bool [N, N].

        With ``boundary="published"`` only whole tiles count, floor(n / B) a side, as in the original's figures.
        """
        exact = _kept(self.rule, layout)
        whole = layout.visual_tokens // self.tiling.block_size
        return exact[:whole, :whole] if self.boundary == "published" and whole else exact

    def density(self, layout: TokenLayout) -> float:
        """Return the share of the visual tiles that are exact, in (0, 1]."""
        return float(self.kept(layout).mean())

    def advice(self, layout: TokenLayout) -> str | None:
        """Return advice about a layout that does not suit radial, or None; raise `ConfigError` if it keeps no tile."""
        exact = self.kept(layout)
        empty, tokens = int((~exact.any(axis=1)).sum()), layout.visual_tokens
        if empty == len(exact):
            raise ConfigError(
                f"radial.boundary = 'published' leaves none of the {exact.size} tiles of {tokens} visual tokens; use "
                "boundary = 'any', or smaller tiles"
            )
        parts = [self.advice_on_size(layout, exact.size if exact.all() else 0)]
        if empty:
            parts.append(f"boundary = 'published' leaves {empty} of {len(exact)} block rows no visual tile; use 'any'")
        return "; ".join(filter(None, parts)) or None


def _kept(rule: RadialRule, layout: TokenLayout) -> np.ndarray:
    if layout.frames < 2:
        raise ConfigError(
            f"radial needs at least 2 latent frames, got {layout.frames} ({layout.height} x {layout.width} tokens): on "
            "one frame it is dense attention; leave it out for images"
        )
    return kept_tiles(rule, layout.frames, layout.height, layout.width)


@lru_cache(maxsize=16)
def _tiles(rule: RadialRule, rest: str, layout: TokenLayout, device: str) -> TileLists:
    return visual_lists(_kept(rule, layout), rest == "pooled", layout, rule.block_size, device)


class RadialHandler(SparseHandler):
    """RadialAttention on one model: its lists put into the plan."""

    config_type = RadialAttention
    phase = Phase.LISTS
    by_place = only_saves = True
    settings: RadialAttention

    def __init__(self, config: RadialAttention, model: Model) -> None:
        super().__init__(config, model)
        self._rule = self.settings.rule

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        layout, device = context.layout, context.device
        tiles = _tiles(self._rule, self.settings.rest, layout, str(device))
        return plan.with_tiles(tiles, self.model.tiling.token_order(layout, device))

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        return self.saving(self.settings.kept(layout), layout, steps)
