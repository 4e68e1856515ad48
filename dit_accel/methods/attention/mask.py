"""Base of sparse methods that are one fixed mask: who writes one says which token sees which, and nothing else."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from dit_accel_kernels import TileLists
from torch import Tensor

from ...plan.call import Call
from ...plan.context import CallContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...plan.tiling import visual_lists
from ..base import Model, Phase
from ..saving import Saving
from .sparse import SparseConfig, SparseHandler


class Tokens(NamedTuple):
    """Visual tokens by their places in the patch grid.

    Attributes:
        frame: int32, in latent frames.
        y: int32, the row.
        x: int32, the column.
    """

    frame: Tensor
    y: Tensor
    x: Tensor


class MaskHandler(SparseHandler, ABC):
    """A sparse method that is one fixed mask: a tile is exact where any of its queries may see any of its keys.

    Text sees all and is seen by all. Where the config has an option ``rest = "pooled"``, the other tiles enter as one
    key each. A sequence of which the mask leaves nothing out stays dense, in the user's own attention backend.
    """

    phase = Phase.LISTS
    by_place = only_saves = True

    def __init__(self, config: SparseConfig, model: Model) -> None:
        super().__init__(config, model)
        self._kept: dict[TokenLayout, np.ndarray] = {}
        self._lists: dict[tuple[TokenLayout, str], TileLists] = {}

    @abstractmethod
    def mask(self, q: Tokens, k: Tokens, layout: TokenLayout) -> Tensor:
        """Return which queries see which keys, bool; element by element of tensors that broadcast against each other.

        It is called for one row of a frame at a time, so that the mask of 75,600 tokens need not fit into memory.

        Args:
            q: the queries, of shapes that broadcast to [X, F, Y, X]: those of one row, by all keys.
            k: all visual tokens as keys, likewise.
            layout: the whole sequence.
        """

    def kept(self, layout: TokenLayout, device: torch.device | str = "cpu") -> np.ndarray:
        """Return which visual tiles are exact, bool [N, N] over the visual tokens alone; made on ``device``."""
        if layout not in self._kept:
            tiling, shape = self.model.tiling, (layout.frames, layout.height, layout.width)
            count, order = tiling.tiles(layout.visual_tokens), tiling.token_order(layout, device)
            frame, y, x = (torch.arange(size, dtype=torch.int32, device=device) for size in shape)
            keys = Tokens(frame[:, None, None], y[:, None], x)
            at = None if order is None else order[: layout.visual_tokens] - layout.text_before
            places = torch.arange(layout.visual_tokens, device=device)
            tile_of = (places if at is None else at.argsort()) // tiling.block_size
            pairs = torch.zeros(count, count, dtype=torch.int32, device=device)
            for row, tiles in enumerate(tile_of.view(-1, layout.width)):
                queries = Tokens(frame[row // layout.height], y[row % layout.height], x[:, None, None, None])
                seen = self.mask(queries, keys, layout)
                seen = seen.expand(len(seen) if seen.ndim == 4 else 1, *shape).flatten(1)  # one row where all are alike
                seen = seen if at is None else seen[:, at]
                seen = torch.nn.functional.pad(seen, (0, count * tiling.block_size - layout.visual_tokens))
                seen = seen.unflatten(1, (count, -1)).any(2).expand(layout.width, -1)
                pairs.index_add_(0, tiles, seen.int())
            self._kept[layout] = (pairs > 0).cpu().numpy()
        return self._kept[layout]

    def applies(self, layout: TokenLayout) -> bool:
        return not self.kept(layout).all()

    def check_layout(self, layout: TokenLayout) -> str | None:
        exact = self.kept(layout)
        whole = f"{self.name} keeps all {exact.size} tiles of {layout.visual_tokens} visual tokens, and changes nothing"
        return whole if exact.all() else super().check_layout(layout)

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        layout, tiling, device = context.layout, self.model.tiling, str(context.device)
        if (layout, device) not in self._lists:
            exact = self.kept(layout, device)
            self._lists[layout, device] = visual_lists(exact, self.pools, layout, tiling.block_size, device)
        return plan.with_tiles(self._lists[layout, device], tiling.token_order(layout, device))

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        return self.saving(self.kept(layout), layout, steps)
