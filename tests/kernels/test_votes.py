"""What votes guarantee, on every backend: invariants and error bounds of LiteAttention (arXiv 2511.11062).

A backend that counts votes joins by its name in BACKENDS.
"""

import math

import pytest
import torch
from dit_accel_kernels import Selection, TileLists, Vote, block_sparse_attention, count_bits, pack_bits, unpack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

BACKENDS = ("reference", "torch")
EVERY = pytest.mark.parametrize("backend", BACKENDS)
WIDE = torch.float64
BLOCK, ROWS, COUNT = 16, 3, 6
NUM_Q, NUM_K = 40, 90  # both end in a ragged tile
TILES = TileLists.full(NUM_Q, NUM_K, block_q=BLOCK, block_k=BLOCK)
SCALE = 0.25
PROPERTY = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**31)


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else WIDE


def inputs(backend: str, seed: int, spread: float = 1.5, block: int = BLOCK) -> tuple[Tensor, Tensor, Tensor]:
    """Queries about one direction, keys whose length along it depends on the tile: votes find something to drop."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(1, 2, n, 16, generator=generator, dtype=WIDE) for n in (NUM_Q, NUM_K, NUM_K)]
    length = spread * torch.randn(1, 2, COUNT, generator=generator, dtype=WIDE)
    k = length.repeat_interleave(block, 2)[:, :, :NUM_K, None] + 0.2 * draw[1]
    return tuple(x.to(dtype_of(backend)) for x in (1 + 0.2 * draw[0], k, draw[2]))


def call(backend: str, q: Tensor, k: Tensor, v: Tensor, tiles: TileLists = TILES, **selection):
    """Output, LSE and, with a vote, the bits of the next call as bool."""
    for name in ("keep", "pinned"):
        if name in selection:
            selection[name] = pack_bits(selection[name])
    out, lse, *bits = block_sparse_attention(
        q, k, v, tiles, layout="bhsd", scale=SCALE, return_lse=True, backend=backend, selection=Selection(**selection)
    )
    return out, lse, *(unpack_bits(x, tiles.key_tiles) for x in bits)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Of every query and key in float64, log2 units."""
    return q.to(WIDE) @ k.to(WIDE).mT * SCALE * math.log2(math.e)


def by_token(bits: Tensor) -> Tensor:
    """Bits [..., NQ, NK] for every query and key."""
    return bits.repeat_interleave(BLOCK, 2)[:, :, :NUM_Q].repeat_interleave(BLOCK, 3)[..., :NUM_K]


def missing(x: Tensor, dropped: Tensor, visited: Tensor) -> Tensor:
    """Share of the softmax mass of the visited tiles that the dropped ones hold, largest query of each block row."""
    p = torch.softmax((x * math.log(2)).masked_fill(~by_token(visited), -torch.inf), -1).nan_to_num(0.0)
    share = (p * by_token(dropped)).sum(-1)
    share = torch.nn.functional.pad(share, (0, -NUM_Q % BLOCK)).unflatten(2, (-1, BLOCK))
    return share.amax(-1)


def below(share: Tensor, bound: Tensor | float, dtype: torch.dtype) -> bool:
    """Whether a share stays under its bound, but for the rounding of a sum over all keys."""
    return bool((share <= bound + NUM_K * torch.finfo(dtype).eps).all())


def odds(tiles: Tensor, gap: float) -> Tensor:
    """Bound A: the largest share of the mass in so many tiles whose keys lie at least `gap` under the maximum."""
    x = tiles * BLOCK * 2.0**-gap
    return x / (1 + x)


