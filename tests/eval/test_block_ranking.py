"""Attention received and classes of blocks; against figures written out."""

import numpy as np
import pytest
import torch
from dit_accel_eval.tune.block_ranking import attention_received, cached_blocks, foreground_ratio


@pytest.mark.parametrize("masked", [False, True])
def test_attention_received_is_the_mean_of_the_columns(masked, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 37, 8)
    mask = torch.rand(2, 37) > 0.3 if masked else None
    monkeypatch.setattr("dit_accel_eval.tune.block_ranking.SCORES", 4 * 37 * 5)  # chunks of five queries
    logits = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    found = attention_received(q, k, key_mask=mask)
    torch.testing.assert_close(found, logits.softmax(-1).mean((0, 1, 2)))
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert torch.equal(attention_received(q, k, key_mask=mask, rows=torch.arange(37)), found)


def test_a_sample_of_the_queries_stands_for_all():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 2, 400, 8, generator=generator), torch.randn(1, 2, 400, 8, generator=generator)
    exact = attention_received(q, k)
    rows = torch.randperm(400, generator=generator)[:100]
    found = attention_received(q, k, rows=rows)
    torch.testing.assert_close(found, attention_received(q[:, :, rows], k))
    assert 0 < float((found - exact).abs().mean() / exact.mean()) < 0.2


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
    assert cached_blocks([]) == ([], 0.0)
    assert cached_blocks([0.4], count=1) == ([0], 0.4)
    assert cached_blocks([0.4, 0.8], count=0) == ([], 0.4)
    assert cached_blocks([0.1, 0.3, 0.6, 0.7]) == ([0, 1], pytest.approx(0.45))


def test_classes():
    scores = [0.5, 0.1, 0.9, 0.2, float("nan"), 0.85]
    assert cached_blocks(scores) == ([0, 1, 3], pytest.approx((0.5 + 0.85) / 2))
    assert cached_blocks(scores, count=1) == ([1], pytest.approx(0.15))
    assert cached_blocks(scores, count=5)[0] == [0, 1, 2, 3, 5]
    assert cached_blocks([0.3])[0] == []
