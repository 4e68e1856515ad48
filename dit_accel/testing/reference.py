"""The reference of an attention plan: what it means, computed over pairs of tokens without the kernels."""

import torch
import torch.nn.functional as F
from dit_accel_kernels import EXACT, POOLED, SKIPPED, TileLists, unpack_bits
from torch import Tensor

from ..plan.plan import AttentionPlan


def tiles_of(plan: AttentionPlan, tokens: int) -> TileLists:
    """Return the plan's lists, all tiles exact where it has none."""
    return plan.tiles or TileLists.full(tokens, tokens, block_q=128, block_k=128)


def tile_states(plan: AttentionPlan, heads: int, tokens: int, exact: Tensor | None) -> Tensor:
    """Return the state of every tile of one call, uint8 [B or 1, H or 1, NQ, NK].

    Args:
        plan: the call's plan.
        heads: H.
        tokens: S.
        exact: the tiles that a selection left exact, bits int32 [B, H, NQ, W]; None: the plan selects nothing.
    """
    tiles = tiles_of(plan, tokens)
    states = tiles.states()
    states = states[None] if tiles.groups in (1, heads) else states.unflatten(0, (-1, heads))
    selection = plan.selection
    if exact is None or selection is None:
        return states
    demoted = (states == EXACT) & ~unpack_bits(exact, tiles.key_tiles)
    states = torch.where(demoted, POOLED, states)
    if selection.keep is not None and selection.rest == "skip":
        states = torch.where(demoted & ~unpack_bits(selection.keep, tiles.key_tiles), SKIPPED, states)
    return states


def attention(
    plan: AttentionPlan, states: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float | None
) -> Tensor:
    """Return the output [B, H, S, D] in the sequence's own order, in q's dtype.

    Args:
        plan: the call's plan.
        states: of `tile_states`.
        q: [B, H, S, D]; so are k and v, whose heads may be fewer.
        valid: bool [B, S], the keys that count; None: all.
        scale: factor on the logits; None: 1 / sqrt(D).
    """
    tokens, order, tiles = q.shape[2], plan.token_order, tiles_of(plan, q.shape[2])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if plan.head_scale is not None:
        q = (q * plan.head_scale.reshape(-1, q.shape[1])[:, :, None, None]).to(q.dtype)
    valid = torch.ones(q.shape[0], tokens, dtype=torch.bool) if valid is None else valid
    if order is not None:
        q, k, v, valid = q[:, :, order], k[:, :, order], v[:, :, order], valid[:, order]
    frames = None if plan.frame_decay is None else plan.frame_decay.q_frames
    apart, seen = torch.zeros(tokens, dtype=torch.bool), torch.ones(tokens, dtype=torch.bool)
    if plan.row_override is not None:
        apart[plan.row_override.rows], seen = True, plan.row_override.keys
    if order is not None:
        apart, seen, frames = apart[order], seen[order], None if frames is None else frames[order]
    places = torch.arange(tokens)
    row, column = places // tiles.block_q, places // tiles.block_k
    member = F.one_hot(column).to(q.dtype) * valid[..., None]
    length = member.sum(1)
    share = member / length.clamp(min=1)[:, None]
    k_mean, v_mean = (torch.einsum("bsn,bhsd->bhnd", share, x) for x in (k, v))
    by_row = states[:, :, row]
    exact = torch.where(apart[:, None], seen, (by_row == EXACT)[..., column]) & valid[:, None, None]
    pooled = (by_row == POOLED) & (length > 0)[:, None, None] & ~apart[:, None]
    # A pooled tile of n tokens is one key that weighs n times as much, which is a bias of log n.
    of_tokens = torch.zeros(exact.shape).masked_fill(~exact, -torch.inf)
    bias = torch.cat([of_tokens, length.log()[:, None, None].masked_fill(~pooled, -torch.inf)], -1)
    keys, values = torch.cat([k, k_mean], 2), torch.cat([v, v_mean], 2)
    if plan.frame_decay is None or frames is None:
        out = F.scaled_dot_product_attention(q, keys, values, bias.to(q.dtype), scale=scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        t = _decay(plan.frame_decay.table.to(wide), frames)
        t = torch.cat([t.expand(len(q), -1, -1), torch.einsum("qs,bsn->bqn", t, share.to(wide))], 2)[:, None]
        x = (q @ keys.mT).to(wide)
        x = x * (q.shape[-1] ** -0.5 if scale is None else scale)
        out = (torch.minimum(x, t * x) + bias).softmax(-1).to(q.dtype) @ values
    return out if order is None else torch.empty_like(out).index_copy_(2, order, out)


def _decay(table: Tensor, frames: Tensor) -> Tensor:
    """Return t of every pair of tokens, [S, S]; 1 where one of them has no frame."""
    distance = (frames[:, None] - frames).abs().clamp(max=len(table) - 1)
    outside = (frames < 0)[:, None] | (frames < 0)
    return table[distance.long()].masked_fill(outside, 1.0)
