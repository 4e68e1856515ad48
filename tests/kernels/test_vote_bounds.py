"""What the mass that votes drop is bounded by, on every backend: the error bounds A, B and C of LiteAttention.

They are the ninth of its invariants (arXiv 2511.11062); the others are in test_votes.py, and bounds of whole runs in
tests/core/test_lite_method.py.
"""

import math

import pytest
import torch
from dit_accel_kernels import Vote
from hypothesis import strategies as st
from torch import Tensor
from vote_calls import (
    ALL,
    BLOCK,
    NUM_K,
    NUM_Q,
    SEEDS,
    WIDE,
    by_token,
    call,
    dtype_of,
    inputs,
    logits,
    property_of,
    some_tiles,
)


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


def drift(backend: str, seed: int, size: float, steps: int):
    """Calls whose logits move, and how far at most any of them does between any two calls, log2 units."""
    q, k, v = inputs(backend, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    calls = [(q, k + size * torch.randn(k.shape, generator=generator, dtype=WIDE).to(k.dtype), v) for _ in range(steps)]
    x = torch.stack([logits(q, k) for q, k, _ in calls])
    return calls, x, float((x.amax(0) - x.amin(0)).max())


@property_of(seed=SEEDS, gap=st.floats(0, 8))
def test_9_what_is_lost_is_the_missing_share_of_a_difference(backend, seed, gap):
    """o - o_K = e (o_S - o_K): the next call's output differs by the dropped mass times where it would have pulled."""
    q, k, v = inputs(backend, seed)
    before, lse, bits = call(backend, q, k, v, vote=Vote(threshold=-gap))
    after, _ = call(backend, q, k, v, keep=bits)
    lost, lost_lse = call(backend, q, k, v, keep=~bits)
    share = (lost_lse - lse).exp()[..., None].to(before.dtype)
    torch.testing.assert_close(before - after, share * (lost - after))


@property_of(seed=SEEDS, gap=st.floats(0, 15), reverse=st.booleans(), kept=st.floats(0.3, 1))
def test_9a_bound_a_of_one_call(backend, seed, gap, reverse, kept):
    q, k, v = inputs(backend, seed)
    keep = some_tiles(seed, kept)
    bits = call(backend, q, k, v, keep=keep, vote=Vote(threshold=-gap), reverse=reverse)[2]
    dropped = keep & ~bits
    assert below(missing(logits(q, k), dropped, keep), odds(dropped.sum(-1), gap), q.dtype)


@pytest.mark.slow
@property_of(seed=SEEDS, size=st.floats(0, 0.3), spare=st.floats(0, 6))
def test_9b_bound_b_over_drifting_calls(backend, seed, size, spare):
    calls, x, most = drift(backend, seed, size, 3)
    keep = ALL
    for step, (q, k, v) in enumerate(calls):
        assert below(missing(x[step], ~keep, ALL), odds((~keep).sum(-1), spare), q.dtype)
        keep = call(backend, q, k, v, keep=keep, vote=Vote(threshold=-(2 * most + spare)), reverse=step % 2 > 0)[2]
    assert below(missing(x[-1], ~keep, ALL), odds((~keep).sum(-1), spare), dtype_of(backend))


@property_of(
    seed=SEEDS, criterion=st.sampled_from(["mass", "budget"]), share=st.floats(0.001, 0.5), reverse=st.booleans()
)
def test_9c_bound_c_of_one_call(backend, seed, criterion, share, reverse):
    q, k, v = inputs(backend, seed)
    bits = call(backend, q, k, v, vote=Vote(criterion=criterion, threshold=share), reverse=reverse)[2]
    bound = share * (~bits).sum(-1) if criterion == "mass" else share
    assert below(missing(logits(q, k), ~bits, ALL), bound, q.dtype)


@pytest.mark.slow
@property_of(
    seed=SEEDS, size=st.floats(0, 0.3), criterion=st.sampled_from(["mass", "budget"]), share=st.floats(0.001, 0.2)
)
def test_9c_bound_c_over_drifting_calls(backend, seed, size, criterion, share):
    """A share of the mass grows by at most 2^(2 D): D log2 units up for it, D down for the rest."""
    calls, x, most = drift(backend, seed, size, 3)
    keep = ALL
    for step, (q, k, v) in enumerate(calls):
        vote = Vote(criterion=criterion, threshold=share)
        keep = call(backend, q, k, v, keep=keep, vote=vote, reverse=step % 2 > 0)[2]
        spent = share * ((~keep).sum(-1) if criterion == "mass" else step + 1)
        assert below(missing(x[step], ~keep, ALL), 4.0**most * spent, q.dtype)
