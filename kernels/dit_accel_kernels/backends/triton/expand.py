"""Selections on Triton: what keep bits and routing leave of a plan's lists, compacted for every batch and head.

One launch, no sync and no sort: a program reads a query tile of the static plan (plan.py), in which the order of
the three sections and of the entries stays, and writes what is left to the same places of a scratch that has room for
the whole plan, once for every batch and head that shares its lists. The exact tiles also leave as bits, and the pooled
ones as nothing else: those of the lists and those that a selection adds.
"""

# Device code is typed by Triton's compiler:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bits import words_of
from ...problem import Problem, by_head
from .plan import RowPlan
from .transpose import ColumnPlan, bits_of

BLOCK = 512  # list entries that are looked at together
BLOCK_COLUMNS = 256  # of a key tile's list, where 512 spill registers on Ampere
NUM_WARPS = 4


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Lists:
    """What the forward reads: lists of a plan, or those of every batch and head.

    `indices`, `entry_t` and `bounds` are as in a RowPlan; `bounds` is int64 [B*H, NQ, 6] where every batch and head has
    its own lists, relative to b * strides[0] + h * strides[1] in the exact entries. `strides` is None where lists are
    the plan's. `pooled_bits` int32 [*, NQ, W]: the pooled tiles as bits, None where a call has none; `pooled_strides`
    of batch and head over its sets, None where lists are the plan's and nothing is pooled.
    """

    indices: Tensor
    entry_t: Tensor | None
    bounds: Tensor
    pooled_bits: Tensor | None
    strides: tuple[int, int] | None
    pooled_strides: tuple[int, int] | None


