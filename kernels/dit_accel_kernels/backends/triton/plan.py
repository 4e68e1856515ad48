"""Tile lists as kernels read them: those of query tiles entries sorted into sections, those of key tiles by column.

Rows come longest first. The sections are those of sections.py; absent tiles leave the list. All of it is torch code on
the lists' device without a sync, made once for lists, frames and valid keys and remembered as long as these live.
"""
# pyright: basic

from dataclasses import dataclass

import torch
from torch import Tensor

from ...bits import pack_bits
from ...cache import StorageCache
from ...csr import row_of_entry
from ...features import decay_by_frame, last_frame, tile_means
from ...problem import Problem
from ...sections import ABSENT, SLOW, decay_of_tiles, sections_of

WORD = 32  # key tiles a word of a bitmap


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class RowPlan:
    """What the kernels need of lists, masks and frames; G' list sets, or B * G' where masks differ by batch.

    `bounds` int64 [G', NQ, 6]: start of the plain section, ends of plain, constant and slow (positions in `indices` and
    `entry_t`, whose first and last entry belong to no row), first pooled tile and one past the last. `q_order` int32
    [G', NQ], longest first. `strides` of batch and head over these list sets, `pooled_strides` over the call's own,
    which valid keys don't split: those of `pooled_bits` int32 [G, NQ, W], None where nothing is pooled. `entry_t`
    float32 [nnz + 2] and `pooled_t` float32 [F + 2, NK] with decay. `entry_mask` int32 [nnz + 2], the number of each
    entry's mask or -1, where tiles have masks. `valid` uint8 [B, S_k] with a key mask; `q_frames`, `k_frames` int32:
    all in tiled order. With `entry_strides` every batch and head has its own lists (expand.py): `bounds` [B*H, NQ, 6],
    relative to b * entry_strides[0] + h * entry_strides[1], and `pooled_bits` [B, H, NQ, W].
    """

    indices: Tensor
    bounds: Tensor
    q_order: Tensor
    strides: tuple[int, int]
    pooled_strides: tuple[int, int]
    pooled_bits: Tensor | None
    valid: Tensor | None
    entry_t: Tensor | None
    entry_mask: Tensor | None
    q_frames: Tensor | None
    k_frames: Tensor | None
    pooled_t: Tensor | None
    entry_strides: tuple[int, int] | None = None


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


_ROWS: StorageCache[RowPlan] = StorageCache()
_COLUMNS: StorageCache[ColumnPlan] = StorageCache()
_BITS: StorageCache[Tensor] = StorageCache()


def row_plan(problem: Problem, *, without_whole: bool = False) -> RowPlan:
    """The plan of a problem in the caller's token order; `without_whole`: exact tiles that no mask cuts are absent."""
    valid, decay = problem.features_in_tiled_order()
    lists = (problem.exact_offsets, problem.exact_indices, problem.pooled_offsets, problem.pooled_indices)
    parts = (*lists, problem.mask_ids, *(decay or ()))
    key = (problem.q.shape, problem.k.shape, problem.block_q, problem.block_k, without_whole)
    return _ROWS.get(parts, key, lambda: _rows_of(problem, valid, decay, without_whole), loose=[valid])


def _rows_of(
    problem: Problem, valid: Tensor | None, decay: tuple[Tensor, Tensor, Tensor] | None, without_whole: bool
) -> RowPlan:
    batch, heads = problem.q.shape[:2]
    sets, q_tiles = problem.exact_offsets.shape[0], problem.query_tiles
    indices, mask_ids, (pooled, pooled_bits) = problem.exact_indices, problem.mask_ids, _pooled(problem)
    strides = call_strides = list_strides(problem, heads)
    entry_row = row_of_entry(problem.exact_offsets, indices.numel())
    entry_t = pooled_t = None
    if decay is not None:
        entry_t = decay_of_tiles(problem, decay)[entry_row % q_tiles, indices.long()]
        assert problem.decay is not None
        t, _ = decay_by_frame(*decay, last_frame(problem.decay[1]))
        pooled_t = tile_means(t[..., None], problem.block_k, None)[0][..., 0]
    entry_batch = torch.zeros_like(entry_row)
    if valid is not None:
        if sets != batch * heads:  # one list set for each batch
            entry_row = (entry_row + sets * q_tiles * torch.arange(batch, device=indices.device)[:, None]).flatten()
            indices = indices.repeat(batch)
            entry_t = None if entry_t is None else entry_t.repeat(batch)
            mask_ids = None if mask_ids is None else mask_ids.repeat(batch)
            pooled = pooled.repeat(batch, 1, 1)
            strides, sets = (sets, call_strides[1]), sets * batch
        entry_batch = entry_row // q_tiles * batch // sets
    section = sections_of(problem)[entry_batch, entry_row % q_tiles, indices.long()].long()
    cut = torch.zeros_like(indices, dtype=torch.bool) if mask_ids is None else mask_ids >= 0
    section = torch.where(cut, section.clamp(min=SLOW), section)
    if without_whole:
        section = section.masked_fill(~cut, ABSENT)
    order, edges = grouped(entry_row, section, sets * q_tiles, 4)
    bounds = edges[:-1].view(sets, q_tiles, 4) + 1
    work = (bounds[..., 3] - bounds[..., 0]) * problem.block_k + pooled[..., 1] - pooled[..., 0]
    return RowPlan(
        indices=_padded(indices[order]),
        bounds=torch.cat([bounds, pooled], -1),
        q_order=work.argsort(dim=-1, descending=True).int(),
        strides=strides,
        pooled_strides=call_strides,
        pooled_bits=pooled_bits,
        valid=None if valid is None else valid.to(torch.uint8).contiguous(),
        entry_t=None if entry_t is None else _padded(entry_t[order]),
        entry_mask=None if mask_ids is None else _padded(mask_ids[order]),
        q_frames=None if decay is None else decay[1].clone(memory_format=torch.contiguous_format),
        k_frames=None if decay is None else decay[2].clone(memory_format=torch.contiguous_format),
        pooled_t=pooled_t,
    )


