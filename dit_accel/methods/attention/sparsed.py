"""SparseD: the key tiles that hold most of the attention at one early step, kept for the rest of the run.

Source: SparseD (arXiv 2509.24014), made for language diffusion: patterns differ between heads and hardly change over
the steps, and the early steps are critical. Where we depart from it: the masses come from one fused pass without a
stored softmax, text tiles are never dropped instead of being ranked, tiles may be pooled instead of skipped, and
several methods share one pattern.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from dit_accel_kernels import Selection, TileLists, pack_bits, unpack_bits
from dit_accel_kernels.masses import tile_masses
from torch import Tensor

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan, Call, CallContext
from ...plan.tiling import full_tiles, pinned_bits, visual_first
from ...report.report import exact_bits
from ..base import Handler, Model, handles
from .lite.state import Key, bitmap_bytes, key_of
from .sparse import SparseConfig, SparseHandler

DEFAULTS: Mapping[str, Any] = {
    "density": 0.3,
    "block_size": 128,
    "dense_steps": 0.2,
    "dense_last_steps": 0,
    "dense_layers": 1,
}
"""What an option is where neither the user nor the model's recipe sets it: the paper's, and one dense layer."""

WORTHWHILE_TOKENS = 20_000
"""Visual tokens below which the rest of the network costs more than attention does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseD(SparseConfig):
    """Sparse self-attention that keeps each head's heaviest tiles of one early step (SparseD, arXiv 2509.24014).

    An option left unset takes the recipe of the model's family, or `DEFAULTS` where the family has none. For the options
    that begin with ``dense`` see `SparseConfig`. The pattern is found in the first step that is not dense, by layer,
    branch, head and block row, and frozen until the next generation. With RadialAttention it is chosen among the tiles
    that Radial lists; LiteAttention starts from it and drops more; SolAttention routes in it.

    Attributes:
        density: share of the visual key tiles that every block row keeps, in (0, 1], rounded up to whole tiles.
        mass: instead of ``density``: the share of the softmax mass over the visual keys that every block row keeps, in
            (0, 1), by the fewest tiles that reach it; the density follows from the data.
        rest: what becomes of the other tiles: ``skip``, or ``pooled`` (each enters as one key, its tokens' mean).
        block_size: tokens of a tile; a power of two, 16 to 512. With RadialAttention the tiles are Radial's.

    Raises:
        ConfigError: for an option out of range, or both ``density`` and ``mass``.
    """

    name: ClassVar[str] = "sparsed"
    generic: ClassVar[Mapping[str, Any]] = DEFAULTS

    density: float | None = None
    mass: float | None = None
    rest: Literal["skip", "pooled"] = "skip"
    block_size: int | None = None

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        density, mass, block = self.density, self.mass, self.block_size
        if density is not None and mass is not None:
            raise ConfigError(
                f"sparsed.density = {density} and sparsed.mass = {mass} were both given; one of them sets how much is "
                "kept, leave the other out"
            )
        if density is not None and not 0 < density <= 1:
            raise ConfigError(f"sparsed.density must be above 0 and at most 1, got {density}; 0.3 is usual")
        if mass is not None and not 0 < mass < 1:
            raise ConfigError(f"sparsed.mass must be between 0 and 1, got {mass}; 0.95 is usual")
        if block is not None and (not 16 <= block <= 512 or block & (block - 1)):
            raise ConfigError(f"sparsed.block_size must be a power of two from 16 to 512, got {block}; 128 is usual")

    def resolved(self, recipe: Mapping[str, Any]) -> "SparseD":
        """Return the config with every unset option filled in; ``density`` only where ``mass`` is not given.

        Raises:
            ConfigError: for an option that no recipe may fill, or a value out of range.
        """
        full = cast(SparseD, SparseConfig.resolved(dataclasses.replace(self, mass=None), recipe))
        return full if self.mass is None else dataclasses.replace(full, density=None, mass=self.mass)

    def kept_tiles(self, tiles: int) -> int:
        """Return how many of a row's ``tiles`` visual key tiles ``density`` keeps."""
        density = DEFAULTS["density"] if self.density is None else self.density
        return max(1, math.ceil(round(density * tiles, 6)))

    def tile_counts(self, layout: TokenLayout) -> tuple[int, int]:
        """Return (tiles kept, tiles in all) of one head over the visual tokens alone.

        Raises:
            ConfigError: with ``mass``, where the data decide.
        """
        if self.mass is not None:
            raise ConfigError(
                f"sparsed.mass = {self.mass} keeps what the data say, so nothing can be counted before; give "
                "sparsed.density to plan with"
            )
        tiles = -(-layout.visual_tokens // (self.block_size or DEFAULTS["block_size"]))
        return tiles * self.kept_tiles(tiles), tiles * tiles

    def state_bytes(self, layout: TokenLayout, *, layers: int, heads: int, batch: int = 1, branches: int = 2) -> int:
        """Return the bytes that a generation holds from step to step: a bit for each tile, head and branch."""
        block = self.block_size or DEFAULTS["block_size"]
        return layers * branches * bitmap_bytes(math.ceil(layout.tokens / block), heads, batch)

    def advice(self, layout: TokenLayout) -> str | None:
        """Return what the user should know of the pattern on this layout, or None where it fits well."""
        tiles = -(-layout.visual_tokens // (self.block_size or DEFAULTS["block_size"]))
        if self.mass is None and self.kept_tiles(tiles) == tiles:
            return (
                f"sparsed keeps all {tiles} tiles of {layout.visual_tokens} visual tokens, so it can't be faster here"
            )
        if layout.visual_tokens < WORTHWHILE_TOKENS:
            return f"sparsed seldom pays below {WORTHWHILE_TOKENS} visual tokens, and here are {layout.visual_tokens}"
        return None


def heaviest(masses: Tensor, candidates: Tensor, kept: int | None, mass: float | None) -> Tensor:
    """Return the heaviest candidate tiles of every block row, bool [B, H, NQ, NK]; of equal ones the first.

    Args:
        masses: softmax mass of every tile, [B, H, NQ, NK].
        candidates: bool, broadcastable to it: what may be chosen.
        kept: how many a row chooses, all where fewer are candidates; None: see ``mass``.
        mass: the fewest that reach this share of the row's mass over the candidates, one at least.
    """
    masses = masses.masked_fill(~candidates, 0.0)
    ranked, order = masses.masked_fill(~candidates, -1.0).sort(dim=-1, descending=True, stable=True)
    first = (torch.arange(masses.shape[-1], device=masses.device) < (kept or 1)).expand_as(masses)
    if mass is not None:
        ranked = ranked.clamp(min=0.0)
        first = first | (ranked.cumsum(-1) - ranked < mass * ranked.sum(-1, keepdim=True))
    chosen = torch.zeros_like(masses, dtype=torch.bool).scatter_(-1, order, first)
    return chosen & candidates


@handles(SparseD)
class SparseDHandler(SparseHandler):
    """SparseD on one model: its recipe filled in, and the patterns of this generation."""

    rank = 1
    config: SparseD

    def __init__(self, config: SparseD, model: Model) -> None:
        super().__init__(config, model)
        self._asked_size = config.block_size
        self._lists: Handler | None = None
        self.bits: dict[Key, Tensor] = {}
        self._peak = 0

    def check_with(self, others: Sequence[Handler]) -> None:
        """Take the tile size of a method that lists tiles; refuse what can't be one selection."""
        for other in others:
            name, size = other.config.name, getattr(other.config, "block_size", None)
            if other.rank < self.rank and size is not None:
                if self._asked_size not in (None, size):
                    raise ConfigError(
                        f"sparsed.block_size = {self._asked_size} can't choose among {name}'s tiles of {size} "
                        f"({name}.block_size); set both to one size, or leave sparsed's unset"
                    )
                self.config = dataclasses.replace(self.config, block_size=size)
                self._lists = other
            rest = getattr(other.config, "rest", self.config.rest)
            if other.rank == self.rank and rest != self.config.rest:
                raise ConfigError(
                    f"sparsed.rest = {self.config.rest!r} and {name}.rest = {rest!r} contradict each other: a tile that "
                    "one of them drops has one fate; set both to the same"
                )

    def look(self, plan: AttentionPlan, context: CallContext, call: Call) -> None:
        """Find the pattern where there is none yet: one mass pass over the queries and keys."""
        key = key_of(context)
        if key in self.bits:
            return
        config, layout, device = self.config, context.layout, str(context.device)
        tiles, order = self._tiles(plan, context)
        visual = torch.arange(layout.tokens, device=context.device) - layout.text_before
        valid = ((visual >= 0) & (visual < layout.visual_tokens)).expand(context.batch, -1)
        mask = call.key_mask()
        masses = tile_masses(
            call.q, call.k, block_q=tiles.block_q, block_k=tiles.block_k, layout=call.layout, scale=call.scale,
            token_order=order, key_mask=valid if mask is None else valid & mask,
        )  # fmt: skip
        text = unpack_bits(pinned_bits(layout, tiles.block_k, None, "text", device), tiles.key_tiles).all(0)
        candidates = unpack_bits(exact_bits(tiles, masses.shape[1]), tiles.key_tiles) & ~text
        kept = None if config.mass is not None else config.kept_tiles(int((~text).sum()))
        self.bits[key] = pack_bits(heaviest(masses, candidates, kept, config.mass))
        self._peak = max(self._peak, sum(bits.nbytes for bits in self.bits.values()))

    def contribute(self, plan: AttentionPlan, context: CallContext) -> AttentionPlan:
        """Narrow what is kept to the pattern; what others pinned or dropped stays so."""
        tiles, order = self._tiles(plan, context)
        selection, keep = plan.selection or Selection(), self.bits[key_of(context)]
        pinned = pinned_bits(context.layout, tiles.block_k, None, "text", str(context.device))
        selection = dataclasses.replace(
            selection,
            keep=keep if selection.keep is None else keep & selection.keep,
            rest=self.config.rest,
            pinned=pinned if selection.pinned is None else pinned | selection.pinned,
        )
        return dataclasses.replace(plan, tiles=tiles, token_order=order, selection=selection)

    def reset(self) -> None:
        """Forget the patterns."""
        self.bits.clear()

    def state_bytes(self) -> int:
        """Return the most memory that the patterns took at once since attach."""
        return self._peak

    def _tiles(self, plan: AttentionPlan, context: CallContext) -> tuple[TileLists, Tensor | None]:
        """Return the plan's lists and order, or full ones in the order of the method that lists at other steps."""
        if plan.tiles is not None:
            return plan.tiles, plan.token_order
        assert self.config.block_size is not None
        layout, device = context.layout, str(context.device)
        ordered = getattr(self._lists and self._lists.config, "token_order", None)
        order = ordered(layout, device) if ordered else visual_first(layout, None, device)
        return full_tiles(layout, self.config.block_size, device), order
