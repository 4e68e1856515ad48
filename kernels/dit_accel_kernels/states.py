"""Tile states of a call: its lists with its selection applied, and the order in which a row's tiles are visited."""

from dataclasses import replace

import torch
from torch import Tensor

from .bits import pack_bits, unpack_bits
from .csr import EXACT, POOLED, SKIPPED
from .features import tile_means, wide_dtype
from .problem import Problem, by_head, lists_of
from .sections import sections_of
from .selection import LOG2_E, Routing
from .tiles import TileLists


def list_states(problem: Problem) -> Tensor:
    """Tile states of the lists alone, uint8 [B or 1, H or 1, NQ, NK]."""
    return by_head(lists_of(problem).states(), problem.q.shape[1])


def pair_mask(problem: Problem) -> Tensor | None:
    """Which pairs of tokens the masks inside tiles let through, bool [B or 1, H or 1, S_q, S_k]; None: all of them."""
    if problem.mask_ids is None:
        return None
    table, bits = lists_of(problem).mask_table()
    seen = unpack_bits(bits, problem.block_k)[table].transpose(2, 3).flatten(3).flatten(1, 2)
    return by_head(seen[:, : problem.num_q, : problem.num_k], problem.q.shape[1])


def selected_states(problem: Problem) -> Tensor:
    """Tile states of a call in tiled order, selection applied, uint8 [B or 1, H or 1, NQ, NK]."""
    states, selection = list_states(problem), problem.selection
    if selection is None:
        return states
    tiles = problem.key_tiles
    pinned = None if selection.pinned is None else unpack_bits(selection.pinned, tiles)
    free = states == EXACT if pinned is None else (states == EXACT) & ~pinned
    if selection.keep is not None:
        dropped = free & ~unpack_bits(selection.keep, tiles)
        states = torch.where(dropped, POOLED if selection.rest == "pooled" else SKIPPED, states)
        free = free & ~dropped
    if selection.routing is not None:
        scores, threshold = routing_scores(problem, selection.routing, pinned)
        states = torch.where(free & ~(scores > threshold), POOLED, states)
    if selection.routed is not None:
        states = torch.where(free & ~unpack_bits(selection.routed, tiles), POOLED, states)
    return states.to(torch.uint8)


def routing_scores(problem: Problem, routing: Routing, pinned: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores [B, H, NQ, NK] and row thresholds [B, H, NQ, 1] in log2 units, float32 (float64 for float64).

    The mean keys are those of the pooled tiles, rounded to k's dtype; mean queries are not rounded. `pinned` is bool
    [NQ, NK] or None.
    """
    wide = wide_dtype(problem.q.dtype)
    valid = None if problem.key_valid is None else problem.key_valid[:, None]
    q_mean, _ = tile_means(problem.q.to(wide), problem.block_q, None)
    k_mean, length = tile_means(problem.k, problem.block_k, valid)
    repeat = problem.q.shape[1] // problem.k.shape[1]
    k_mean = k_mean.to(wide).repeat_interleave(repeat, 1)
    counted = length.to(wide).gt(0)  # [NK] or [B, 1, NK]
    if pinned is not None:
        counted = counted & ~pinned.all(0)
    weight = counted.to(wide).expand(*k_mean.shape[:2], -1)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
    if problem.head_scale is not None:
        q_mean = q_mean * problem.head_scale.to(wide)[:, :, None, None]
    q_mean = q_mean * (problem.scale * LOG2_E)
    scores = q_mean @ k_mean.mT
    centre = (weight[..., None] * k_mean).sum(2, keepdim=True)
    mean = (q_mean * centre).sum(-1, keepdim=True)
    if routing.threshold == "diag":
        variance = (weight[..., None] * (k_mean - centre).square()).sum(2, keepdim=True)
        variance = (q_mean.square() * variance).sum(-1, keepdim=True)
    else:
        variance = (weight[:, :, None] * (scores - mean).square()).sum(-1, keepdim=True)
    return scores, mean + routing.beta * (variance + 1e-6).sqrt()


def resolved(problem: Problem) -> tuple[Problem, Tensor | None]:
    """A call in tiled order with its selection turned into lists of every batch and head, and the exact tiles as bits.

    Bits int32 [B, H, NQ, W]; a call without a selection as it is, and None. Reads the counts back from the device:
    backends that must not sync select by themselves.
    """
    if problem.selection is None:
        return problem, None
    batch, heads = problem.q.shape[:2]
    states = selected_states(problem).expand(batch, heads, -1, -1)
    lists = TileLists.from_states(states.flatten(0, 1), **problem.sizes)
    return replace(problem, selection=None, **lists.parts), pack_bits(states == EXACT)


def visiting_order(problem: Problem, reverse: bool) -> Tensor:
    """Key tiles of every query tile in the order of visits, int64 [B or 1, NQ, NK]: section by section, each ascending.

    `reverse` descends in each section. The problem is in tiled order.
    """
    section = sections_of(problem)
    tiles = torch.arange(problem.key_tiles, device=section.device)
    return (section.long() * problem.key_tiles + (tiles.flip(0) if reverse else tiles)).argsort(dim=-1)
