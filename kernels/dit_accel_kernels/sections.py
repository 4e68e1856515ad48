"""Sections of tiles by what a kernel must do in them: the order of visits is section by section.

*Plain*: every key is there and no decay applies. *Constant*: every key is there and the tile has one decay t. *Slow*:
the ragged last tile, tiles with invalid keys, tiles whose decay differs by element, and every tile where the tile size
is no multiple of 16, in which chunks do not divide it. *Absent*: no valid key, never visited. An exact tile with a mask
of its own is slow too, unless it is absent.
"""

import torch
from torch import Tensor

from .features import split_tiles
from .problem import Problem

PLAIN, CONSTANT, SLOW, ABSENT = range(4)


def sections_of(problem: Problem) -> Tensor:
    """Section of every pair of tiles, uint8 [B or 1, NQ, NK]; the problem may be in either token order."""
    valid, decay = problem.features_in_tiled_order()
    rows, tiles = problem.query_tiles, problem.key_tiles
    start = PLAIN if problem.block_k % 16 == 0 else SLOW
    section = torch.full((1, rows, tiles), start, dtype=torch.uint8, device=problem.q.device)
    if problem.k.shape[2] % problem.block_k:
        section[..., -1] = SLOW
    if decay is not None:
        t = decay_of_tiles(problem, decay)
        section = torch.where(t.isnan(), SLOW, torch.where(t != 1, section.clamp(min=CONSTANT), section))
    if valid is not None:
        all_valid, any_valid = valid_tiles(valid, problem.block_k)
        section = torch.where(all_valid[:, None], section, SLOW)
        section = torch.where(any_valid[:, None], section, ABSENT)
    return section.to(torch.uint8)


def valid_tiles(valid: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Whether all and whether any keys of each tile are valid, bool [B, NK]; tokens beyond the end don't count."""
    return split_tiles(valid, 1, block, True).all(-1), split_tiles(valid, 1, block, False).any(-1)


def decay_of_tiles(problem: Problem, decay: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The one decay t of each pair of tiles, float32 [NQ, NK]; NaN where it may differ by element."""
    table, q_frames, k_frames = decay
    q_low, q_high, q_outside = _frame_range(q_frames, problem.block_q)
    k_low, k_high, k_outside = _frame_range(k_frames, problem.block_k)
    near = torch.maximum(q_low[:, None] - k_high, k_low - q_high[:, None]).clamp(0, table.numel() - 1)
    far = torch.maximum(q_high[:, None] - k_low, k_high - q_low[:, None]).clamp(0, table.numel() - 1)
    changes = torch.nn.functional.pad((table[1:] != table[:-1]).long(), (1, 0)).cumsum(0)
    t = torch.where(changes[near] == changes[far], table[near], torch.nan)
    nobody = (q_high[:, None] < 0) | (k_high < 0)  # no pair of tokens inside the video
    t = torch.where(nobody, 1.0, t)
    return torch.where((q_outside[:, None] | k_outside) & (t != 1), torch.nan, t)


def _frame_range(frames: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest frame of each tile's tokens inside the video (-1: none), and whether some are outside."""
    pad = -frames.numel() % block
    tiles = torch.cat([frames, frames[-1:].expand(pad)]).long().view(-1, block)
    high = tiles.amax(1)
    low = torch.where(tiles < 0, high[:, None], tiles).amin(1)
    return low, high, (tiles < 0).any(1)
