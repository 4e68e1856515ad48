"""Votes on Triton: need bits of visited tiles inside the forward kernel, and the kernel that folds them into kept bits.

The specification is votes.py. A vote decides about the next call only: a row keeps one bit for each visited tile, the
sign of a difference shifted in from the right (one instruction), and every 32 tiles the bits of a program's rows are
OR-reduced and stored as one word, whose highest bit is the first visit. The fold then ORs the parts of a query tile and
clears the bits of tiles that no row needs. LiteAttention (arXiv 2511.11062) reduces over warps at every tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from .expand import bits_of_lists
from .plan import RowPlan

BLOCK_V = 256  # visits that the fold looks at together
_INTEGERS = ("stride_gb", "stride_gh", "stride_ib", "stride_ih", "heads", "q_tiles", "words", "step")


@triton.jit
def _sections(bounds_ptr):
    """Where a row's list starts, 64-bit, and the ends of its sections from there, which 32 bits hold times a tile."""
    start = tl.load(bounds_ptr)
    end_plain, end_constant, end_slow = tl.load(bounds_ptr + 1), tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
    return start, (end_plain - start).to(tl.int32), (end_constant - start).to(tl.int32), (end_slow - start).to(tl.int32)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _store_words(words_ptr, index, word, live):
    """One word for the live rows of a program."""
    tl.store(words_ptr + index, tl.reduce(word * live.to(tl.uint32), 0, _or).to(tl.int32, bitcast=True))


