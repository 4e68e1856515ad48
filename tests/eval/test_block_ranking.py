"""Attention received and classes of blocks; against figures written out."""

import numpy as np
import pytest
import torch
from dit_accel_eval.tune.block_ranking import cached_blocks, foreground_ratio
from dit_accel_eval.tune.received import attention_received


@pytest.mark.parametrize("masked", [False, True])
def test_attention_received_is_the_mean_of_the_columns(masked, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 37, 8)
    mask = torch.rand(2, 37) > 0.3 if masked else None
    monkeypatch.setattr("dit_accel_eval.tune.received.SCORES", 4 * 37 * 5)  # chunks of five queries
    logits = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    found, error = attention_received(q, k, key_mask=mask)
    torch.testing.assert_close(found, logits.softmax(-1).mean((0, 1, 2)))
    assert not error.any()
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert torch.equal(attention_received(q, k, key_mask=mask, rows=torch.arange(37))[0], found)


def test_equal_queries_have_no_error():
    """The variance of equal numbers is 0, and rounding may leave a little less."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 1, 8, generator=generator).expand(1, 2, 97, 8)
    k = torch.randn(1, 2, 97, 8, generator=generator)
    for rows in range(30, 60):
        found, error = attention_received(q, k, rows=torch.arange(rows))
        assert error.isfinite().all()
        assert float(error.max()) < 1e-6
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_one_row_tells_no_error():
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    assert not attention_received(q, k, rows=torch.tensor([3]))[1].any()
    assert attention_received(q, k, rows=torch.tensor([3, 4]))[1].any()


def test_the_error_of_a_sample_is_what_it_says():
    generator = torch.Generator().manual_seed(1)
    q, k = 2 * torch.randn(1, 2, 400, 8, generator=generator), 2 * torch.randn(1, 2, 400, 8, generator=generator)
    exact, _ = attention_received(q, k)
    off, told = [], []
    for _ in range(40):
        rows = torch.randperm(400, generator=generator)[:50]
        found, error = attention_received(q, k, rows=rows)
        off.append((found - exact).square())
        told.append(error.square())
    assert torch.stack(off).mean().sqrt() == pytest.approx(float(torch.stack(told).mean().sqrt()), rel=0.1)


def test_the_ratio_is_of_the_foreground_and_by_frame():
    received = np.array([[4.0, 0.0, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    foreground = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    assert foreground_ratio(received, foreground) == pytest.approx((0.5 + 1.0) / 2)
    assert np.isnan(foreground_ratio(received, np.zeros_like(foreground)))


def test_what_receives_just_the_mean_is_not_high():
    foreground = np.ones((2, 3), bool)
    assert foreground_ratio(np.ones((2, 3)), foreground) == 0.0
    assert foreground_ratio(np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), foreground) == pytest.approx(1 / 6)
    grid = np.array([[[9.0, 0.0], [0.0, 0.0]]])
    assert foreground_ratio(grid, grid > 0) == 1.0


def test_classes_at_their_edges():
    assert cached_blocks([0.2, 0.2, 0.2], threshold=0.2) == ([], 0.2)
    assert cached_blocks([], threshold=0.5) == ([], 0.5)
    assert cached_blocks([]) == ([], 0.0)
    assert cached_blocks([0.4], count=1) == ([0], 0.4)
    assert cached_blocks([0.4, 0.8], count=0) == ([], 0.4)
    assert cached_blocks([0.1, 0.3, 0.6, 0.7]) == ([0, 1], pytest.approx(0.45))


def test_classes():
    scores = [0.5, 0.1, 0.9, 0.2, float("nan"), 0.85]
    assert cached_blocks(scores, threshold=0.5) == ([1, 3], 0.5)
    assert cached_blocks(scores) == ([0, 1, 3], pytest.approx((0.5 + 0.85) / 2))
    assert cached_blocks(scores, count=1) == ([1], pytest.approx(0.15))
    assert cached_blocks(scores, count=5)[0] == [0, 1, 2, 3, 5]
    assert cached_blocks([0.3])[0] == []
