"""Cells of paired differences, and rank correlation."""

import math
from itertools import permutations

import numpy as np
import pytest
from dit_accel_eval.statistics import paired_cell, rank_correlation


def test_a_cell_tells_the_mean_its_interval_and_how_many_clips_have_a_value():
    own = {clip: {"x": 2.0 + clip} for clip in range(4)}
    others = {clip: {"x": 1.0} for clip in range(1, 5)}
    assert paired_cell(own, others, "x") == "3.00 [2.00, 4.00]"  # of clips 1 to 3
    assert paired_cell(own, others, "x", scale=10, ratio=True).startswith("40.00 [")
    others[2]["x"] = math.nan
    assert paired_cell(own, others, "x") == "3.00 [2.00, 4.00] (2)"
    assert paired_cell({1: {"x": 3.0}}, others, "x") == "2.00"
    assert paired_cell(own, {}, "x") == paired_cell(own, others, "y") == ""


def test_rank_correlation():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert np.isnan(rank_correlation([1, 1], [1, 2]))


def test_rank_correlation_ranks_ties_by_their_mean():
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]
    )
    for order in permutations(range(4)):
        squares = sum((place - rank) ** 2 for place, rank in enumerate(order))
        assert rank_correlation(range(4), order) == pytest.approx(1 - 6 * squares / (4 * 15))
