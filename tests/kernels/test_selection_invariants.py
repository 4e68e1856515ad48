"""What must hold of selections and votes from call to call, on every backend that votes: LiteAttention's invariants."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import math

import pytest
import torch
from dit_accel_kernels import (
    EXACT,
    SKIPPED,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    count_bits,
    pack_bits,
    unpack_bits,
)
from kernel_cases import qkv
from torch import Tensor

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
CRITERIA = [Vote(threshold=-2.0), Vote(criterion="mass", threshold=0.05), Vote(criterion="budget", threshold=0.1)]
VOTES = pytest.mark.parametrize("vote", CRITERIA, ids=lambda x: x.criterion)
NUM_Q, NUM_K, BLOCK, ROWS, TILES = 40, 100, 16, 3, 7  # both sides end in a ragged tile
ALL = torch.ones(1, 2, ROWS, TILES, dtype=torch.bool)


def call(q: Tensor, k: Tensor, v: Tensor, backend: str, selection: Selection | None, **arguments):
    """One call over all tiles of 16."""
    tiles = TileLists.full(q.shape[2], k.shape[2], block_q=BLOCK, block_k=BLOCK)
    return block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=selection, backend=backend, **arguments)


def uneven() -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose tiles of keys differ in how much all queries like them."""
    q, k, v = qkv(1, 2, 1, NUM_Q, NUM_K, 8, torch.float32)
    liking = torch.randn(1, 1, TILES, 1).repeat_interleave(BLOCK, 2)[:, :, :NUM_K]
    return 0.3 * q + 1, 0.3 * k + liking, v


def states(keep: Tensor) -> TileLists:
    """Lists of the tiles whose bit is set."""
    chosen = torch.where(keep, EXACT, SKIPPED).to(torch.uint8).flatten(0, 1)
    return TileLists.from_states(chosen, block_q=BLOCK, block_k=BLOCK, num_q=NUM_Q, num_k=NUM_K)


@BACKENDS
@DIRECTIONS
def test_the_lowest_threshold_drops_nothing(backend, reverse):
    q, k, v = uneven()
    out, kept = call(q, k, v, backend, Selection(vote=Vote(threshold=-math.inf), reverse=reverse))
    assert torch.equal(unpack_bits(kept, TILES), ALL)
    assert torch.equal(out, call(q, k, v, backend, Selection(reverse=reverse)))
    torch.testing.assert_close(out, call(q, k, v, backend, None))


@BACKENDS
@DIRECTIONS
def test_the_highest_threshold_leaves_one_tile_or_the_pinned_ones(backend, reverse):
    q, k, v = uneven()
    pinned = torch.zeros(ROWS, TILES, dtype=torch.bool)
    pinned[1, 2] = pinned[2, 5] = True
    for bits in (None, pack_bits(pinned)):
        keep = pack_bits(ALL)
        expected = torch.zeros_like(ALL) if bits is None else pinned.expand_as(ALL).clone()
        # the ragged last tile has a section of its own, visited last
        expected[..., TILES - 2 if reverse else 0] = True
        for _ in range(2):
            keep = call(
                q, k, v, backend, Selection(keep=keep, pinned=bits, vote=Vote(threshold=math.inf), reverse=reverse)
            )[1]
            assert torch.equal(unpack_bits(keep, TILES), expected)


@BACKENDS
@VOTES
def test_first_calls_and_calls_without_a_vote_are_dense(backend, vote):
    q, k, v = uneven()
    dense, keep = call(q, k, v, backend, None), pack_bits(ALL)
    assert torch.equal(call(q, k, v, backend, Selection(keep=keep, vote=vote))[0], dense)
    assert torch.equal(call(q, k, v, backend, Selection(keep=keep)), dense)
    assert torch.equal(keep, pack_bits(ALL))


@BACKENDS
@VOTES
def test_bits_only_fall_and_a_tile_is_left(backend, vote):
    keep = pack_bits(ALL)
    for step in range(4):
        q, k, v = uneven()
        after = call(q, k, v, backend, Selection(keep=keep, vote=vote, reverse=step % 2 > 0))[1]
        assert not (after & ~keep).any()
        assert (count_bits(after) >= 1).all()
        assert not (after >> TILES).any()  # no bit beyond the tiles
        keep = after
    assert (count_bits(keep) < TILES).any()


