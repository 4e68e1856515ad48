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

from ...errors import ConfigError
from ...plan.call import Call
from ...plan.context import CallContext, Key, StepContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...plan.tile_masses import tile_masses
from ...plan.tiling import bitmap_bytes, exact_bits, full_lists_bytes, pinned_bits, pinned_bytes
from ..base import Model, Phase
from ..options import gt, le, lt
from ..saving import Saving, TileSaving
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

    An option left unset takes the recipe of the model's family, or `DEFAULTS` where the family has none. For
    ``block_size`` and the options that begin with ``dense`` see `SparseConfig`. The pattern is found in the first step
    that is not dense, by layer, branch, head and block row, and frozen until the next generation. With RadialAttention
    it is chosen among the tiles that Radial lists; LiteAttention starts from it and drops more; SolAttention routes in
    it.

    Attributes:
        density: share rho of the n visual key tiles that every block row keeps, in (0, 1], rounded up to whole tiles;
            the released code keeps floor(rho n) + 1.
        mass: instead of ``density``: the share of the softmax mass over the visual keys that every block row keeps, in
            (0, 1), by the fewest tiles that reach it; the density follows from the data.
        rest: what becomes of the other tiles: ``skip``, or ``pooled`` (each enters as one key, its tokens' mean).
    """

    name: ClassVar[str] = "sparsed"
    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    density: Annotated[float, gt(0), le(1)] | None = None
    mass: Annotated[float, gt(0), lt(1), "0.95 is usual"] | None = None
    rest: Literal["skip", "pooled"] = "skip"

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        density, mass = self.density, self.mass
        if density is not None and mass is not None:
            raise ConfigError(
                f"sparsed.density = {density} and sparsed.mass = {mass} were both given; one of them sets how much is "
                "kept, leave the other out"
            )

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with every unset option filled in; ``density`` only where ``mass`` is not given."""
        full: Any = SparseConfig.filled(replace(self, mass=None), recipe)
        return replace(full, density=None, mass=self.mass) if self.mass is not None else full

    def kept_tiles(self, tiles: int) -> int:
        """Return how many of a row's ``tiles`` visual key tiles ``density`` keeps."""
        return max(1, math.ceil(round((self.density or DEFAULTS["density"]) * tiles, 6)))

    def carried_bytes(self, layout: TokenLayout, *, layers: int, heads: int, batch: int = 1, branches: int = 2) -> int:
        """Return the bytes that a generation holds from step to step: a bit for each tile, head and branch."""
        return layers * branches * bitmap_bytes(self.tiling.tiles(layout.tokens), heads, batch)

    def advice(self, layout: TokenLayout) -> str | None:
        """Return what the user should know about the pattern on this layout, or None where it fits well."""
        tiles, tokens = self.tiling.tiles(layout.visual_tokens), layout.visual_tokens
        if self.mass is None and self.kept_tiles(tiles) == tiles:
            return f"sparsed keeps all {tiles} tiles of {tokens} visual tokens, so it can't be faster here"
        if tokens < WORTHWHILE_TOKENS:
            return f"sparsed seldom pays below {WORTHWHILE_TOKENS} visual tokens, and there are {tokens} here"
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


class SparseDHandler(SparseHandler):
    """SparseD on one model: the patterns of this generation."""

    config_type = SparseD
    phase = Phase.PATTERNS
    settings: SparseD

    def __init__(self, config: SparseD, model: Model) -> None:
        super().__init__(config, model)
        self.bits: dict[Key, Tensor] = {}
        self._peak = 0

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Narrow what is kept to the pattern, which is made where there is none yet, or none that can be trusted."""
        settings = self.settings
        plan = plan.with_tiles(*self.model.tiling.full(context.layout, context.device))
        keep = None if context.training else self.bits.get(context.key)
        if keep is None:
            keep = self._pattern(plan, call, context)
            if not context.training:
                self.bits[context.key] = keep
                self._peak = max(self._peak, sum(bits.nbytes for bits in self.bits.values()))
        return plan.narrow(keep=keep, pinned=self._text(context), rest=settings.rest)

    def needs_step(self, step: StepContext) -> bool:
        """Tell whether the branch's pattern is found in this step."""
        found = any((key[0], key[2]) == (step.transformer, step.branch) for key in self.bits)
        return not found and self.is_active_somewhere(step)

    def reset(self) -> None:
        """Forget the patterns."""
        self.bits.clear()

    def state_bytes(self) -> int:
        """Return the most memory that the patterns took at once since attach."""
        return self._peak

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return the tiles that the pattern leaves where ``density`` says how many, and what is carried.

        Raises:
            ConfigError: with ``mass``, where the data decide.
        """
        settings, model = self.settings, self.model
        if settings.mass is not None:
            raise ConfigError(
                f"sparsed.mass = {settings.mass} keeps what the data say, so nothing can be counted beforehand; give "
                "sparsed.density to plan with"
            )
        count = settings.tiling.tiles(layout.visual_tokens)
        kept = settings.kept_tiles(count)
        advice = settings.advice(layout)

        def keep(share: np.ndarray) -> np.ndarray:
            listed = share.sum(1, keepdims=True)  # of a row's candidates it keeps so many, or all
            return share * np.minimum(1.0, kept / np.maximum(listed, 1e-9))

        tiles = TileSaving(
            tiles=count,
            active=lambda step, layer: not settings.is_dense(step, steps, layer, 0.0),
            keep=keep,
            pools=settings.rest == "pooled",
        )
        carried = 0
        if model.family is not None:
            layers = settings.active_layers(model.family.layers, steps) * model.family.experts
            carried = settings.carried_bytes(
                layout, layers=layers, heads=model.heads, branches=model.family.forwards_per_step
            )
        return Saving(
            tiles=tiles,
            list_bytes=full_lists_bytes(layout, settings.tiling.block_size)
            + pinned_bytes(layout, settings.tiling.block_size),
            carried_bytes=carried,
            notes=settings.notes(),
            warnings=(advice,) if advice else (),
        )

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
        kept = None if settings.mass is not None else settings.kept_tiles(int((~text).sum()))
        return pack_bits(heaviest(masses, candidates, kept, settings.mass))
