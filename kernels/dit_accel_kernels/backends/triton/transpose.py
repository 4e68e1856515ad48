"""Tile lists as the backward kernels of K and V read them: the query tiles of every key tile.

Pure torch code on the lists' device without a sync, made once and remembered as long as lists and frames live.
"""
# pyright: basic

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache import StorageCache
from ...csr import row_of_entry
from ...problem import Problem
from ...sections import decay_of_tiles
from .plan import grouped, list_strides

WORD = 32  # key tiles a word of a bitmap


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class ColumnPlan:
    """Exact lists by key tile.

    `q_tiles` int32 [nnz + 1]: the query tiles of every key tile, those that need no mask first, and one that belongs to
    no key tile, since kernels read one ahead. `bounds` int64 [G, NK, 3]: start, end of those, end of all, as positions
    in `q_tiles`. `order` int32 [G', NK]: key tiles with most work first, G' = 1, HK or B * HK. `entry_t` float32 [nnz]
    is the decay of the entries without a mask, None without decay; `entry_mask` int32 [nnz] the number of each entry's
    mask inside its tile or -1, None where no tile has one.
    `strides` of batch and head over the list sets, `order_strides` of batch and key head over those of `order`. With
    `entry_strides` every batch and head has its own lists, whose bounds are relative to b * entry_strides[0] + h *
    entry_strides[1].
    """

    q_tiles: Tensor
    bounds: Tensor
    order: Tensor
    entry_t: Tensor | None
    entry_mask: Tensor | None
    strides: tuple[int, int]
    order_strides: tuple[int, int]
    entry_strides: tuple[int, int] | None = None


_CACHE: StorageCache[ColumnPlan] = StorageCache()


def column_plan(problem: Problem, *, whole_chunks: bool) -> ColumnPlan:
    """The plan of a problem, from the cache; `whole_chunks`: the kernel's chunks of query rows divide a tile."""
    _, decay = problem.features_in_tiled_order()
    parts = (problem.exact_offsets, problem.exact_indices, problem.mask_ids, *(decay or ()))
    key = (problem.q.shape, problem.k.shape, problem.block_q, problem.block_k, whole_chunks)
    return _CACHE.get(parts, key, lambda: _build(problem, decay, whole_chunks))


def _build(problem: Problem, decay: tuple[Tensor, Tensor, Tensor] | None, whole_chunks: bool) -> ColumnPlan:
    q_tiles, k_tiles = problem.query_tiles, problem.key_tiles
    sets = problem.exact_offsets.shape[0]
    indices = problem.exact_indices.long()
    flat = row_of_entry(problem.exact_offsets.long(), indices.numel())
    list_set, q_tile = flat // q_tiles, flat % q_tiles
    masked = torch.full_like(q_tile, not whole_chunks, dtype=torch.bool)
    if problem.q.shape[2] % problem.block_q:
        masked |= q_tile == q_tiles - 1
    if problem.mask_ids is not None:
        masked |= problem.mask_ids >= 0
    t = None
    if decay is not None:
        t = decay_of_tiles(problem, decay)[q_tile, indices]
        masked |= t.isnan()
    order, edges = grouped(list_set * k_tiles + indices, masked, sets * k_tiles, 2)
    bounds = torch.stack([edges[:-1:2], edges[1::2], edges[2::2]], -1).view(sets, k_tiles, 3)
    repeat = 1 if sets == 1 else problem.q.shape[1] // problem.k.shape[1]
    work = (bounds[..., 2] - bounds[..., 0]).view(sets // repeat, repeat, k_tiles).sum(1)
    return ColumnPlan(
        q_tiles=torch.nn.functional.pad(q_tile[order].int(), (0, 1)),
        bounds=bounds,
        order=work.argsort(dim=-1, descending=True).int(),
        entry_t=None if t is None else t[order],
        entry_mask=None if problem.mask_ids is None else problem.mask_ids[order],
        strides=list_strides(problem, problem.q.shape[1]),
        order_strides=list_strides(problem, problem.k.shape[1]),
    )
