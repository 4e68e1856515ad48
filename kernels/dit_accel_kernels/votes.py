"""The specification of votes: which visited tiles a call keeps for the next one (LiteAttention, arXiv 2511.11062).

Tiles of a block row are visited in the order of `visiting_order`; for a query row r, M_j is the tile's largest logit
and l_j its sum of exponentials, m and l those of everything visited before it (l with the tile), pooled tiles left
out. Row r needs tile j

- "maxgap": where M_j - m > threshold in log2 units;
- "mass": where l_j > threshold * l. That share is an upper bound of the tile's share of all exact mass;
- "budget": where e + l_j / l > threshold, e being the sum of that share over the tiles that r did not need so far.

A tile loses its bit where no valid row needs it, except the first that is visited and pinned ones. A tile without a
valid key is not visited. Tiles that were not visited keep the bit they had. Where the released LiteAttention votes a
warp at a time and with ranges, the outcome is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel_kernels.features import Problem
from dit_accel_kernels.selection import LOG2_E, Vote, list_states, pack_bits, unpack_bits, visiting_order
from dit_accel_kernels.tiles import EXACT


def kept_after(problem: Problem, visited: Tensor, top: Tensor, mass: Tensor) -> Tensor:
    """Bits of the next call, int32 [B, H, NQ, W].

    Args:
        problem: the call in tiled order, with its selection.
        visited: bool [B, H, NQ, NK], the exact tiles that have a valid key.
        top: [B, H, S_q, NK], largest natural logit of each query row in each tile; any value where not visited.
        mass: like top, the sum of exponentials relative to any maximum that the row's tiles share.
    """
    selection = problem.selection
    assert selection is not None
    assert selection.vote is not None
    tiles, shape = problem.key_tiles, visited.shape
    order = visiting_order(problem, selection.reverse).expand(shape[0], -1, -1)[:, None].expand(shape)
    seen = visited.gather(-1, order)
    by_row = order.repeat_interleave(problem.block_q, 2)[:, :, : top.shape[2]]
    seen_by_row = seen.repeat_interleave(problem.block_q, 2)[:, :, : top.shape[2]]
    needs = rows_need(
        selection.vote,
        top.gather(-1, by_row).masked_fill(~seen_by_row, -torch.inf),
        mass.gather(-1, by_row).masked_fill(~seen_by_row, 0.0),
    )
    pad = shape[2] * problem.block_q - needs.shape[2]
    needs = torch.nn.functional.pad(needs, (0, 0, 0, pad)).unflatten(2, (-1, problem.block_q)).any(3)
    first = seen & (seen.cumsum(-1) == 1)
    down = torch.zeros_like(visited).scatter_(-1, order, seen & ~needs & ~first)
    if selection.pinned is not None:
        down &= ~unpack_bits(selection.pinned, tiles)
    if selection.keep is None:
        bits = (list_states(problem) == EXACT).expand(shape)
    else:
        bits = unpack_bits(selection.keep, tiles)
    return pack_bits(bits & ~down)


def rows_need(vote: Vote, top: Tensor, mass: Tensor) -> Tensor:
    """Which rows need which tiles, bool [..., S_q, n], from `top` and `mass` [..., S_q, n] in the order of visits.

    Tiles that are not visited have top -inf and mass 0.
    """
    if vote.criterion == "maxgap":
        before = torch.nn.functional.pad(top, (1, -1), value=-torch.inf).cummax(-1).values
        return (top - before) * LOG2_E > vote.threshold
    share = mass / mass.cumsum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
    if vote.criterion == "mass":
        return share > vote.threshold
    spent = torch.zeros_like(share[..., 0])
    needs = torch.empty_like(share, dtype=torch.bool)
    for tile in range(share.shape[-1]):
        need = spent + share[..., tile] > vote.threshold
        needs[..., tile] = need
        spent += share[..., tile].masked_fill(need, 0.0)
    return needs
