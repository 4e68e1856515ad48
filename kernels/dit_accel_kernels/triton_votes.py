"""Votes on Triton: need bits of visited tiles inside the forward kernel, and the kernel that folds them into kept bits.

The specification is votes.py. A vote decides about the next call only, so the forward's loops need no scalar of it: a
row keeps one bit for each visited tile, in the order of visits, and every 32 tiles the bits of a program's rows are
OR-reduced and stored as one word. The fold then ORs the parts of a block row, looks up which tile each bit is about,
and clears the bits of those that no row needs. LiteAttention (arXiv 2511.11062) decides at every tile, with a
reduction over warps each time.
"""

# Device code is typed by Triton's compiler:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dit_accel_kernels.triton_variants import Variant

BLOCK_V = 256  # visits that the fold looks at together
NUM_WARPS = 4
_INTEGERS = ("stride_gb", "stride_gh", "stride_ib", "stride_ih", "heads", "rows", "words", "step")


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _store_words(words_ptr, index, word, live):
    """One word for the live rows of a program."""
    tl.store(words_ptr + index, tl.reduce(word * live.to(tl.int32), 0, _or))


@triton.jit
def _store_rest(words_ptr, visits, word, live):
    """The last word, where the visited tiles don't fill it."""
    if visits % 32 != 0:
        _store_words(words_ptr, visits // 32, word, live)


@triton.jit
def _vote(
    word, state, spent, turn, top, m, alpha, mass, total, threshold, words_ptr, live,
    VOTE: tl.constexpr, SUBS: tl.constexpr,
):  # fmt: skip
    """Need bits after one more chunk, by row.

    A tile has SUBS chunks; `turn` counts the chunks visited before this one. `top` and `mass` are the chunk's largest
    base-2 logit and its sum of weights, `m` the maximum before it, `alpha` what it shrinks earlier weights by, `total`
    the row sum with it. `state` is the maximum before the tile ("maxgap") or the tile's mass so far, where it takes
    several chunks; `spent` what a row voted down ("budget"). Selects by row are written as sums and products.
    """
    place = turn // SUBS % 32
    if VOTE == "maxgap":
        before = m
        if SUBS > 1:
            state = tl.maximum(state, m + tl.where(turn % SUBS == 0, 0.0, float("-inf")))
            before = state
        word |= (top > before + threshold).to(tl.int32) << place
    else:
        tile = mass
        if SUBS > 1:
            state = state * (alpha * tl.where(turn % SUBS == 0, 0.0, 1.0)) + mass
            tile = state
        last = tl.where(turn % SUBS == SUBS - 1, 1, 0)
        if VOTE == "mass":
            word |= (tile > threshold * total).to(tl.int32) * last << place
        else:
            share = tile / tl.maximum(total, 1.1754943508222875e-38)
            need = (spent + share > threshold).to(tl.int32)
            word |= need * last << place
            spent += share * ((1 - need) * last).to(tl.float32)
    rest = (turn + 1) % (32 * SUBS)
    if rest == 0:
        _store_words(words_ptr, turn // (32 * SUBS), word, live)
    return word * tl.where(rest == 0, 0, 1), state, spent


@triton.jit(do_not_specialize=_INTEGERS)
def _fold_kernel(
    words_ptr, indices_ptr, bounds_ptr, pinned_ptr, kept_ptr,  # int32; pinned [NQ, W] or None, kept [B, H, NQ, W]
    stride_gb, stride_gh, stride_ib, stride_ih, heads, rows, words, step,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clear the kept bits of the tiles of one block row that no part needs, the first visited and pinned ones aside."""
    lane, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    b, h = lane // heads, lane % heads
    place = tl.program_id(0).to(tl.int64)
    bounds_ptr += ((b * stride_gb + h * stride_gh).to(tl.int64) * rows + row) * 6
    start, end_plain = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
    end_constant, end_slow = tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
    indices_ptr += b.to(tl.int64) * stride_ib + h.to(tl.int64) * stride_ih
    words_ptr += place * PARTS * words
    kept_ptr += place * words
    for first in range(0, end_slow - start, BLOCK):
        visit = first + tl.arange(0, BLOCK)
        inside = visit < end_slow - start
        need = tl.zeros([BLOCK], tl.int32)
        for part in tl.static_range(PARTS):
            need |= tl.load(words_ptr + part * words + visit // 32, mask=inside, other=0) >> visit % 32
        position = start + visit
        if step < 0:  # each section from its end
            begin = tl.where(position < end_plain, start, tl.where(position < end_constant, end_plain, end_constant))
            end = tl.where(position < end_plain, end_plain, tl.where(position < end_constant, end_constant, end_slow))
            position = begin + end - 1 - position
        tile = tl.load(indices_ptr + position, mask=inside, other=0)
        down = inside & (visit > 0) & (need % 2 == 0)
        if pinned_ptr is not None:
            pinned = tl.load(pinned_ptr + row.to(tl.int64) * words + tile // 32, mask=down, other=0)
            down &= (pinned >> tile % 32) % 2 == 0
        tl.atomic_and(kept_ptr + tile // 32, ~(1 << tile % 32), mask=down, sem="relaxed")


def fold(
    kept: Tensor, words: Tensor, indices: Tensor, bounds: Tensor, pinned: Tensor | None, strides: tuple[int, ...],
    *, reverse: bool,
) -> None:  # fmt: skip
    """Write the votes of a call into `kept`.

    Args:
        kept: int32 [B, H, NQ, W], the bits before the call; changed in place.
        words: int32 [B, H, NQ, parts, W], need bits in the order of visits.
        indices: int32, the key tiles of the lists that the call read.
        bounds: int32 [*, NQ, 6], as in a RowPlan.
        pinned: int32 [NQ, W] or None.
        strides: of batch and head in the list sets of `bounds`, then in `indices`.
        reverse: the call visited each section from its end.
    """
    batch, heads, rows, parts, width = words.shape
    _fold_kernel[(batch * heads * rows,)](
        words, indices, bounds, pinned, kept, *strides, heads, rows, width, -1 if reverse else 1,
        PARTS=parts, BLOCK=BLOCK_V, num_warps=NUM_WARPS,
    )  # fmt: skip


def variants() -> list[Variant]:
    """The fold of the kept bits, with pinned tiles, in one part and in two; it has no product."""
    pointers = ("words_ptr", "indices_ptr", "bounds_ptr", "pinned_ptr", "kept_ptr")
    signature = {**dict.fromkeys(pointers, "*i32:16"), **dict.fromkeys(_INTEGERS, "i32")}
    return [
        Variant(
            f"fold-{parts}", _fold_kernel, signature, {"PARTS": parts, "BLOCK": BLOCK_V}, NUM_WARPS, 1, hot_loop=False
        )
        for parts in (1, 2)
    ]
