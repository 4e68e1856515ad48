"""What votes guarantee from call to call, on every backend: the invariants of LiteAttention (arXiv 2511.11062).

Tests bear the invariants' numbers. What runs above single calls goes by the same: layers, branches and resets (12) in
tests/core/test_lite_method.py, compiled blocks (14) in tests/pipelines/test_attach.py, replay of CUDA graphs (14),
which needs a card, in test_no_sync.py.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
import vote_calls as votes
from dit_accel_kernels import FrameDecay, Selection, Vote, count_bits, pack_bits
from hypothesis import strategies as st
from kernel_cases import attend, full
from numpy_attention import Attention, Case
from torch import Tensor
from vote_calls import ALL, BLOCK, COUNT, CRITERIA, DIRECTIONS, EVERY, NUM_K, NUM_Q, SCALE, SEEDS, TILES, VOTES, WIDE

OF_MASS = st.sampled_from(["mass", "budget"])


def dense(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all tiles without a selection."""
    return attend(q, k, v, TILES, scale=SCALE, backend=backend)


def same(backend: str, found: Tensor, expected: Tensor) -> None:
    """Bit for bit; to rounding on torch, where votes take another path than lists do."""
    if backend == "torch":
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


@EVERY
@DIRECTIONS
def test_1_no_threshold_drops_nothing(backend, reverse):
    q, k, v = votes.inputs(backend, 0, spread=20.0)
    out, lse, bits = votes.call(backend, q, k, v, vote=Vote(threshold=-math.inf), reverse=reverse)
    assert torch.equal(bits, ALL)
    same(backend, out, votes.call(backend, q, k, v, reverse=reverse)[0])
    torch.testing.assert_close(out, dense(backend, q, k, v))
    torch.testing.assert_close(lse, votes.logits(q, k).mul(math.log(2)).logsumexp(-1).to(lse.dtype))


@EVERY
@DIRECTIONS
def test_2_an_endless_threshold_leaves_one_tile_and_the_pinned(backend, reverse):
    q, k, v = votes.inputs(backend, 0)
    vote, first = Vote(threshold=math.inf), torch.zeros_like(ALL)
    first[..., COUNT - 2 if reverse else 0] = True  # the ragged tile comes last in both directions
    bits = votes.call(backend, q, k, v, vote=vote, reverse=reverse)[2]
    assert torch.equal(bits, first)
    still = partial(votes.call, backend, q * 0, k, v, reverse=reverse)  # what is as large as a threshold isn't above it
    assert torch.equal(still(vote=Vote(threshold=0.0))[2], first)
    half = still(vote=Vote(criterion="budget", threshold=0.5))[2]
    assert torch.equal(half, torch.tensor([True, False, True, True]).expand_as(ALL))
    for back in (False, True):
        assert torch.equal(votes.call(backend, q, k, v, keep=bits, vote=vote, reverse=back)[2], bits)
    pinned = torch.tensor([[False, True, False, True], [False] * 4])
    bits = votes.call(backend, q, k, v, pinned=pinned, vote=vote, reverse=reverse)[2]
    assert torch.equal(bits, first | pinned)
    assert torch.equal(votes.call(backend, q, k, v, keep=bits, pinned=pinned, vote=vote, reverse=reverse)[2], bits)


@EVERY
@VOTES
def test_3_the_first_call_is_dense_and_a_call_without_a_vote_leaves_the_bits(backend, vote):
    q, k, v = votes.inputs(backend, 0)
    keep = pack_bits(ALL)
    voted = attend(q, k, v, TILES, scale=SCALE, backend=backend, selection=Selection(keep=keep, vote=vote))
    expected = dense(backend, q, k, v)
    same(backend, voted[0], expected)
    assert torch.equal(keep, pack_bits(ALL))
    found = votes.call(backend, q, k, v, keep=ALL)
    same(backend, found[0], expected)
    assert len(found) == 2  # no bits


@EVERY
@VOTES
def test_4_bits_only_fall_one_tile_stays_and_none_lies_beyond_the_last(backend, vote):
    keep = pack_bits(ALL)
    for step in range(3):
        q, k, v = votes.inputs(backend, 5 + step)
        selection = Selection(keep=keep, vote=vote, reverse=step % 2 > 0)
        after = attend(q, k, v, TILES, scale=SCALE, backend=backend, selection=selection)[1]
        assert not (after & ~keep).any()
        assert (count_bits(after) >= 1).all()
        assert not (after >> COUNT).any()
        keep = after
    assert (count_bits(keep) < COUNT).any()


