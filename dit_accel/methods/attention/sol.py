"""SolAttention: tiles whose pooled score stands out in their row stay exact, all others enter as one key each.

Source: Sol-Attn (arXiv 2607.24027), by its published kernels; the routing itself is `dit_accel_kernels.Routing`. Beyond
the original: any token count and head dim, grouped heads, masked keys, every backend, images, routing in the lists of
another method.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

import numpy as np
from dit_accel_kernels import Routing, unpack_bits

from ...plan.call import Call
from ...plan.context import CallContext
from ...plan.layout import TokenLayout
from ...plan.plan import AttentionPlan
from ...plan.tiling import pinned_bits
from ..base import Phase
from ..saving import Saving
from ..steps import unknown_steps
from .sparse import SparseConfig, SparseHandler

DIAGONAL = 1
"""Tiles to either side of a tile's own that every row keeps, as in the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolAttention(SparseConfig):
    """Sparse self-attention that keeps the tiles of high pooled scores and pools the rest (arXiv 2607.24027).

    For unset options and those that begin with ``dense`` or ``block`` see `SparseConfig`. With a method that lists
    tiles, the listed ones are routed.

    Attributes:
        beta: standard deviations by which a tile's score must exceed its row's mean to stay exact; on scores that are
            normally distributed 1 - Phi(beta) of the tiles do: 1.0 keeps 16 %, 1.3 10 %, 2.0 2 %, 0 half, -8 all. What
            SGLang, TensorRT-LLM and ComfyUI call tau.
        beta_last: beta at the last step that is not dense; beta changes towards it linearly. Unset: it stays.
        threshold: how a row's deviation is found: ``diag`` from the variances of the mean keys' channels, ``exact``
            from their covariances too.
        sink: what every query sees exactly besides its own and the neighbouring tiles: ``text`` tokens, where text is
            part of the sequence (as queries they see all exactly, too), or ``first_frame``, text and the first frame.
        rest: what becomes of the other tiles: ``pooled``, or ``cached`` (they enter as they did in the layer's last
            dense call, in which the tiles of the calls after it are routed; see ``refresh``). Unset: pooled.
        dense_above_sigma: steps whose noise level is above it stay dense, in place of an unset ``dense_steps``; unset:
            none. What TensorRT-LLM calls disabled_until_timestep.
    """

    name: ClassVar[str] = "sol"
    worthwhile_tokens: ClassVar[int] = 40_000  # no port shows a visible gain under 40,000 to 60,000
    # Tiles are 64 as in the paper and all its ports, since beta's figures belong to them: a mean key of 128 tokens is a
    # coarser score and stand-in, but half as many move half the bytes: by the roofline model tiles of 64 take a quarter
    # longer on A100, and 1.5 to 2.1 times as long on H100 and B200 (docs/kernel-predictions.md)
    defaults: ClassVar[Mapping[str, Any]] = {
        "beta": 1.0, "beta_last": None, "block_size": 64, "dense_steps": 0.2, "dense_last_steps": 0,
        "dense_layers": 1,
    }  # fmt: skip

    beta: float | None = None
    beta_last: float | None = None
    threshold: Literal["diag", "exact"] = "diag"
    sink: Literal["text", "first_frame"] = "text"
    rest: Literal["pooled", "cached"] | None = None

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with every unset option filled in; ``beta_last`` with ``beta``."""
        full: Any = SparseConfig.filled(self, recipe)
        return full if full.beta_last is not None else replace(full, beta_last=full.beta)

    def beta_at(self, step_index: int, num_inference_steps: int | None) -> float:
        """Return beta at a step, 0-based; raise `ConfigError` if it changes over an unknown number of steps."""
        at_first, at_last = self.beta or 0.0, self.beta_last or 0.0
        if at_last == at_first:
            return at_first
        if num_inference_steps is None:
            raise unknown_steps(self, "beta_last", "leave beta_last unset")
        first, last = _sparse_steps(self, num_inference_steps)
        share = (step_index - first) / (last - first) if last > first else 0.0
        return at_first + (at_last - at_first) * share

    def pinned(self, layout: TokenLayout) -> np.ndarray:
        """Return the visual tiles that stay exact whatever the data say, bool [N, N]; text not counted."""
        alone = replace(layout, text_before=0, text_after=0)
        bits = pinned_bits(alone, self.block_size, DIAGONAL, self.sink, "cpu")
        return unpack_bits(bits, self.tiling.tiles(alone.tokens)).numpy()

    def keep(self, share: np.ndarray, pinned: np.ndarray) -> np.ndarray:
        """Return the expected exact share of tiles from the share before routing, on Gaussian scores."""
        at_first, at_last = self.beta or 0.0, self.beta_last or 0.0
        betas = [at_first + (at_last - at_first) * part / 32 for part in range(33)]
        routed = sum(0.5 * math.erfc(beta / math.sqrt(2)) for beta in betas) / len(betas)
        return np.where(pinned, share, share * routed)

    def density(self, layout: TokenLayout) -> float:
        """Return the expected share of the visual tiles that stay exact, in (0, 1], on Gaussian scores."""
        pinned = self.pinned(layout)
        return float(self.keep(np.ones(pinned.shape), pinned).mean())

    def advice(self, layout: TokenLayout) -> str | None:
        pinned = self.pinned(layout)
        return self.advice_on_size(layout, pinned.size if pinned.all() else 0)


@lru_cache(maxsize=16)
def _sparse_steps(settings: SolAttention, steps: int) -> tuple[int, int]:
    """Return the first and the last step at which any layer is sparse; (0, 0) if there is none."""
    layer = settings.dense_layers or 0
    sparse = [step for step in range(steps) if not settings.is_dense(step, steps, layer, 0.0)] or [0]
    return sparse[0], sparse[-1]


class SolHandler(SparseHandler):
    """SolAttention on one model: its routing put into the plan."""

    config_type = SolAttention
    phase = Phase.SELECTIONS
    exclusive = frozenset({"routing"})
    settings: SolAttention

    @property
    def pools(self) -> bool:
        return not self.settings.caches_rest

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Route the exact tiles of the plan's list, or all tiles where there is none."""
        settings, layout, device = self.settings, context.layout, str(context.device)
        pinned = pinned_bits(layout, settings.tiling.block_size, DIAGONAL, settings.sink, device)
        steps = context.num_inference_steps
        beta = (settings.beta or 0.0) if context.training else settings.beta_at(context.step_index, steps)
        plan = plan.with_tiles(*self.model.tiling.full(layout, device)).narrow(pinned=pinned)
        return plan.route(Routing(beta=beta, threshold=settings.threshold))

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        counted = "which tiles are routed is known only while it runs; the count is what Gaussian scores would keep"
        keep, pinned = self.settings.keep, self.settings.pinned(layout)
        return self.saving_of(
            lambda share, rows: keep(share, pinned[rows]), layout, steps, expected=True, notes=(counted,)
        )