def _pooled(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The first pooled key tile of each row of the lists and one past the last, int64 [G, NQ, 2], and all as bits.

    Zeros in rows without any, and None for bits in lists without.
    """
    offsets, indices = problem.pooled_offsets, problem.pooled_indices
    if offsets is None:
        sets = problem.exact_offsets.shape[0]
        return problem.exact_offsets.new_zeros(sets, problem.query_tiles, 2, dtype=torch.int64), None
    assert indices is not None
    start, end = offsets[:, :-1].long(), offsets[:, 1:].long()
    padded = torch.nn.functional.pad(indices, (0, 1))  # rows without a tile look behind the last or before the first
    ends = torch.stack([padded[start], padded[end - 1] + 1], -1).long()
    return ends.masked_fill_((start == end)[..., None], 0), bits_of(offsets, indices, problem.key_tiles)


def bits_of(offsets: Tensor, indices: Tensor, tiles: int) -> Tensor:
    """Lists as bits int32 [G, NQ, W]: bit j % 32 of word [g, i, j // 32] is set where row i of set g holds tile j.

    They are remembered as long as the lists live, and not to be written to.
    """

    def build() -> Tensor:
        sets, rows = offsets.shape[0], offsets.shape[1] - 1
        chosen = torch.zeros(sets * rows, tiles, dtype=torch.bool, device=indices.device)
        chosen[row_of_entry(offsets, indices.numel()), indices.long()] = True
        return pack_bits(chosen).view(sets, rows, -1)

    return _BITS.get([offsets, indices], (tiles,), build)


def scale_stride(problem: Problem) -> int:
    """Stride of the batch in head_scale [B or 1, H]."""
    return 0 if problem.head_scale is None or problem.head_scale.shape[0] == 1 else problem.q.shape[1]


def list_strides(problem: Problem, heads: int) -> tuple[int, int]:
    """Strides of batch and head over a call's list sets, where so many heads, of queries or keys, make up a batch."""
    groups = problem.exact_offsets.shape[0]
    return heads if groups == problem.q.shape[0] * problem.q.shape[1] else 0, int(groups > 1)


def _padded(entries: Tensor) -> Tensor:
    """The entries with one more at either end: kernels read one ahead, in both directions."""
    return torch.nn.functional.pad(entries, (1, 1))


def grouped(owner: Tensor, section: Tensor, owners: int, sections: int) -> tuple[Tensor, Tensor]:
    """Entries sorted by owner and section, stable otherwise: their order, and where each section of each owner begins.

    `owner` and `section` int64 or bool [nnz]; the order int64 [nnz], the positions int64 [owners * sections + 1].
    """
    by_key, order = torch.sort(owner * sections + section, stable=True)
    return order, torch.searchsorted(by_key, torch.arange(owners * sections + 1, device=owner.device))


def column_plan(problem: Problem, *, whole_chunks: bool) -> ColumnPlan:
    """The plan of a problem, from the cache; `whole_chunks`: the kernel's chunks of query rows divide a tile."""
    _, decay = problem.features_in_tiled_order()
    parts = (problem.exact_offsets, problem.exact_indices, problem.mask_ids, *(decay or ()))
    key = (problem.q.shape, problem.k.shape, problem.block_q, problem.block_k, whole_chunks)
    return _COLUMNS.get(parts, key, lambda: _columns_of(problem, decay, whole_chunks))


def _columns_of(problem: Problem, decay: tuple[Tensor, Tensor, Tensor] | None, whole_chunks: bool) -> ColumnPlan:
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
