"""SolAttention: tiles that stand out of their row by a pooled score stay exact, all others enter as one key each.

Source: Sol-Attn (arXiv 2607.24027), by its published kernels; the routing itself is `dit_accel_kernels.Routing`. Beyond
the original: any token count and head dim, grouped heads, masked keys, every backend, images, routing in the lists of
another method.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from dit_accel_kernels import Routing, Selection, unpack_bits
from torch import Tensor

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan, CallContext
from ...plan.tiling import full_tiles, pinned_bits, visual_first
from ..base import Handler, Model, handles
from ..config import MethodConfig
from .sparse import SparseConfig, SparseHandler

DEFAULTS: Mapping[str, Any] = {
    "beta": 1.0,
    "beta_last": None,
    "block_size": 64,
    "dense_steps": 0.2,
    "dense_last_steps": 0,
    "dense_layers": 1,
}
"""What an option is where neither the user nor the model's recipe sets it: the paper's.

Tiles are 64 as in the paper and all its ports, since beta's figures belong to them: a mean key of 128 tokens is a
coarser score and a coarser stand-in. Tiles of 128 move half the bytes and pool into half the keys; by the roofline
model that is worth 3 to 17 % of the time where attention is 16 % exact.
"""

DIAGONAL = 1
"""Tiles to either side of a tile's own that every row keeps, as in the paper."""