@triton.jit
def _stays(k_tile, inside, keep_ptr, pinned_ptr, route_ptr):
    """Which tiles of a query tile stay exact, of those inside."""
    word = tl.full(k_tile.shape, -1, tl.int32)
    if keep_ptr is not None:
        word &= tl.load(keep_ptr + k_tile // 32, mask=inside, other=0)
    if route_ptr is not None:
        word &= tl.load(route_ptr + k_tile // 32, mask=inside, other=0)
    if pinned_ptr is not None:
        word |= tl.load(pinned_ptr + k_tile // 32, mask=inside, other=0)
    return inside & ((word >> k_tile % 32) & 1 != 0)


@triton.jit
def _append(out_ptr, end, value, chosen):
    """Write the chosen values one after another from `end` on; the new end, and where the values went."""
    count = chosen.to(tl.int32)
    position = end + tl.cumsum(count, 0) - 1
    tl.store(out_ptr + position, value, mask=chosen)
    return end + tl.sum(count, 0), position


_INTEGERS = (
    "stride_gb", "stride_gh", "stride_sb", "stride_sh", "stride_ib", "stride_ih", "heads", "q_tiles", "words",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def _expand_kernel(
    indices_ptr, bounds_ptr, entry_t_ptr,  # the plan's; the last or None
    static_ptr, pooled_ptr,  # bits [G, NQ, W] of the exact and pooled lists; the last or None
    keep_ptr, pinned_ptr, route_ptr,  # bits [B, H, NQ, W], [NQ, W], [B, H, NQ, W], or None
    out_ptr, out_bounds_ptr, out_t_ptr, out_pooled_ptr, exact_ptr,
    stride_gb, stride_gh, stride_sb, stride_sh, stride_ib, stride_ih, heads, q_tiles, words,
    POOL_REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists and bits of one query tile of one head; strides are those of Lists, and of list sets before them."""
    bh, q_tile = tl.program_id(0) // q_tiles, tl.program_id(0) % q_tiles
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    bounds_ptr += ((b * stride_gb + h * stride_gh) * q_tiles + q_tile) * 6
    row = ((b * stride_sb + h * stride_sh) * q_tiles + q_tile) * words
    static_ptr += row
    if pooled_ptr is not None:
        pooled_ptr += row
    out_bounds_ptr += program * 6
    exact_ptr += program * words
    if keep_ptr is not None:
        keep_ptr += program * words
    if pinned_ptr is not None:
        pinned_ptr += q_tile.to(tl.int64) * words
    if route_ptr is not None:
        route_ptr += program * words
    if out_pooled_ptr is not None:
        out_pooled_ptr += program * words
    pooled_first, pooled_end = words, 0
    for first in range(0, words, 32):
        word = first + tl.arange(0, 32)
        inside = word < words
        exact = tl.load(static_ptr + word, mask=inside, other=0)
        pinned = tl.zeros([32], tl.int32)
        if pinned_ptr is not None:
            pinned = tl.load(pinned_ptr + word, mask=inside, other=0)
        stays = exact
        if keep_ptr is not None:
            stays &= tl.load(keep_ptr + word, mask=inside, other=0) | pinned
            if not POOL_REST:
                exact = stays
        if route_ptr is not None:
            stays &= tl.load(route_ptr + word, mask=inside, other=0) | pinned
        tl.store(exact_ptr + word, stays, mask=inside)
        if out_pooled_ptr is not None:
            pooled = exact & ~stays
            if pooled_ptr is not None:
                pooled |= tl.load(pooled_ptr + word, mask=inside, other=0)
            tl.store(out_pooled_ptr + word, pooled, mask=inside)
            pooled_first = tl.minimum(pooled_first, tl.min(tl.where(pooled != 0, word, words), 0))
            pooled_end = tl.maximum(pooled_end, tl.max(tl.where(pooled != 0, word + 1, 0), 0))

    begin = tl.load(bounds_ptr)
    out_ptr += b * stride_ib + h * stride_ih
    if entry_t_ptr is not None:
        out_t_ptr += b * stride_ib + h * stride_ih
    end = begin
    tl.store(out_bounds_ptr, begin)
    tl.store(out_bounds_ptr + 4, tl.minimum(pooled_first, pooled_end).to(tl.int64) * 32)
    tl.store(out_bounds_ptr + 5, tl.cast(pooled_end, tl.int64) * 32)
    for section in tl.static_range(3):
        section_end = tl.load(bounds_ptr + 1 + section)
        for first in range(begin, section_end, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            inside = entry < section_end
            k_tile = tl.load(indices_ptr + entry, mask=inside, other=0)
            stays = _stays(k_tile, inside, keep_ptr, pinned_ptr, route_ptr)
            end, to = _append(out_ptr, end, k_tile, stays)
            if entry_t_ptr is not None:
                tl.store(out_t_ptr + to, tl.load(entry_t_ptr + entry, mask=inside, other=1.0), mask=stays)
        tl.store(out_bounds_ptr + 1 + section, end)
        begin = section_end


def static_lists(problem: Problem, plan: RowPlan) -> Lists:
    """The plan's own lists, for calls that narrow nothing."""
    return Lists(
        indices=plan.indices,
        entry_t=plan.entry_t,
        bounds=plan.bounds,
        pooled_bits=_pooled_bits(problem),
        strides=None,
        pooled_strides=None if problem.pooled_indices is None else plan.list_strides,
    )


def _pooled_bits(problem: Problem) -> Tensor | None:
    """The pooled lists as bits int32 [G, NQ, W]; None without any."""
    offsets, indices = problem.pooled_offsets, problem.pooled_indices
    return None if offsets is None or indices is None else bits_of(offsets, indices, problem.key_tiles)


def _exact_bits(problem: Problem) -> Tensor:
    return bits_of(problem.exact_offsets, problem.exact_indices, problem.key_tiles)


def bits_of_lists(problem: Problem) -> Tensor:
    """A copy of the exact lists as bits of every batch and head, int32 [B, H, NQ, W]."""
    batch, heads = problem.q.shape[:2]
    bits = by_head(_exact_bits(problem), heads).expand(batch, heads, -1, -1)
    return bits.clone(memory_format=torch.contiguous_format)


def expand(problem: Problem, plan: RowPlan, routed: Tensor | None) -> tuple[Lists, Tensor]:
    """Lists of every batch and head of a call with keep bits or routing, and its exact tiles as bits [B, H, NQ, W].

    `routed` int32 [B, H, NQ, W]: the tiles above their threshold, None without routing.
    """
    selection = problem.selection
    assert selection is not None
    batch, heads, q_tiles = *problem.q.shape[:2], problem.query_tiles
    words = words_of(problem.key_tiles)
    keep = None if selection.keep is None else selection.keep.contiguous()
    pinned = None if selection.pinned is None else selection.pinned.contiguous()
    (stride_b, stride_h), copies = _copies(*plan.strides, batch, heads)
    entries = plan.indices.numel() - 2
    indices = plan.indices.new_empty(copies * entries + 2)
    entry_t = None if plan.entry_t is None else plan.entry_t.new_empty(copies * entries + 2)
    strides = (stride_b * entries, stride_h * entries)
    bounds = plan.bounds.new_empty(batch * heads, q_tiles, 6)
    exact = indices.new_empty(batch, heads, q_tiles, words)
    pooled = torch.empty_like(exact) if problem.may_pool else None
    _expand_kernel[(batch * heads * q_tiles,)](
        plan.indices, plan.bounds, plan.entry_t, _exact_bits(problem), _pooled_bits(problem), keep, pinned, routed,
        indices, bounds, entry_t, pooled, exact, *plan.strides, *plan.list_strides, *strides, heads, q_tiles, words,
        POOL_REST=selection.rest == "pooled", BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    lists = Lists(
        indices=indices, entry_t=entry_t, bounds=bounds, pooled_bits=pooled, strides=strides, pooled_strides=(heads, 1)
    )
    return lists, exact


@triton.jit(
    do_not_specialize=("stride_gb", "stride_gh", "stride_ib", "stride_ih", "heads", "q_tiles", "k_tiles", "words")
)
def _expand_columns_kernel(
    q_tiles_ptr, bounds_ptr, entry_t_ptr, exact_ptr,  # as in ColumnPlan, the third or None; bits [B, H, NQ, W]
    out_q_tiles_ptr, out_bounds_ptr, out_t_ptr, stride_gb, stride_gh, stride_ib, stride_ih,
    heads, q_tiles, k_tiles, words, BLOCK: tl.constexpr,
):  # fmt: skip
    """The query tiles of one key tile of one head in which it is exact."""
    bh, k_tile = tl.program_id(0) // k_tiles, tl.program_id(0) % k_tiles
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    bounds_ptr += ((b * stride_gb + h * stride_gh) * k_tiles + k_tile) * 3
    out_bounds_ptr += tl.program_id(0).to(tl.int64) * 3
    exact_ptr += bh.to(tl.int64) * q_tiles * words + k_tile // 32
    out_q_tiles_ptr += b * stride_ib + h * stride_ih
    if entry_t_ptr is not None:
        out_t_ptr += b * stride_ib + h * stride_ih
    begin = tl.load(bounds_ptr)
    end = begin
    tl.store(out_bounds_ptr, begin)
    for section in tl.static_range(2):
        section_end = tl.load(bounds_ptr + 1 + section)
        for first in range(begin, section_end, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            inside = entry < section_end
            q_tile = tl.load(q_tiles_ptr + entry, mask=inside, other=0)
            stays = inside & ((tl.load(exact_ptr + q_tile * words, mask=inside, other=0) >> k_tile % 32) & 1 != 0)
            end, to = _append(out_q_tiles_ptr, end, q_tile, stays)
            if entry_t_ptr is not None:
                tl.store(out_t_ptr + to, tl.load(entry_t_ptr + entry, mask=inside, other=1.0), mask=stays)
        tl.store(out_bounds_ptr + 1 + section, end)
        begin = section_end


def expand_columns(problem: Problem, plan: ColumnPlan, exact: Tensor) -> ColumnPlan:
    """What is left of a plan by key tile in a call whose exact tiles are these, for every batch and head.

    `exact` int32 [B, H, NQ, W], as `expand` returns it.
    """
    batch, heads, q_tiles, words = exact.shape
    k_tiles, entries = problem.key_tiles, plan.q_tiles.numel()
    (stride_b, stride_h), copies = _copies(*plan.strides, batch, heads)
    strides = (stride_b * entries, stride_h * entries)
    rest = plan.q_tiles.new_empty(copies * entries)
    entry_t = None if plan.entry_t is None else plan.entry_t.new_empty(copies * entries)
    bounds = plan.bounds.new_empty(batch * heads, k_tiles, 3)
    _expand_columns_kernel[(batch * heads * k_tiles,)](
        plan.q_tiles, plan.bounds, plan.entry_t, exact, rest, bounds, entry_t, *plan.strides, *strides,
        heads, q_tiles, k_tiles, words, BLOCK=BLOCK_COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return replace(plan, q_tiles=rest, bounds=bounds, entry_t=entry_t, strides=(heads, 1), entry_strides=strides)


def _copies(stride_b: int, stride_h: int, batch: int, heads: int) -> tuple[tuple[int, int], int]:
    """Copies of a list that batches and heads need which share it: strides of batch and head, and how many."""
    share_b, share_h = not stride_b, not stride_h
    of_head = heads if share_h else 1
    return (of_head if share_b else 0, int(share_h)), (batch if share_b else 1) * of_head