@EVERY
@PROPERTY
@given(seed=SEEDS, gap=st.floats(0, 15), reverse=st.booleans(), kept=st.floats(0.3, 1))
def test_bound_a_of_one_call(backend, seed, gap, reverse, kept):
    q, k, v = inputs(backend, seed)
    keep = torch.rand(1, 2, ROWS, COUNT, generator=torch.Generator().manual_seed(seed)) < kept
    bits = call(backend, q, k, v, keep=keep, vote=Vote(threshold=-gap), reverse=reverse)[2]
    dropped = keep & ~bits
    assert below(missing(logits(q, k), dropped, keep), odds(dropped.sum(-1), gap), q.dtype)


@EVERY
@PROPERTY
@given(seed=SEEDS, vote=st.sampled_from(["mass", "budget"]), share=st.floats(0.001, 0.5), reverse=st.booleans())
def test_bound_c_of_one_call(backend, seed, vote, share, reverse):
    q, k, v = inputs(backend, seed)
    bits = call(backend, q, k, v, vote=Vote(criterion=vote, threshold=share), reverse=reverse)[2]
    every = torch.ones_like(bits)
    bound = share * (~bits).sum(-1) if vote == "mass" else share
    assert below(missing(logits(q, k), ~bits, every), bound, q.dtype)


