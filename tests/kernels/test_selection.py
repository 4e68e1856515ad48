"""Selections against formulas written out: bitmaps, pinned tiles, routing's density, votes of each criterion."""

import math

import pytest
import torch
from dit_accel_kernels import (
    Routing,
    Selection,
    TileLists,
    Vote,
    count_bits,
    pack_bits,
    selected_tiles,
    unpack_bits,
    votes,
)
from dit_accel_kernels.bits import word_count
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.states import routing_scores
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import attend, full, qkv
from torch import Tensor

WIDE = torch.float64
THRESHOLDS = pytest.mark.parametrize("threshold", ["diag", "exact"])


@settings(max_examples=30, deadline=None)
@example(33, 0)
@given(st.integers(1, 100), st.integers(0, 2**31))
def test_bits_survive_packing(count, seed):
    chosen = torch.rand(2, 3, count, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack_bits(chosen)
    assert bits.shape == (2, 3, -(-count // 32)) == (2, 3, word_count(count))
    assert torch.equal(unpack_bits(bits, count), chosen)
    assert torch.equal(count_bits(bits), chosen.sum(-1))


@THRESHOLDS
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_routing_keeps_the_normal_tail_of_gaussian_data(backend, threshold):
    """Density 1 - Phi(beta), as published; 64 x 64 tiles and 4 heads give 16,384 draws."""
    inputs = qkv(1, 4, 4, 512, 512, 32, torch.float32)
    for beta in (0.5, 1.0, 1.5):
        selection = Selection(routing=Routing(beta=beta, threshold=threshold))
        _, exact = attend(*inputs, full(512, 512, 8), selection=selection, return_tiles=True, backend=backend)
        assert torch.equal(selected_tiles(*inputs[:2], full(512, 512, 8), layout="bhsd", selection=selection), exact)
        density, expected = float(count_bits(exact).sum()) / (4 * 64 * 64), 0.5 * math.erfc(beta / math.sqrt(2))
        assert abs(density - expected) < 4 * math.sqrt(expected / (4 * 64))  # tiles of a row share its mean query


def test_votes_are_held_until_the_padded_evidence_takes_more_than_its_memory(monkeypatch):
    inputs, selection, settled = qkv(1, 1, 1, 64, 64, 8, torch.float32), Selection(vote=Vote()), []
    tally = votes.Tally(problem_of(*inputs, full(64), layout="bhsd", selection=selection))
    monkeypatch.setattr(votes, "VOTE_BYTES", 9 * 16 * 4)  # nine tiles of 16 queries
    monkeypatch.setattr(votes.Tally, "settle", lambda self, q_tiles, tiles, evidence: settled.append(evidence.shape))
    for rows, tiles in ((2, 1), (1, 3), (1, 1)):
        tally.hold(torch.arange(rows), torch.zeros(rows, tiles).long(), torch.zeros(tiles, rows, 16))
    tally.kept()
    assert settled == [(3, 3, 16), (1, 1, 16)]
    assert (selection.reverse, selection.vote.threshold, Routing().beta) == (False, -10.0, 1.0)


def scores_of(q: Tensor, k: Tensor, tiles: TileLists, routing: Routing, **arguments) -> tuple[Tensor, Tensor]:
    """Scores and thresholds of a call, whose values have no part in them."""
    return routing_scores(problem_of(q, k, k, tiles, layout="bhsd", **arguments).tiled(), routing, None)


@THRESHOLDS
def test_routing_scores_are_logits_of_means_in_log2_units(threshold):
    """Equal keys have no spread but the 1e-6 that is added to the variance: a thousandth of beta over their scores."""
    q, k, _ = qkv(1, 2, 1, 48, 64, 8, WIDE)
    routing, head_scale = Routing(beta=0.7, threshold=threshold), torch.tensor([1.0, 0.5])
    q_mean, k_mean = q.unflatten(2, (3, 16)).mean(3), k.unflatten(2, (4, 16)).mean(3)
    for scale in (0.3, 2.0):
        scores, bar = scores_of(q, k, full(48, 64), routing, scale=scale, head_scale=head_scale)
        factor = scale * math.log2(math.e) * head_scale[None, :, None, None]
        torch.testing.assert_close(scores, factor * (q_mean @ k_mean.mT))
        if threshold == "exact":
            spread = scores.var(-1, correction=0, keepdim=True)
            torch.testing.assert_close(bar, scores.mean(-1, keepdim=True) + 0.7 * (spread + 1e-6).sqrt())
    _, bar = scores_of(q, k, full(48, 64), routing, key_mask=torch.zeros(1, 64) > 0)
    torch.testing.assert_close(bar, torch.full_like(bar, 0.7e-3))  # of no key at all
    q, k, _ = qkv(1, 2, 2, 48, 64, 8, WIDE)
    k[:] = k[:, :, :1]
    expected = (q.unflatten(2, (3, 16)).mean(3) * k[:, :, :1]).sum(-1, keepdim=True) * 8**-0.5 * math.log2(math.e)
    selection = Selection(routing=Routing(beta=0.0, threshold=threshold))  # what is as large as a threshold isn't above
    assert not selected_tiles(0 * q, k, full(48, 64), layout="bhsd", selection=selection).any()
    for keys in (64, 16):
        scores, bar = scores_of(q, k[:, :, :keys], full(48, keys), Routing(beta=2.0, threshold=threshold))
        torch.testing.assert_close(scores, expected.expand_as(scores))
        torch.testing.assert_close(bar - expected, torch.full_like(bar, 2e-3))