@BACKENDS
@VOTES
def test_a_call_uses_the_bits_that_it_was_given(backend, vote):
    """Never those that it makes: its output is that of the given tiles alone, and so on from call to call."""
    keep, (q, k, v) = pack_bits(ALL), uneven()
    for step in range(3):
        found = call(q + 0.1 * step, k, v, backend, Selection(keep=keep, vote=vote), return_tiles=True, return_lse=True)
        assert torch.equal(found[2], keep)
        lists = states(unpack_bits(keep, TILES))
        expected = block_sparse_attention(
            q + 0.1 * step, k, v, lists, layout="bhsd", return_lse=True, backend="reference"
        )
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
        keep = found[3]
    assert (count_bits(keep) < TILES).any()


@BACKENDS
@DIRECTIONS
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_no_row_loses_its_largest_key(backend, reverse, threshold):
    q, k, v = uneven()
    keep = torch.rand(1, 2, ROWS, TILES) < 0.7
    keep[..., 0] = True
    after = call(q, k, v, backend, Selection(keep=pack_bits(keep), vote=Vote(threshold=threshold), reverse=reverse))[1]
    visible = keep.repeat_interleave(BLOCK, 2)[:, :, :NUM_Q].repeat_interleave(BLOCK, 3)[..., :NUM_K]
    largest = (q @ k.mT).masked_fill(~visible, -math.inf).argmax(-1) // BLOCK
    needed = torch.zeros(1, 2, NUM_Q, TILES, dtype=torch.bool).scatter_(-1, largest[..., None], True)
    kept = unpack_bits(after, TILES).repeat_interleave(BLOCK, 2)[:, :, :NUM_Q]
    assert not (needed & ~kept).any()


@BACKENDS
def test_bits_settle_and_a_higher_threshold_drops_more(backend):
    q, k, v = uneven()

    def vote(keep: Tensor, threshold: float, reverse: bool) -> Tensor:
        return call(q, k, v, backend, Selection(keep=keep, vote=Vote(threshold=threshold), reverse=reverse))[1]

    settled = vote(vote(pack_bits(ALL), -2.0, False), -2.0, True)
    assert torch.equal(vote(settled, -2.0, False), settled)
    assert torch.equal(vote(settled, -2.0, True), settled)
    for reverse in (False, True):
        loose, strict = (vote(pack_bits(ALL), threshold, reverse) for threshold in (-4.0, -1.0))
        assert not (strict & ~loose).any()
        assert count_bits(strict).sum() < count_bits(loose).sum()


@BACKENDS
@VOTES
@DIRECTIONS
def test_exactly_the_unlike_tiles_are_dropped(backend, vote, reverse):
    """Keys [+q, -q, -q, +q] with both ends ragged: neither absent rows nor absent keys have a say.

    If they voted, their logits of 0 would keep every tile, and padding would win the last tile's maximum.
    """
    q = torch.full((1, 1, 40, 8), 1.5)
    for signs, length in (([1, -1, -1, 1], 64), ([1, -1, 1, -1], 50)):
        k = (1.5 * torch.tensor(signs)).repeat_interleave(16)[None, None, :length, None].expand(1, 1, length, 8)
        _, kept = call(q, k, k, backend, Selection(vote=vote, reverse=reverse))
        first = 0 if not reverse else 3 if length == 64 else 2  # of the whole tiles
        expected = torch.tensor(signs) > 0
        assert expected[first]
        assert torch.equal(unpack_bits(kept, 4), expected.expand(1, 1, 3, 4))


@BACKENDS
def test_shards_of_keys_join_by_their_lse(backend):
    q, k, v = uneven()
    keep = torch.rand(1, 2, ROWS, TILES) < 0.7
    keep[..., 0] = True
    whole, whole_lse = call(q, k, v, backend, Selection(keep=pack_bits(keep)), return_lse=True)
    outs, lses = [], []
    for tiles in (slice(0, 3), slice(3, TILES)):
        tokens = slice(tiles.start * BLOCK, tiles.stop * BLOCK)
        selection = Selection(keep=pack_bits(keep[..., tiles]), vote=CRITERIA[0])
        out, lse, _ = call(q, k[:, :, tokens], v[:, :, tokens], backend, selection, return_lse=True)
        outs.append(out)
        lses.append(lse)
    lse = torch.stack(lses).logsumexp(0)
    joined = sum(out * (part - lse).exp()[..., None] for out, part in zip(outs, lses, strict=True))
    torch.testing.assert_close(joined, whole)
    torch.testing.assert_close(lse, whole_lse)