def drift(backend: str, seed: int, size: float, steps: int):
    """Calls whose logits move, and how far at most any of them does between any two calls, log2 units."""
    q, k, v = inputs(backend, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    calls = [(q, k + size * torch.randn(k.shape, generator=generator, dtype=WIDE).to(k.dtype), v) for _ in range(steps)]
    x = torch.stack([logits(q, k) for q, k, _ in calls])
    return calls, x, float((x.amax(0) - x.amin(0)).max())


@EVERY
@PROPERTY
@given(seed=SEEDS, size=st.floats(0, 0.3), spare=st.floats(0, 6))
def test_bound_b_over_drifting_calls(backend, seed, size, spare):
    calls, x, most = drift(backend, seed, size, 4)
    every = keep = torch.ones(1, 2, ROWS, COUNT, dtype=torch.bool)
    for step, qkv_ in enumerate(calls):
        vote = Vote(threshold=-(2 * most + spare))
        assert below(missing(x[step], ~keep, every), odds((~keep).sum(-1), spare), dtype_of(backend))
        keep = call(backend, *qkv_, keep=keep, vote=vote, reverse=step % 2 > 0)[2]
    assert below(missing(x[-1], ~keep, every), odds((~keep).sum(-1), spare), dtype_of(backend))


@EVERY
@PROPERTY
@given(seed=SEEDS, size=st.floats(0, 0.3), criterion=st.sampled_from(["mass", "budget"]), share=st.floats(0.001, 0.2))
def test_bound_c_over_drifting_calls(backend, seed, size, criterion, share):
    """A share of the mass grows by at most 2^(2 D): D log2 units up for it, D down for the rest."""
    calls, x, most = drift(backend, seed, size, 4)
    every = keep = torch.ones(1, 2, ROWS, COUNT, dtype=torch.bool)
    for step, qkv_ in enumerate(calls):
        vote = Vote(criterion=criterion, threshold=share)
        keep = call(backend, *qkv_, keep=keep, vote=vote, reverse=step % 2 > 0)[2]
        spent = share * ((~keep).sum(-1) if criterion == "mass" else step + 1)
        assert below(missing(x[step], ~keep, every), 4.0**most * spent, dtype_of(backend))


@EVERY
@PROPERTY
@given(seed=SEEDS, gap=st.floats(0, 8))
def test_what_is_lost_is_the_missing_share_of_a_difference(backend, seed, gap):
    """o - o_K = e (o_S - o_K): the next call's output differs by the dropped mass times where it would have pulled."""
    q, k, v = inputs(backend, seed)
    before, lse, bits = call(backend, q, k, v, vote=Vote(threshold=-gap))
    after, _ = call(backend, q, k, v, keep=bits)
    lost, lost_lse = call(backend, q, k, v, keep=~bits)
    share = (lost_lse - lse).exp()[..., None].to(before.dtype)
    torch.testing.assert_close(before - after, share * (lost - after))


@EVERY
@pytest.mark.parametrize("reverse", [False, True])
def test_1_no_threshold_drops_nothing(backend, reverse):
    q, k, v = inputs(backend, 0, spread=20.0)
    out, lse, bits = call(backend, q, k, v, vote=Vote(threshold=-math.inf), reverse=reverse)
    assert bits.all()
    expected, expected_lse = block_sparse_attention(
        q, k, v, TILES, layout="bhsd", scale=SCALE, return_lse=True, backend=backend
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@EVERY
@pytest.mark.parametrize("reverse", [False, True])
def test_2_an_endless_threshold_leaves_one_tile_and_the_pinned(backend, reverse):
    q, k, v = inputs(backend, 0)
    vote, first = Vote(threshold=math.inf), torch.zeros(1, 2, ROWS, COUNT, dtype=torch.bool)
    first[..., COUNT - 2 if reverse else 0] = True  # the ragged tile comes last in both directions
    bits = call(backend, q, k, v, vote=vote, reverse=reverse)[2]
    assert torch.equal(bits, first)
    for back in (False, True):
        assert torch.equal(call(backend, q, k, v, keep=bits, vote=vote, reverse=back)[2], bits)
    pinned = torch.rand(ROWS, COUNT) > 0.5
    assert torch.equal(call(backend, q, k, v, pinned=pinned, vote=vote, reverse=reverse)[2], first | pinned)


@EVERY
@pytest.mark.parametrize("threshold", [-10.0, 0.0, math.inf])
def test_3_the_first_call_is_dense(backend, threshold):
    q, k, v = inputs(backend, 0)
    every = torch.ones(1, 2, ROWS, COUNT, dtype=torch.bool)
    out, _, bits = call(backend, q, k, v, keep=every, vote=Vote(threshold=threshold))
    dense = torch.softmax(logits(q, k) * math.log(2), -1) @ v.to(WIDE)
    torch.testing.assert_close(out, dense.to(out.dtype))
    assert len(call(backend, q, k, v, keep=bits)) == 2  # a call that does not vote gives no bits


@EVERY
@PROPERTY
@given(seed=SEEDS, name=st.sampled_from(["maxgap", "mass", "budget"]))
def test_4_to_7_over_many_calls(backend, seed, name):
    """Bits only fall, one at least stays, as the specification votes; a call runs on its own bits."""
    vote = Vote(criterion=name, threshold={"maxgap": -4.0, "mass": 0.02, "budget": 0.05}[name])
    keep = torch.ones(1, 2, ROWS, COUNT, dtype=torch.bool)
    for step in range(3):
        q, k, v = inputs(backend, seed + step)
        options = dict(keep=keep, vote=vote, reverse=step % 2 > 0)
        out, lse, bits = call(backend, q, k, v, **options)
        wide = call("reference", *(x.to(WIDE) for x in (q, k, v)), **options)
        torch.testing.assert_close(out, wide[0].to(out.dtype))
        torch.testing.assert_close(lse, wide[1].to(lse.dtype))
        if q.dtype == WIDE:
            assert torch.equal(bits, wide[2])
        assert not (bits & ~keep).any()
        assert bits.any(-1).all()
        best = logits(q, k).masked_fill(~by_token(keep), -torch.inf).argmax(-1, keepdim=True)
        if name == "maxgap":
            assert by_token(bits).gather(-1, best).all()
        keep = bits


@EVERY
def test_4_no_bits_beyond_the_last_tile(backend):
    q, k, v = inputs(backend, 0)
    options = dict(layout="bhsd", backend=backend, selection=Selection(vote=Vote(threshold=-4.0)))
    _, words = block_sparse_attention(q, k, v, TILES, **options)
    assert torch.equal(count_bits(words), unpack_bits(words, COUNT).sum(-1))


@EVERY
@PROPERTY
@given(seed=SEEDS, low=st.floats(-12, 0), high=st.floats(-12, 0))
def test_8_stable_after_both_directions_and_monotone_in_the_threshold(backend, seed, low, high):
    q, k, v = inputs(backend, seed)
    low, high = sorted((low, high))
    loose, tight = (call(backend, q, k, v, vote=Vote(threshold=x))[2] for x in (low, high))
    assert not (tight & ~loose).any()
    keep = call(backend, q, k, v, keep=tight, vote=Vote(threshold=high), reverse=True)[2]
    for reverse in (False, True, False):
        assert torch.equal(call(backend, q, k, v, keep=keep, vote=Vote(threshold=high), reverse=reverse)[2], keep)


@EVERY
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("criterion", ["maxgap", "mass", "budget"])
def test_10_tiles_that_point_away_are_dropped(backend, reverse, criterion):
    direction = torch.ones(1, 2, 1, 16, dtype=dtype_of(backend))
    q = direction.expand(-1, -1, 32, -1)
    signs = torch.tensor([4.0, -4.0, -4.0, 4.0]).repeat_interleave(BLOCK)[:, None].to(q.dtype)
    k, v = direction * signs, torch.randn(1, 2, 64, 16, dtype=q.dtype)
    tiles = TileLists.full(32, 64, block_q=BLOCK, block_k=BLOCK)
    vote = Vote(criterion=criterion, threshold=-10.0 if criterion == "maxgap" else 0.01)
    bits = call(backend, q, k, v, tiles, vote=vote, reverse=reverse)[2]
    assert torch.equal(bits, torch.tensor([True, False, False, True]).expand(1, 2, 2, 4))


@EVERY
@pytest.mark.parametrize("criterion", ["maxgap", "mass", "budget"])
def test_11_what_pads_a_tile_neither_vetoes_nor_wins(backend, criterion):
    """Every logit is far below the 0 of padding, in a last block row of few queries and a last tile of few keys."""
    direction = torch.ones(1, 2, 1, 16, dtype=dtype_of(backend))
    tokens = [-4.0] * BLOCK + [-8.0] * BLOCK + [-8.0] * 3
    k = direction * torch.tensor(tokens, dtype=direction.dtype)[:, None]
    q, v = direction.expand(-1, -1, BLOCK + 2, -1), torch.randn(1, 2, len(tokens), 16, dtype=k.dtype)
    tiles = TileLists.full(q.shape[2], k.shape[2], block_q=BLOCK, block_k=BLOCK)
    vote = Vote(criterion=criterion, threshold=-10.0 if criterion == "maxgap" else 0.01)
    bits = call(backend, q, k, v, tiles, vote=vote)[2]
    assert torch.equal(bits, torch.tensor([True, False, False]).expand(1, 2, 2, 3))


@EVERY
def test_11_votes_of_the_last_block_row_are_its_queries_own(backend):
    q, k, v = inputs(backend, 3)
    vote = Vote(threshold=-2.0)
    last = TileLists.full(8, NUM_K, block_q=8, block_k=BLOCK)
    alone = call(backend, q[:, :, 32:], k, v, last, vote=vote)[2]
    assert not alone.all()
    assert torch.equal(call(backend, q, k, v, vote=vote)[2][:, :, 2:], alone)


@EVERY
def test_12_batches_and_heads_do_not_influence_each_other(backend):
    dtype = dtype_of(backend)
    q, k, v = (torch.cat([a, b]) for a, b in zip(inputs(backend, 1), inputs(backend, 2), strict=True))
    vote = Vote(threshold=-3.0)
    together = call(backend, q, k, v, vote=vote)[2]
    for b in range(2):
        for h in range(2):
            alone = call(backend, *(x[b : b + 1, h : h + 1].to(dtype) for x in (q, k, v)), vote=vote)[2]
            assert torch.equal(together[b : b + 1, h : h + 1], alone)