@triton.jit
def _store_rest(words_ptr, visits, word, live):
    """The last word, where the visited tiles don't fill it."""
    if visits % 32 != 0:
        _store_words(words_ptr, visits // 32, word << (32 - visits % 32).to(tl.uint32), live)


@triton.jit
def _slack(state, limit, total, threshold, VOTE: tl.constexpr, MASKED: tl.constexpr):
    """What rows could miss and still not need a tile, negative where they need it; and what is left of the limit.

    `state` and `limit` are as in _vote after the tile, `total` the row sum with it. Without MASKED every row has a key
    in every chunk.
    """
    if VOTE == "maxgap":
        if MASKED:  # a difference of two infinities may have any sign
            return tl.where(state > limit, -1.0, 1.0), limit
        return limit - state, limit
    if VOTE == "mass":
        return threshold * total - state, limit
    if MASKED:
        total = tl.maximum(total, 1.1754943508222875e-38)
    root = tl.rsqrt(total)  # one instruction where a division takes many
    slack = limit - state * root * root
    bits = tl.minimum(slack.to(tl.uint32, bitcast=True), limit.to(tl.uint32, bitcast=True))  # `limit` if slack < 0
    return slack, bits.to(tl.float32, bitcast=True)


@triton.jit
def _settle(word, slack, tile, words_ptr, live):
    """The word with the bit of visit `tile` shifted in, the sign of its slack; stored where it is full."""
    word = (word << 1) | (slack.to(tl.uint32, bitcast=True) >> 31)
    if (tile & 31) == 31:
        _store_words(words_ptr, tile >> 5, word, live)
    return word


@triton.jit
def _begin(limit, m, threshold, VOTE: tl.constexpr):
    """`state` and `limit`, as in _vote, before the first chunk of a tile."""
    if VOTE == "maxgap":
        bar = m + threshold
        return bar, bar
    return tl.zeros(m.shape, tl.float32), limit


@triton.jit
def _vote(
    word, state, limit, first, n, top, m, m_new, alpha, mass, total, threshold, words_ptr, live,
    VOTE: tl.constexpr, SUBS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Need bits, state and budget after chunk n of a loop whose first tile is visit `first`.

    A tile has SUBS chunks; `top` and `mass` are the chunk's largest base-2 logit and sum of weights, `m` and `m_new`
    the maximum before and after it, `alpha` what it shrinks earlier weights by, `total` the row sum with it. "maxgap":
    `limit` is the bar that the tile's largest logit must exceed, `state` the higher of both so far. "mass", "budget":
    `state` is the tile's mass so far, `limit` the share that a row may still vote down. Where a tile takes several
    chunks, all that is not their sum or maximum waits for the last one, behind a branch.
    """
    if SUBS == 1:
        if VOTE == "maxgap":
            limit = m + threshold
        slack, limit = _slack(top if VOTE == "maxgap" else mass, limit, total, threshold, VOTE, MASKED)
        word = _settle(word, slack, first + n, words_ptr, live)
    else:
        state = tl.maximum(state, top) if VOTE == "maxgap" else state * alpha + mass
        if n % SUBS == SUBS - 1:
            slack, limit = _slack(state, limit, total, threshold, VOTE, MASKED)
            word = _settle(word, slack, first + n // SUBS, words_ptr, live)
            if VOTE == "maxgap":
                state, limit = _begin(limit, m_new, threshold, VOTE)
            else:
                state -= state  # not a constant, which would become a select in every turn
    return word, state, limit


@triton.jit(do_not_specialize=_INTEGERS)
def _fold_kernel(
    words_ptr, indices_ptr, bounds_ptr, pinned_ptr, kept_ptr,  # int32; pinned [NQ, W] or None, kept [B, H, NQ, W]
    stride_gb, stride_gh, stride_ib, stride_ih, heads, q_tiles, words, step,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clear the kept bits of what no part of one query tile needs, the first visited and pinned key tiles aside."""
    bh, q_tile = tl.program_id(0) // q_tiles, tl.program_id(0) % q_tiles
    b, h = bh // heads, bh % heads
    program = tl.program_id(0).to(tl.int64)
    bounds_ptr += ((b * stride_gb + h * stride_gh).to(tl.int64) * q_tiles + q_tile) * 6
    start, end_plain, end_constant, end_slow = _sections(bounds_ptr)
    indices_ptr += start + b.to(tl.int64) * stride_ib + h.to(tl.int64) * stride_ih
    words_ptr += program * PARTS * words
    kept_ptr += program * words
    for first in range(0, end_slow, BLOCK):
        visit = first + tl.arange(0, BLOCK)
        inside = visit < end_slow
        need = tl.zeros([BLOCK], tl.int32)
        for part in tl.static_range(PARTS):
            need |= tl.load(words_ptr + part * words + visit // 32, mask=inside, other=0) >> 31 - visit % 32
        position = visit
        if step < 0:  # each section from its end
            begin = tl.where(visit < end_plain, 0, tl.where(visit < end_constant, end_plain, end_constant))
            end = tl.where(visit < end_plain, end_plain, tl.where(visit < end_constant, end_constant, end_slow))
            position = begin + end - 1 - visit
        k_tile = tl.load(indices_ptr + position, mask=inside, other=0)
        down = inside & (visit > 0) & (need % 2 == 0)
        if pinned_ptr is not None:
            pinned = tl.load(pinned_ptr + q_tile.to(tl.int64) * words + k_tile // 32, mask=down, other=0)
            down &= (pinned >> k_tile % 32) % 2 == 0
        tl.atomic_and(kept_ptr + k_tile // 32, ~(1 << k_tile % 32), mask=down, sem="relaxed")


def fold(problem: Problem, plan: RowPlan, words: Tensor) -> Tensor:
    """The bits of the next call, int32 [B, H, NQ, W]: those of this one, less what its votes leave out.

    `plan`: the lists that the forward read; `words` int32 [B, H, NQ, parts, W]: the need bits that it left, in the
    order of visits, the first in the highest bit.
    """
    selection = problem.selection
    assert selection is not None
    keep = selection.keep
    kept = bits_of_lists(problem) if keep is None else keep.clone(memory_format=torch.contiguous_format)
    batch, heads, q_tiles, parts, width = words.shape
    strides = (*plan.strides, 0, 0) if plan.entry_strides is None else (heads, 1, *plan.entry_strides)
    pinned = None if selection.pinned is None else selection.pinned.contiguous()
    _fold_kernel[(batch * heads * q_tiles,)](
        words, plan.indices, plan.bounds, pinned, kept, *strides, heads, q_tiles, width,
        -1 if selection.reverse else 1, PARTS=parts, BLOCK=BLOCK_V,
    )  # fmt: skip
    return kept