@DIRECTIONS
@VOTES
def test_6_tiles_are_visited_by_section_where_all_of_them_are_whole(reverse, vote):
    """Pairs without decay come first, whichever way the tiles are gone through: as numpy votes, tile by tile."""
    frames = torch.tensor([0, 2, 0], dtype=torch.int32).repeat_interleave(BLOCK)
    decay = FrameDecay(table=torch.tensor([1.0, 1.0, 0.3]), q_frames=frames[:NUM_Q], k_frames=frames)
    tiles, kept = full(NUM_Q, 3 * BLOCK, BLOCK), []
    for seed in range(4):
        q, k, v = votes.inputs("reference", seed)
        k, v = k[:, :, : 3 * BLOCK], v[:, :, : 3 * BLOCK]
        options = dict(tiles=tiles, keep=ALL[..., :3], vote=vote, reverse=reverse, decay=decay)
        bits = [votes.call(backend, q, k, v, **options)[2] for backend in ("reference", "torch")]
        arrays = Case(
            q=q.double().numpy(), k=k.double().numpy(), v=v.double().numpy(), states=tiles.states().numpy(),
            block_q=BLOCK, block_k=BLOCK, scale=SCALE, table=decay.table.double().numpy(),
            q_frames=decay.q_frames.numpy(), k_frames=decay.k_frames.numpy(), vote=(vote.criterion, vote.threshold),
            reverse=reverse,
        )  # fmt: skip
        expected = Attention(arrays).kept(np.ones((*q.shape[:2], *tiles.states().shape[1:]), bool))
        for found in bits:
            assert np.array_equal(found.numpy(), expected)
        kept.append(bits[0])
    assert not torch.stack(kept).all()


@EVERY
@DIRECTIONS
@pytest.mark.parametrize("vote", [Vote(threshold=0.0), Vote(threshold=-1.0), Vote(criterion="mass", threshold=0.01)])
def test_7_no_row_loses_its_largest_key(backend, reverse, vote):
    """Though every second row sees the others' least keys first, beside which theirs weigh nothing at all."""
    q, k, v = votes.inputs(backend, 2, spread=1.5 if vote.criterion == "maxgap" else 400.0)
    q[:, :, ::2] *= -1
    keep = votes.some_tiles(2)
    bits = votes.call(backend, q, k, v, keep=keep, vote=vote, reverse=reverse)[2]
    largest = votes.logits(q, k).masked_fill(~votes.by_token(keep), -torch.inf).argmax(-1, keepdim=True)
    assert votes.by_token(bits).gather(-1, largest).all()


@pytest.mark.slow
@votes.property_of(seed=SEEDS, low=st.floats(-12, 0), high=st.floats(-12, 0))
def test_8_bits_settle_after_both_directions_and_a_higher_threshold_drops_more(backend, seed, low, high):
    q, k, v = votes.inputs(backend, seed)
    low, high = sorted((low, high))
    loose, tight = (votes.call(backend, q, k, v, vote=Vote(threshold=x))[2] for x in (low, high))
    assert not (tight & ~loose).any()
    keep = votes.call(backend, q, k, v, keep=tight, vote=Vote(threshold=high), reverse=True)[2]
    for reverse in (False, True):
        assert torch.equal(votes.call(backend, q, k, v, keep=keep, vote=Vote(threshold=high), reverse=reverse)[2], keep)


def missing(x: Tensor, dropped: Tensor, visited: Tensor) -> Tensor:
    """Share of the softmax mass of the visited tiles that the dropped ones hold, largest query of each block row."""
    p = torch.softmax((x * math.log(2)).masked_fill(~votes.by_token(visited), -torch.inf), -1).nan_to_num(0.0)
    share = (p * votes.by_token(dropped)).sum(-1)
    share = torch.nn.functional.pad(share, (0, -NUM_Q % BLOCK)).unflatten(2, (-1, BLOCK))
    return share.amax(-1)


def below(share: Tensor, bound: Tensor | float, dtype: torch.dtype) -> bool:
    """Whether a share stays under its bound, but for the rounding of a sum over all keys."""
    return bool((share <= bound + NUM_K * torch.finfo(dtype).eps).all())


def odds(tiles: Tensor, gap: float) -> Tensor:
    """Bound A: the largest share of the mass in so many tiles whose keys lie at least `gap` under the maximum."""
    x = tiles * BLOCK * 2.0**-gap
    return x / (1 + x)


