"""Tile lists as the forward kernel reads them: entries of each row sorted into sections, rows ordered longest first.

Section *plain*: every key is there and no decay applies. *Constant*: every key is there and the tile has one decay t,
kept beside the entry. *Slow*: the ragged last tile, tiles with invalid keys, tiles whose decay differs by element, and
everything where the kernel's chunk does not divide a tile. Tiles without a valid key leave the list. All of it is torch
code on the lists' device without a sync, made once and remembered as long as lists, masks and frames live.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel_kernels.cache import StorageCache
from dit_accel_kernels.features import Problem, decay_by_frame, tile_means

PLAIN, CONSTANT, SLOW, ABSENT = range(4)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class RowPlan:
    """What the kernel needs of lists, masks and frames; G' list sets, or B * G' where masks differ by batch.

    `bounds` int32 [G', NQ, 6]: start of the plain section, ends of plain, constant and slow (positions in `indices` and
    `entry_t`, whose first and last entry belong to no row), start and end of the pooled list. `row_order` int32 [G',
    NQ], longest first. `stride_b`, `stride_h`: list set of a batch and head. `entry_t` float32 [nnz + 2] and `pooled_t`
    float32 [F + 2, NK] with decay. `valid` uint8 [B, S_k] with a key mask; `q_frames`, `k_frames` int32: all in tiled
    order.
    """

    indices: Tensor
    bounds: Tensor
    row_order: Tensor
    stride_b: int
    stride_h: int
    valid: Tensor | None
    entry_t: Tensor | None
    q_frames: Tensor | None
    k_frames: Tensor | None
    pooled_t: Tensor | None


_CACHE: StorageCache[RowPlan] = StorageCache()


def row_plan(problem: Problem, *, whole_chunks: bool) -> RowPlan:
    """The plan of a problem in the caller's token order, from the cache; `whole_chunks`: chunks divide a tile."""
    parts = (
        problem.exact_offsets,
        problem.exact_indices,
        problem.pooled_offsets,
        problem.token_order,
        problem.key_length,
        problem.key_mask,
        problem.key_valid,
        *(problem.decay or (None, None, None)),
    )
    shapes = (problem.q.shape[:3], problem.k.shape[1:3], problem.block_q, problem.block_k)
    return _CACHE.get(parts, (*shapes, whole_chunks), lambda: _build(problem, whole_chunks))


def _build(problem: Problem, whole_chunks: bool) -> RowPlan:
    batch, heads = problem.q.shape[:2]
    groups, rows = problem.exact_offsets.shape[0], problem.query_tiles
    offsets, indices, pooled = problem.exact_offsets.long(), problem.exact_indices, problem.pooled_offsets
    valid, decay = problem.features_in_tiled_order()
    stride_b, stride_h = (heads if groups == batch * heads else 0), int(groups > 1)
    tile_row = _row_of_entry(offsets, indices.numel())
    section = torch.full_like(tile_row, PLAIN if whole_chunks else SLOW)
    if problem.k.shape[2] % problem.block_k:
        section[indices == problem.key_tiles - 1] = SLOW
    entry_t = pooled_t = None
    if decay is not None:
        t = _decay_of_tiles(problem, decay)[tile_row % rows, indices.long()]
        section = torch.where(t.isnan(), SLOW, torch.where(t != 1, section.clamp(min=CONSTANT), section))
        entry_t = t.nan_to_num(1.0)
        pooled_t = tile_means(decay_by_frame(*decay)[0][..., None], problem.block_k, None)[0][..., 0]
    if valid is not None:
        all_valid, any_valid = _valid_tiles(valid, problem.block_k)
        if groups != batch * heads:  # one list set for each batch
            tile_row = (tile_row + groups * rows * torch.arange(batch, device=indices.device)[:, None]).flatten()
            section, indices = section.repeat(batch), indices.repeat(batch)
            entry_t = None if entry_t is None else entry_t.repeat(batch)
            offsets = torch.cat([offsets + b * problem.exact_indices.numel() for b in range(batch)])
            pooled = None if pooled is None else pooled.repeat(batch, 1)
            stride_b, groups = groups, groups * batch
        entry_batch = tile_row // rows * batch // groups
        section = torch.where(all_valid[entry_batch, indices.long()], section, SLOW)
        section = torch.where(any_valid[entry_batch, indices.long()], section, ABSENT)
    bounds, order = _sort(section, tile_row, groups * rows)
    begin = offsets[:, :-1].reshape(-1, 1) + 1
    bounds = torch.cat([begin, begin + bounds], 1).unflatten(0, (groups, rows))
    ends = torch.zeros_like(bounds[..., :2]) if pooled is None else torch.stack([pooled[:, :-1], pooled[:, 1:]], -1)
    work = (bounds[..., 3] - bounds[..., 0]) * problem.block_k + ends[..., 1] - ends[..., 0]
    return RowPlan(
        indices=_padded(indices[order]),
        bounds=torch.cat([bounds, ends], -1).int().contiguous(),
        row_order=work.argsort(dim=-1, descending=True, stable=True).int(),
        stride_b=stride_b,
        stride_h=stride_h,
        valid=None if valid is None else valid.to(torch.uint8).contiguous(),
        entry_t=None if entry_t is None else _padded(entry_t[order]),
        q_frames=None if decay is None else decay[1].contiguous(),
        k_frames=None if decay is None else decay[2].contiguous(),
        pooled_t=None if pooled_t is None else pooled_t.contiguous(),
    )


def _padded(entries: Tensor) -> Tensor:
    """The entries with one more at either end: kernels read one ahead, in both directions."""
    return torch.nn.functional.pad(entries, (1, 1))


def _row_of_entry(offsets: Tensor, entries: int) -> Tensor:
    """Row g * NQ + i of every entry, int64 [nnz], without asking the device how many there are."""
    counts = (offsets[:, 1:] - offsets[:, :-1]).flatten()
    rows = torch.arange(counts.numel(), device=offsets.device)
    return torch.repeat_interleave(rows, counts, output_size=entries)


def _sort(section: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Ends of the first three sections of each row, relative to its start, int64 [rows, 3], and the entries' order."""
    key = row * 4 + section
    counts = torch.zeros(rows * 4, dtype=torch.int64, device=key.device).scatter_add_(0, key, torch.ones_like(key))
    return counts.view(rows, 4)[:, :3].cumsum(1), key.argsort(dim=0, stable=True)


def _valid_tiles(valid: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Whether all and whether any keys of each tile are valid, bool [B, NK]; tokens beyond the end don't count."""
    pad = -valid.shape[1] % block
    whole, some = (
        torch.nn.functional.pad(valid, (0, pad), value=filling).unflatten(1, (-1, block)) for filling in (True, False)
    )
    return whole.all(-1), some.any(-1)


def _decay_of_tiles(problem: Problem, decay: tuple[Tensor, Tensor, Tensor]) -> Tensor:
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
