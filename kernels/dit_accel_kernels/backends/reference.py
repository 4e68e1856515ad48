"""The specification of block-sparse attention: eager, dense with masks, O(S^2) memory, any dtype, differentiable.

Every other backend is tested against this one. The formulas, for a query row with logits x = scale * head_scale *
(q . k): exact tiles give one column a token, those left out that a tile's mask hides from the row; a pooled tile gives
one column with x = scale * (q . mean K), weight len * e^x and value mean V (the same as numerator += e^x * sum V,
denominator += e^x * len); decay is min(x, t * x) before the length enters; skipped tiles are absent. A pooled tile
counts its valid tokens only, and a tile without any is absent.
With a `precision` logits are those of the numbers that eight bits can hold (precision.py), multiplied without rounding.
"""

import torch
from torch import Tensor

from ..bits import pack_bits
from ..csr import EXACT, POOLED
from ..features import decay_by_frame, split_tiles, tile_means, wide_dtype
from ..precision import centre_of, rounded
from ..problem import Problem
from ..selection import LOG2_E
from ..states import pair_mask, selected_states
from ..votes import Tally


def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, LSE, exact tiles and the bits that a vote keeps of one call in tiled order.

    Output [B, H, S_q, D] in q's dtype; natural-log LSE [B, H, S_q] in float32 (float64 for float64); both bitmaps int32
    [B, H, NQ, W] (selection.py), None without a selection and without a vote.
    """
    q, k, v = problem.q, problem.k, problem.v
    wide = wide_dtype(q.dtype)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    weight = None if problem.key_valid is None else problem.key_valid[:, None]
    # eight bits are made of what is not rounded before
    k_mean, length = tile_means(k if problem.precision is None else k.to(wide), problem.block_k, weight)
    v_mean, _ = tile_means(v, problem.block_k, weight)
    if weight is not None:
        # 0 * inf is not 0: what an invalid key holds must not matter, nor in the gradient
        k, v = (x.masked_fill(~weight[..., None], 0) for x in (k, v))
    x_q, x_k, x_mean, shift = q, k, k_mean, None
    if problem.precision is not None:
        x_q, x_k, x_mean, shift = _in_eight_bits(problem, q, k, k_mean, length, weight)
    tile_states = selected_states(problem)
    states = tile_states.repeat_interleave(problem.block_q, 2)[:, :, : q.shape[2]]
    exact = (states >= EXACT).repeat_interleave(problem.block_k, -1)[..., : k.shape[2]]
    seen = pair_mask(problem)
    if seen is not None:
        exact = exact & seen
    if weight is not None:
        exact = exact & weight[..., None, :]
    pooled = (states == POOLED) & (length > 0).unsqueeze(-2)
    scale: float | Tensor = problem.scale
    if problem.head_scale is not None:
        scale = scale * problem.head_scale.to(wide)[:, :, None, None]
    x_exact = (x_q @ x_k.mT).to(wide) * scale
    x_pooled = (x_q @ x_mean.mT).to(wide) * scale
    if problem.decay is not None:
        t_exact, t_pooled = _decay(problem, wide)
        x_exact = torch.minimum(x_exact, t_exact * x_exact)
        x_pooled = torch.minimum(x_pooled, t_pooled * x_pooled)
    x_pooled = x_pooled + length.to(wide).clamp(min=1).log().unsqueeze(-2)
    x = torch.cat([x_exact.masked_fill(~exact, -torch.inf), x_pooled.masked_fill(~pooled, -torch.inf)], -1)
    empty = ~torch.cat([exact.any(-1, keepdim=True), pooled.any(-1, keepdim=True)], -1).any(-1, keepdim=True)
    p = torch.softmax(x.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    out = p.to(q.dtype) @ torch.cat([v, v_mean], 2)
    lse = torch.logsumexp(x.masked_fill(empty, 0.0), -1).masked_fill(empty[..., 0], -torch.inf)
    if shift is not None:
        lse = lse + (shift[..., None] * scale)[..., 0]
    if problem.selection is None:
        return out, lse, None, None
    chosen = (tile_states == EXACT).expand(*q.shape[:2], -1, -1)
    kept = _kept(problem, chosen, x[..., : k.shape[2]]) if problem.votes else None
    return out, lse, pack_bits(chosen), kept


def _in_eight_bits(
    problem: Problem, q: Tensor, k: Tensor, k_mean: Tensor, length: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and mean keys [B, H, *, D] in a call's precision, and what centring took off q . k, [B, H, S_q]."""
    precision, block = problem.precision or "", problem.block_k
    centre = centre_of(k_mean, length) if problem.decay is None else k_mean.new_zeros(())
    off = k - centre if weight is None else (k - centre).masked_fill(~weight[..., None], 0)
    shift = (q.to(off.dtype) * centre).sum(-1)
    return rounded(q, precision), rounded(off, precision, block), rounded(k_mean - centre, precision), shift


def _kept(problem: Problem, visited: Tensor, x: Tensor) -> Tensor:
    """Bits that votes keep, by the logits x [B, H, S_q, S_k], -inf outside the `visited` tiles [B, H, NQ, NK]."""
    tally, x = Tally(problem), split_tiles(x.detach(), 3, problem.block_k, -torch.inf)
    evidence = x.amax(-1)  # of every query row in every tile
    if tally.by_mass:
        peak = evidence.amax(-1, keepdim=True)
        evidence = (x - peak.masked_fill(peak.isinf(), 0.0)[..., None]).exp().sum(-1)
    else:
        evidence = evidence * LOG2_E
    evidence = split_tiles(evidence, 2, problem.block_q).flatten(0, 2).permute(2, 0, 1)
    tiles = torch.arange(tally.none, device=x.device).where(visited, tally.none).flatten(0, 2)
    tally.settle(torch.arange(len(tiles), device=x.device), tiles, evidence)
    return tally.kept()


def _decay(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Decay t of every (query row, key), [S_q, S_k], and of every (query row, key tile), [S_q, NK]."""
    assert problem.decay is not None
    t, rows = decay_by_frame(*problem.decay)
    t_tiles, _ = tile_means(t.to(dtype)[..., None], problem.block_k, None)
    return t.to(dtype)[rows], t_tiles[..., 0][rows]
