"""Selections on Triton: what keep bits and routing leave of a plan's lists, compacted for every batch and head.

One launch, no sync and no sort: a program reads a query tile of the static plan (plan.py) and writes what is left, in
the same order, to the same places of a scratch that has room for the whole plan, once for every batch and head that
shares its lists. The exact tiles also leave as bits, and the pooled ones as nothing else.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...bits import word_count
from ...problem import Problem, by_head
from .loads import _from
from .plan import ColumnPlan, RowPlan, bits_of

BLOCK = 512  # list entries that are looked at together
BLOCK_COLUMNS = 256  # of a key tile's list, where 512 spill registers on Ampere


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
def _append(out_ptr, out_t_ptr, end, tile, entry_t_ptr, entry, inside, chosen):
    """Write the chosen tiles, and their entries' t, one after another from `end` on; the new end."""
    count = chosen.to(tl.int32)
    to = end + tl.cumsum(count, 0) - 1
    tl.store(out_ptr + to, tile, mask=chosen)
    end += tl.sum(count, 0)
    if entry_t_ptr is not None:
        tl.store(out_t_ptr + to, tl.load(entry_t_ptr + entry, mask=inside, other=1.0), mask=chosen)
    return end


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
    """Lists and bits of one query tile of one head, with a RowPlan's strides: those of bits are the call's lists'."""
    bh, q_tile = tl.program_id(0) // q_tiles, tl.program_id(0) % q_tiles
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    bounds_ptr += ((b * stride_gb + h * stride_gh) * q_tiles + q_tile) * 6
    row = ((b * stride_sb + h * stride_sh) * q_tiles + q_tile) * words
    static_ptr, pooled_ptr = static_ptr + row, _from(pooled_ptr, row)
    out_bounds_ptr += program * 6
    exact_ptr += program * words
    keep_ptr, pinned_ptr = _from(keep_ptr, program * words), _from(pinned_ptr, q_tile.to(tl.int64) * words)
    route_ptr, out_pooled_ptr = _from(route_ptr, program * words), _from(out_pooled_ptr, program * words)
    pooled_first, pooled_end = words, 0
    for first in range(0, words, 32):
        word = first + tl.arange(0, 32)
        inside = word < words
        exact = tl.load(static_ptr + word, mask=inside, other=0)
        pinned = tl.load(pinned_ptr + word, mask=inside, other=0) if pinned_ptr is not None else 0
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
    out_t_ptr = _from(out_t_ptr, b * stride_ib + h * stride_ih)
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
            end = _append(out_ptr, out_t_ptr, end, k_tile, entry_t_ptr, entry, inside, stays)
        tl.store(out_bounds_ptr + 1 + section, end)
        begin = section_end


def bits_of_lists(problem: Problem) -> Tensor:
    """A copy of the exact lists as bits of every batch and head, int32 [B, H, NQ, W]."""
    batch, heads = problem.q.shape[:2]
    bits = by_head(bits_of(problem.exact_offsets, problem.exact_indices, problem.key_tiles), heads)
    return bits.expand(batch, heads, -1, -1).clone(memory_format=torch.contiguous_format)


def expand(problem: Problem, plan: RowPlan, routed: Tensor | None) -> tuple[RowPlan, Tensor]:
    """The plan with lists of every batch and head, of a call with keep bits or routing, and its exact tiles as bits.

    `routed` and the exact tiles int32 [B, H, NQ, W]: the tiles above their threshold, None without routing.
    """
    selection = problem.selection
    assert selection is not None
    batch, heads, q_tiles = *problem.q.shape[:2], problem.query_tiles
    given = (selection.keep, selection.pinned, routed)
    keep, pinned, routed = (None if x is None else x.contiguous() for x in given)
    strides, room = _room(plan.strides, plan.indices.numel(), batch, heads)
    indices = plan.indices.new_empty(room)
    entry_t = None if plan.entry_t is None else plan.entry_t.new_empty(room)
    bounds = plan.bounds.new_empty(batch * heads, q_tiles, 6)
    exact = indices.new_empty(batch, heads, q_tiles, word_count(problem.key_tiles))
    pooled = torch.empty_like(exact) if problem.may_pool else None
    static = bits_of(problem.exact_offsets, problem.exact_indices, problem.key_tiles)
    _expand_kernel[(batch * heads * q_tiles,)](
        plan.indices, plan.bounds, plan.entry_t, static, plan.pooled_bits, keep, pinned, routed,
        indices, bounds, entry_t, pooled, exact, *plan.strides, *plan.pooled_strides, *strides,
        heads, q_tiles, exact.shape[3], POOL_REST=selection.rest == "pooled", BLOCK=BLOCK,
    )  # fmt: skip
    return replace(
        plan, indices=indices, entry_t=entry_t, bounds=bounds, pooled_bits=pooled, entry_strides=strides,
        pooled_strides=(heads, 1),
    ), exact  # fmt: skip


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
    out_t_ptr = _from(out_t_ptr, b * stride_ib + h * stride_ih)
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
            end = _append(out_q_tiles_ptr, out_t_ptr, end, q_tile, entry_t_ptr, entry, inside, stays)
        tl.store(out_bounds_ptr + 1 + section, end)
        begin = section_end


def expand_columns(problem: Problem, plan: ColumnPlan, exact: Tensor) -> ColumnPlan:
    """What is left of a plan by key tile in a call whose exact tiles are these, for every batch and head.

    `exact` int32 [B, H, NQ, W], as `expand` returns it.
    """
    batch, heads, q_tiles, words = exact.shape
    k_tiles = problem.key_tiles
    strides, room = _room(plan.strides, plan.q_tiles.numel(), batch, heads)
    rest = plan.q_tiles.new_empty(room)
    entry_t = None if plan.entry_t is None else plan.entry_t.new_empty(room)
    bounds = plan.bounds.new_empty(batch * heads, k_tiles, 3)
    _expand_columns_kernel[(batch * heads * k_tiles,)](
        plan.q_tiles, plan.bounds, plan.entry_t, exact, rest, bounds, entry_t, *plan.strides, *strides,
        heads, q_tiles, k_tiles, words, BLOCK=BLOCK_COLUMNS,
    )  # fmt: skip
    return replace(plan, q_tiles=rest, bounds=bounds, entry_t=entry_t, strides=(heads, 1), entry_strides=strides)


def _room(strides: tuple[int, int], entries: int, batch: int, heads: int) -> tuple[tuple[int, int], int]:
    """Room for lists of every batch and head, from strides over sets that they share: strides in entries, and size.

    A batch or head with lists of its own needs no copy of them.
    """
    batch_shares, head_shares = strides[0] == 0, strides[1] == 0
    of_batch = entries * heads if head_shares else entries
    return (of_batch if batch_shares else 0, entries if head_shares else 0), of_batch * (batch if batch_shares else 1)
