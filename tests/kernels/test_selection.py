"""Selections against formulas written out: bitmaps, pinned tiles, routing's density, votes of each criterion."""

import math

import pytest
import torch
from dit_accel_kernels import (
    Routing,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    count_bits,
    pack_bits,
    unpack_bits,
)
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.states import routing_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import qkv

WIDE = torch.float64
BOTH = pytest.mark.parametrize("backend", ["reference", "torch"])


def full(num_q: int, num_k: int, block: int) -> TileLists:
    return TileLists.full(num_q, num_k, block_q=block, block_k=block)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 100), st.integers(0, 2**31))
def test_bits_survive_packing(count, seed):
    chosen = torch.rand(2, 3, count, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack_bits(chosen)
    assert bits.shape == (2, 3, -(-count // 32))
    assert torch.equal(unpack_bits(bits, count), chosen)
    assert torch.equal(count_bits(bits), chosen.sum(-1))


@BOTH
@pytest.mark.parametrize("threshold", ["diag", "exact"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_routing_keeps_the_normal_tail_of_gaussian_data(backend, threshold, beta):
    """Density 1 - Phi(beta), as published; 64 x 64 tiles and 4 heads give 16,384 draws."""
    q, k, v = qkv(1, 4, 4, 512, 512, 32, torch.float32)
    selection = Selection(routing=Routing(beta=beta, threshold=threshold))
    _, exact = block_sparse_attention(
        q, k, v, full(512, 512, 8), layout="bhsd", selection=selection, return_tiles=True, backend=backend
    )
    density = float(count_bits(exact).sum()) / (4 * 64 * 64)
    expected = 0.5 * math.erfc(beta / math.sqrt(2))
    assert abs(density - expected) < 4 * math.sqrt(expected / (4 * 64))  # tiles of a row share its mean query


def kept(q, k, v, tiles, vote, backend="reference", **selection):
    options = dict(layout="bhsd", scale=1.0, selection=Selection(vote=vote, **selection), backend=backend)
    bits = block_sparse_attention(q, k, v, tiles, **options)[-1]
    return unpack_bits(bits, tiles.key_tiles)


def test_votes_leave_pinned_unvisited_and_padding_alone():
    q, k, v = qkv(1, 2, 2, 40, 70, 8, WIDE)
    tiles = TileLists.full(40, 70, block_q=16, block_k=16)
    pinned = torch.zeros(3, 5, dtype=torch.bool)
    pinned[:, 2] = True
    keep = torch.ones(1, 2, 3, 5, dtype=torch.bool)
    keep[..., 1] = False
    options = dict(keep=pack_bits(keep), pinned=pack_bits(pinned))
    found = kept(q, k, v, tiles, Vote(threshold=math.inf), **options)
    # the first visited and the pinned ones stay; what was not visited keeps its bit
    assert torch.equal(found, torch.tensor([True, False, True, False, False]).expand(1, 2, 3, 5))
    found = kept(q, k, v, tiles, Vote(threshold=-math.inf), **options)
    assert torch.equal(found, keep)
    junk = torch.cat([q[:, :, :32], 1e3 * q[:, :, 32:]], 2)  # only the last, ragged tile's rows change
    votes = [kept(x, k, v, tiles, Vote(threshold=-3.0)) for x in (q, junk)]
    assert torch.equal(votes[0][:, :, :2], votes[1][:, :, :2])


ERRORS = [
    (lambda: Routing(threshold="other"), ValueError, r"threshold.*'diag'.*'exact', found 'other'"),
    (lambda: Vote(criterion="sum"), ValueError, r"criterion.*'maxgap', 'mass'.*'budget', found 'sum'"),
    (lambda: Vote(criterion="mass", threshold=-10.0), ValueError, r"threshold.*'mass'.*\(0, 1\), found -10"),
    (lambda: Selection(rest="drop"), ValueError, r"rest.*'skip'.*'pooled', found 'drop'"),
    (lambda: Selection(keep=torch.ones(1)), TypeError, r"keep.*torch\.int32, found torch\.float32"),
    (lambda: Selection(keep=torch.ones(1).int()), ValueError, r"keep.*4 dimensions, found \[1\]"),
    (lambda: Selection(pinned=torch.ones(1).int()), ValueError, r"pinned.*2 dimensions, found \[1\]"),
]


@pytest.mark.parametrize(("make", "error", "text"), ERRORS, ids=[e[2][:30] for e in ERRORS])
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_errors_of_the_call():
    q, k, v = qkv(1, 2, 2, 40, 70, 8, WIDE)
    tiles = TileLists.full(40, 70, block_q=16, block_k=16)
    bits = torch.zeros(1, 2, 3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"selection\.keep.*\[1, 2, 3, 1\].*found \[1, 2, 3, 2\]"):
        block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=Selection(keep=bits))
    with pytest.raises(ValueError, match=r"selection\.pinned.*\[3, 1\].*found \[3, 2\]"):
        block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=Selection(pinned=bits[0, 0]))
    with pytest.raises(ValueError, match=r"return_tiles.*no selection"):
        block_sparse_attention(q, k, v, tiles, layout="bhsd", return_tiles=True)


def problem(q, k, v, tiles, **arguments):
    """A call as the backends see it."""
    return problem_of(q, k, v, tiles, layout="bhsd", **arguments).tiled()


@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("threshold", ["diag", "exact"])
def test_routing_scores_are_logits_of_means_in_log2_units(threshold, scale):
    q, k, v = qkv(1, 2, 1, 48, 64, 8, WIDE)
    routing = Routing(beta=0.7, threshold=threshold)
    call = problem(q, k, v, full(48, 64, 16), scale=scale, head_scale=torch.tensor([1.0, 0.5]))
    scores, bar = routing_scores(call, routing, None)
    q_mean, k_mean = q.unflatten(2, (3, 16)).mean(3), k.unflatten(2, (4, 16)).mean(3)
    factor = scale * math.log2(math.e) * torch.tensor([1.0, 0.5])[None, :, None, None]
    torch.testing.assert_close(scores, factor * (q_mean @ k_mean.mT))
    if threshold == "exact":
        spread = scores.var(-1, correction=0, keepdim=True)
        torch.testing.assert_close(bar, scores.mean(-1, keepdim=True) + 0.7 * (spread + 1e-6).sqrt())


@pytest.mark.parametrize("threshold", ["diag", "exact"])
def test_equal_keys_have_equal_scores_just_under_the_threshold(threshold):
    """No spread but the 1e-6 that is added to the variance: a thousandth, in log2 units, times beta."""
    q, k, v = qkv(1, 2, 2, 48, 64, 8, WIDE)
    k[:] = k[:, :, :1]
    scores, bar = routing_scores(problem(q, k, v, full(48, 64, 16)), Routing(beta=2.0, threshold=threshold), None)
    expected = (q.unflatten(2, (3, 16)).mean(3) * k[:, :, :1]).sum(-1, keepdim=True) * 8**-0.5 * math.log2(math.e)
    torch.testing.assert_close(scores, expected.expand_as(scores))
    torch.testing.assert_close(bar - expected, torch.full_like(bar, 2e-3))