WORTHWHILE_TOKENS = 40_000
"""Visual tokens below which routing rarely pays: no port shows a visible gain under 40,000 to 60,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolAttention(SparseConfig):
    """Sparse self-attention that keeps the tiles of high pooled scores and pools the rest (arXiv 2607.24027).

    An option left unset takes the recipe of the model's family, or `DEFAULTS` where the family has none. For the options
    that begin with ``dense`` see `SparseConfig`. With a method that lists tiles, the listed ones are routed.

    Attributes:
        beta: standard deviations by which a tile's score must exceed its row's mean to stay exact; on scores that are
            normally distributed 1 - Phi(beta) of the tiles do: 1.0 keeps 16 %, 1.3 10 %, 2.0 2 %, 0 half, -8 all. What
            SGLang, TensorRT-LLM and ComfyUI call tau.
        beta_last: beta at the last step that is not dense; beta changes towards it linearly. Unset: it stays.
        threshold: how a row's deviation is found: ``diag`` from the variances of the mean keys' channels, ``exact``
            from their covariances too.
        sink: what every query sees exactly beside its own and the neighbouring tiles: ``text`` tokens, where text is
            part of the sequence (as queries they see all exactly, too), or ``first_frame``, text and the first frame.
        block_size: tokens of a tile; a power of two, 16 to 512. With RadialAttention the tiles are Radial's.
        dense_above_sigma: steps whose noise level is above it stay dense too; unset: none. What TensorRT-LLM calls
            disabled_until_timestep.

    Raises:
        ConfigError: for an option out of range.
    """

    name: ClassVar[str] = "sol"
    generic: ClassVar[Mapping[str, Any]] = DEFAULTS

    beta: float | None = None
    beta_last: float | None = None
    threshold: Literal["diag", "exact"] = "diag"
    sink: Literal["text", "first_frame"] = "text"
    block_size: int | None = None

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        for field in ("beta", "beta_last"):
            value = getattr(self, field)
            if value is not None and not math.isfinite(value):
                raise ConfigError(
                    f"sol.{field} must be a finite number, got {value}; 1 keeps 16 % of the tiles, -8 all, 8 none"
                )
        block = self.block_size
        if block is not None and (not 16 <= block <= 512 or block & (block - 1)):
            raise ConfigError(f"sol.block_size must be a power of two from 16 to 512, got {block}; 64 is the paper's")

    def in_tiles_of(self, other: MethodConfig) -> "SolAttention":
        """Return the config with the tile size of another method's resolved config.

        Raises:
            ConfigError: if ``block_size`` is set to something else.
        """
        size = getattr(other, "block_size", None)
        if self.block_size not in (None, size):
            raise ConfigError(
                f"sol.block_size = {self.block_size} can't route tiles of {other.name}.block_size = {size}; set both "
                "alike, or leave sol's unset"
            )
        return dataclasses.replace(self, block_size=size)

    def beta_at(self, step_index: int, num_inference_steps: int | None) -> float:
        """Return beta at a step (0-based) of the run.

        Raises:
            ConfigError: if beta changes over steps whose number nothing tells.
        """
        return _beta_at(self, step_index, num_inference_steps)

    def tile_counts(self, layout: TokenLayout) -> tuple[int, int]:
        """Return (tiles expected to stay exact, tiles in all) over the visual tokens alone, for Gaussian scores."""
        total = _pinned_visual(self.resolved({}), layout).numel()
        return self.routed_count(layout, None), total

    def routed_count(self, layout: TokenLayout, listed: Tensor | None) -> int:
        """Return how many visual tiles are expected to stay exact, for Gaussian scores.

        Args:
            layout: the sequence.
            listed: bool [N, N], the visual tiles that another method's list keeps exact; None: all.
        """
        full = self.resolved({})
        pinned = _pinned_visual(full, layout)
        listed = torch.ones_like(pinned) if listed is None else listed
        fixed = int((listed & pinned).sum())
        return fixed + round(_expected_share(full) * (int(listed.sum()) - fixed))

    def density(self, layout: TokenLayout) -> float:
        """Return the expected kept share of `tile_counts`, in (0, 1]."""
        kept, total = self.tile_counts(layout)
        return kept / total

    def advice(self, layout: TokenLayout) -> str | None:
        """Return what the user should know of sol on this layout, or None where it fits well."""
        pinned, tokens = _pinned_visual(self.resolved({}), layout), layout.visual_tokens
        if pinned.all():
            return f"sol keeps all {pinned.numel()} tiles of {tokens} visual tokens, so it can't be faster here"
        if tokens < WORTHWHILE_TOKENS:
            return f"sol seldom pays below {WORTHWHILE_TOKENS} visual tokens, and here are {tokens}"
        return None


@lru_cache(maxsize=256)
def _beta_at(config: SolAttention, step_index: int, num_inference_steps: int | None) -> float:
    full = config.resolved({})
    beta, last = full.beta, full.beta_last
    assert beta is not None
    if last is None:
        return beta
    if num_inference_steps is None:
        raise ConfigError(
            f"sol.beta_last = {last} needs the number of steps, which nothing tells here; attach to the pipeline, or "
            "leave beta_last unset"
        )
    layer = full.dense_layers or 0
    steps = [s for s in range(num_inference_steps) if not full.is_dense(s, num_inference_steps, layer, 0.0)]
    share = (step_index - steps[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else 0.0
    return beta + (last - beta) * share


def _expected_share(full: SolAttention) -> float:
    """Return the share of routed tiles that stay exact on Gaussian scores, mean over a changing beta."""
    first, last = full.beta, full.beta if full.beta_last is None else full.beta_last
    assert first is not None
    assert last is not None
    betas = [first + (last - first) * part / 32 for part in range(33)]
    return sum(0.5 * math.erfc(beta / math.sqrt(2)) for beta in betas) / len(betas)


def _pinned_visual(full: SolAttention, layout: TokenLayout) -> Tensor:
    """Return bool [N, N]: the visual tiles that stay exact whatever the data says; text apart."""
    assert full.block_size is not None
    alone = dataclasses.replace(layout, text_before=0, text_after=0)
    bits = pinned_bits(alone, full.block_size, DIAGONAL, full.sink, "cpu")
    return unpack_bits(bits, -(-alone.tokens // full.block_size))


@handles(SolAttention)
class SolHandler(SparseHandler):
    """SolAttention on one model: its recipe filled in, its routing put into the plan."""

    rank = 1
    config: SolAttention

    def __init__(self, config: SolAttention, model: Model) -> None:
        super().__init__(config, model)
        self._asked = config

    def check_with(self, others: Sequence[Handler]) -> None:
        """Take the tile size of another method; refuse one that the user set to something else."""
        ranked = sorted(others, key=lambda other: other.rank)
        tiled = [other.config for other in ranked if getattr(other.config, "block_size", None) is not None]
        if tiled:
            size = self._asked.in_tiles_of(tiled[0]).block_size
            self.config = dataclasses.replace(self.config, block_size=size)

    def contribute(self, plan: AttentionPlan, context: CallContext) -> AttentionPlan:
        """Route the exact tiles of the plan's list, or all tiles where there is none."""
        config, layout, device = self.config, context.layout, str(context.device)
        tiles, order = plan.tiles, plan.token_order
        if tiles is None:
            assert config.block_size is not None
            tiles, order = full_tiles(layout, config.block_size, device), visual_first(layout, None, device)
        selection = plan.selection or Selection()
        pinned = pinned_bits(layout, tiles.block_k, DIAGONAL, config.sink, device)
        if selection.pinned is not None:
            pinned = pinned | selection.pinned
        beta = config.beta_at(context.step_index, context.num_inference_steps)
        selection = dataclasses.replace(
            selection, pinned=pinned, routing=Routing(beta=beta, threshold=config.threshold)
        )
        return dataclasses.replace(plan, tiles=tiles, token_order=order, selection=selection)
