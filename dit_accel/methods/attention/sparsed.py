"""SparseD: the key tiles that hold most of the attention at one early step, kept for the rest of the run.

Source: SparseD (arXiv 2509.24014), made for language diffusion: patterns differ between heads and hardly change over
the steps, and the early steps are critical. Where we depart from it: the masses come from one fused pass without a
stored softmax, text tiles are never dropped instead of being ranked, tiles may be pooled instead of skipped, and
several methods share one pattern.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from dit_accel_kernels import pack_bits, unpack_bits
from torch import Tensor

from ...plan.call import Call
from ...plan.context import CallContext, Key, StepContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...plan.tile_masses import tile_masses
from ...plan.tiling import exact_bits, full_lists_bytes, pinned_bits, pinned_bytes
from ..base import Model, Phase
from ..options import gt, le, lt
from ..saving import Saving
from .sparse import SparseConfig, SparseHandler


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseD(SparseConfig):
    """Sparse self-attention that keeps each head's heaviest tiles of one early step (SparseD, arXiv 2509.24014).

    For unset options and those that begin with ``dense`` or ``block`` see `SparseConfig`. The pattern is found in the
    first step that is not dense, by layer, branch, head and block row, and frozen until ``refresh`` says or the next
    generation begins. With RadialAttention it is chosen among the tiles that Radial lists; LiteAttention starts from it
    and drops more; SolAttention routes in it.

    Attributes:
        density: share rho of the n visual key tiles that every block row keeps, in (0, 1], rounded up to whole tiles;
            the released code keeps floor(rho n) + 1.
        mass: instead of ``density``: the share of the softmax mass over the visual keys that every block row keeps, in
            (0, 1), by the fewest tiles that reach it; the density follows from the data.
        rest: what becomes of the other tiles: ``skip``, ``pooled`` (each enters as one key, its tokens' mean), or
            ``cached`` (they enter as they did in the layer's last dense call; see ``refresh``).
    """

    name: ClassVar[str] = "sparsed"
    worthwhile_tokens: ClassVar[int] = 20_000
    # the paper's, and one dense layer
    defaults: ClassVar[Mapping[str, Any]] = {
        "density": 0.3, "block_size": 128, "dense_steps": 0.2, "dense_last_steps": 0, "dense_layers": 1,
    }  # fmt: skip

    density: Annotated[float, gt(0), le(1)] | None = None
    mass: Annotated[float, gt(0), lt(1), "0.95 is usual"] | None = None
    rest: Literal["skip", "pooled", "cached"] = "skip"

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        self.require_one_of("density", "mass", of="how much is kept")

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with every unset option filled in; ``density`` only where ``mass`` is not given."""
        full: Any = SparseConfig.filled(replace(self, mass=None), recipe)
        return replace(full, density=None, mass=self.mass) if self.mass is not None else full

    def kept_tiles(self, tiles: int) -> int:
        """Return the number of visual key tiles that ``density`` keeps of a row's ``tiles``."""
        return max(1, math.ceil(round((self.density or self.defaults["density"]) * tiles, 6)))

    def advice(self, layout: TokenLayout) -> str | None:
        tiles = self.tiling.tiles(layout.visual_tokens)
        return self.advice_on_size(layout, tiles if self.mass is None and self.kept_tiles(tiles) == tiles else 0)


def heaviest(masses: Tensor, candidates: Tensor, count: int | None, mass: float | None) -> Tensor:
    """Return the heaviest candidate tiles of every block row, bool [B, H, NQ, NK]; of equal ones the first.

    Args:
        count: how many a row chooses, all where fewer are candidates; None: see ``mass``.
        mass: the fewest that reach this share of the row's mass over the candidates, one at least.
    """
    masses = masses.masked_fill(~candidates, 0.0)
    ranked, order = masses.masked_fill(~candidates, -1.0).sort(dim=-1, descending=True, stable=True)
    first = (torch.arange(masses.shape[-1], device=masses.device) < (count or 1)).expand_as(masses)
    if mass is not None:
        ranked = ranked.clamp(min=0.0)
        first = first | (ranked.cumsum(-1) - ranked < mass * ranked.sum(-1, keepdim=True))
    chosen = torch.zeros_like(masses, dtype=torch.bool).scatter_(-1, order, first)
    return chosen & candidates


class SparseDHandler(SparseHandler):
    """SparseD on one model: the patterns of this generation."""

    config_type = SparseD
    phase = Phase.PATTERNS
    settings: SparseD

    def __init__(self, config: SparseD, model: Model) -> None:
        super().__init__(config, model)
        self.bits: dict[Key, Tensor] = {}

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Keep the pattern's tiles alone; make the pattern where there is none yet, in training and in dense turns."""
        plan = plan.with_tiles(*self.model.tiling.full(context.layout, context.device))
        keep = None if context.training or context.turn == "dense" else self.bits.get(context.key)
        if keep is None:
            keep = self._pattern(plan, call, context)
            if not context.training:
                self.bits[context.key] = keep
                self.note_held(sum(bits.nbytes for bits in self.bits.values()))
        return plan.narrow(keep=keep, pinned=self._text(context), rest="pooled" if self.pools else "skip")

    def needs_step(self, step: StepContext) -> bool:
        chosen = any((key[0], key[2]) == (step.transformer, step.branch) for key in self.bits)
        return not chosen and self.is_active_somewhere(step)

    def reset(self) -> None:
        self.bits.clear()

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        settings, carried = self.settings, self.carried_bits(layout, steps)
        if settings.mass is not None:
            note = (
                f"sparsed.mass = {settings.mass} keeps what the data say, so what it saves is not counted; give "
                "sparsed.density to plan with"
            )
            lists = full_lists_bytes(layout, settings.tiling.block_size)
            lists += pinned_bytes(layout, settings.tiling.block_size)
            carried += self.rest_bytes(layout, steps)
            return Saving(counted=False, carried_bytes=carried, list_bytes=lists, notes=(note, *settings.notes()))
        count = settings.kept_tiles(settings.tiling.tiles(layout.visual_tokens))

        def keep(share: np.ndarray, rows: slice) -> np.ndarray:
            listed = share.sum(1, keepdims=True)  # of a row's candidates it keeps so many, or all
            return share * np.minimum(1.0, count / np.maximum(listed, 1e-9))

        return self.saving_of(keep, layout, steps, carried_bytes=carried)

    def _text(self, context: CallContext) -> Tensor:
        return pinned_bits(context.layout, self.settings.tiling.block_size, None, "text", str(context.device))

    def _pattern(self, plan: AttentionPlan, call: Call, context: CallContext) -> Tensor:
        """Return the heaviest of the plan's exact tiles, by one mass pass over the queries and keys; decay left out."""
        settings, layout, tiles = self.settings, context.layout, plan.tiles
        assert tiles is not None
        place = torch.arange(layout.tokens, device=context.device) - layout.text_before
        valid = ((place >= 0) & (place < layout.visual_tokens)).expand(context.batch, -1)
        mask = call.key_mask()
        scale = plan.head_scale
        q = call.q if scale is None else call.q * scale.reshape(-1, call.q.shape[1])[:, :, None, None].to(call.q.dtype)
        masses = tile_masses(
            q, call.k, block_q=tiles.block_q, block_k=tiles.block_k, scale=call.scale,
            token_order=plan.token_order, key_mask=valid if mask is None else valid & mask,
        )  # fmt: skip
        text = unpack_bits(self._text(context), tiles.key_tiles).all(0)
        candidates = unpack_bits(exact_bits(tiles, masses.shape[1]), tiles.key_tiles) & ~text
        count = None if settings.mass is not None else settings.kept_tiles(int((~text).sum()))
        return pack_bits(heaviest(masses, candidates, count, settings.mass))
