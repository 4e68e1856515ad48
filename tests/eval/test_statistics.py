"""Cells of paired differences."""

import math

from dit_accel_eval.statistics import paired_cell


def test_a_cell_tells_the_mean_its_interval_and_how_many_clips_have_a_value():
    own = {clip: {"x": 2.0 + clip} for clip in range(4)}
    others = {clip: {"x": 1.0} for clip in range(1, 5)}
    assert paired_cell(own, others, "x") == "3.00 [2.00, 4.00]"  # of clips 1 to 3
    assert paired_cell(own, others, "x", scale=10, ratio=True).startswith("40.00 [")
    others[2]["x"] = math.nan
    assert paired_cell(own, others, "x") == "3.00 [2.00, 4.00] (2)"
    assert paired_cell({1: {"x": 3.0}}, others, "x") == "2.00"
    assert paired_cell(own, {}, "x") == paired_cell(own, others, "y") == ""