def drift(backend: str, seed: int, size: float, steps: int):
    """Calls whose logits move, and how far at most any of them does between any two calls, log2 units."""
    q, k, v = votes.inputs(backend, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    calls = [(q, k + size * torch.randn(k.shape, generator=generator, dtype=WIDE).to(k.dtype), v) for _ in range(steps)]
    x = torch.stack([votes.logits(q, k) for q, k, _ in calls])
    return calls, x, float((x.amax(0) - x.amin(0)).max())


@votes.property_of(seed=SEEDS, gap=st.floats(0, 8))
def test_9_what_is_lost_is_the_missing_share_of_a_difference(backend, seed, gap):
    """o - o_K = e (o_S - o_K): the next call's output differs by the dropped mass times where it would have pulled."""
    q, k, v = votes.inputs(backend, seed)
    before, lse, bits = votes.call(backend, q, k, v, vote=Vote(threshold=-gap))
    after, _ = votes.call(backend, q, k, v, keep=bits)
    lost, lost_lse = votes.call(backend, q, k, v, keep=~bits)
    share = (lost_lse - lse).exp()[..., None].to(before.dtype)
    torch.testing.assert_close(before - after, share * (lost - after))


@votes.property_of(seed=SEEDS, gap=st.floats(0, 15), reverse=st.booleans(), kept=st.floats(0.3, 1))
def test_9a_bound_a_of_one_call(backend, seed, gap, reverse, kept):
    q, k, v = votes.inputs(backend, seed)
    keep = votes.some_tiles(seed, kept)
    bits = votes.call(backend, q, k, v, keep=keep, vote=Vote(threshold=-gap), reverse=reverse)[2]
    dropped = keep & ~bits
    assert below(missing(votes.logits(q, k), dropped, keep), odds(dropped.sum(-1), gap), q.dtype)


@pytest.mark.slow
@votes.property_of(seed=SEEDS, size=st.floats(0, 0.3), spare=st.floats(0, 6))
def test_9b_bound_b_over_drifting_calls(backend, seed, size, spare):
    calls, x, most = drift(backend, seed, size, 3)
    keep = ALL
    for step, (q, k, v) in enumerate(calls):
        assert below(missing(x[step], ~keep, ALL), odds((~keep).sum(-1), spare), q.dtype)
        vote = Vote(threshold=-(2 * most + spare))
        keep = votes.call(backend, q, k, v, keep=keep, vote=vote, reverse=step % 2 > 0)[2]
    assert below(missing(x[-1], ~keep, ALL), odds((~keep).sum(-1), spare), votes.dtype_of(backend))


@votes.property_of(seed=SEEDS, criterion=OF_MASS, share=st.floats(0.001, 0.5), reverse=st.booleans())
def test_9c_bound_c_of_one_call(backend, seed, criterion, share, reverse):
    q, k, v = votes.inputs(backend, seed)
    bits = votes.call(backend, q, k, v, vote=Vote(criterion=criterion, threshold=share), reverse=reverse)[2]
    bound = share * (~bits).sum(-1) if criterion == "mass" else share
    assert below(missing(votes.logits(q, k), ~bits, ALL), bound, q.dtype)


@pytest.mark.slow
@votes.property_of(seed=SEEDS, size=st.floats(0, 0.3), criterion=OF_MASS, share=st.floats(0.001, 0.2))
def test_9c_bound_c_over_drifting_calls(backend, seed, size, criterion, share):
    """A share of the mass grows by at most 2^(2 D): D log2 units up for it, D down for the rest."""
    calls, x, most = drift(backend, seed, size, 3)
    keep = ALL
    for step, (q, k, v) in enumerate(calls):
        vote = Vote(criterion=criterion, threshold=share)
        keep = votes.call(backend, q, k, v, keep=keep, vote=vote, reverse=step % 2 > 0)[2]
        spent = share * ((~keep).sum(-1) if criterion == "mass" else step + 1)
        assert below(missing(x[step], ~keep, ALL), 4.0**most * spent, q.dtype)


@EVERY
def test_12_batches_and_heads_do_not_influence_each_other(backend):
    q, k, v = (torch.cat([a, b]) for a, b in zip(votes.inputs(backend, 1), votes.inputs(backend, 2), strict=True))
    together = votes.call(backend, q, k, v, vote=CRITERIA[0])[2]
    assert len({tuple(row.flatten().tolist()) for row in together.flatten(0, 1)}) > 1
    for b, h in np.ndindex(2, 2):
        alone = votes.call(backend, *(x[b : b + 1, h : h + 1] for x in (q, k, v)), vote=CRITERIA[0])[2]
        assert torch.equal(together[b : b + 1, h : h + 1], alone)


@EVERY
def test_13_shards_of_keys_join_by_their_lse(backend):
    q, k, v = votes.inputs(backend, 4)
    keep = votes.some_tiles(4)
    keep[..., 2] = True
    whole, whole_lse = votes.call(backend, q, k, v, keep=keep)
    parts = []
    for tiles in (slice(0, 2), slice(2, COUNT)):
        shard = [x[:, :, tiles.start * BLOCK : tiles.stop * BLOCK] for x in (k, v)]
        lists = full(NUM_Q, shard[0].shape[2], BLOCK)
        parts.append(votes.call(backend, q, *shard, lists, keep=keep[..., tiles], vote=CRITERIA[0])[:2])
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    joined = sum(out * (part - lse).exp()[..., None].to(out.dtype) for out, part in parts)
    torch.testing.assert_close(joined, whole)
    torch.testing.assert_close(lse, whole_lse)


@EVERY
def test_14_compiled_calls_choose_the_same_bits(backend):
    vote = CRITERIA[2 if backend == "torch" else 0]
    given, keep = votes.inputs(backend, 6), pack_bits(votes.some_tiles(6))

    def voted(q, k, v, keep):
        return attend(q, k, v, TILES, scale=SCALE, backend=backend, selection=Selection(keep=keep, vote=vote))

    torch._dynamo.reset()
    compiled = torch.compile(voted, fullgraph=True, backend="aot_eager")(*given, keep)
    torch._dynamo.reset()
    assert all(map(torch.equal, compiled, voted(*given, keep)))
    assert (count_bits(compiled[1]) < count_bits(keep)).any()
