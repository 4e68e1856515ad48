"""The rule of verdicts: intervals, tests and Holm's correction, and by simulation how often it is wrong; ranks."""

import math

import numpy as np
import pytest
from dit_accel_eval.statistics import FEWEST, clip_mean, holm, judge, p_value
from judging import paired_cell
from scipy import stats

SHAPES = {
    "normal": lambda rng, size: rng.normal(0, 1, size),
    "heavy tails": lambda rng, size: rng.standard_t(3, size),
    "skewed": lambda rng, size: rng.gamma(4, 1, size) - 4,
    "more skewed": lambda rng, size: rng.exponential(1, size) - 1,
    "most skewed": lambda rng, size: rng.lognormal(0, 1, size) - np.exp(0.5),
}  # of mean 0


def spread(share, draws):
    """Three standard errors of a share that was counted over so many draws."""
    return 3 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clips", [FEWEST, 16])
def test_where_there_is_no_difference_one_verdict_in_twenty_is_wrong(shape, clips):
    rng, draws = np.random.default_rng([1, clips]), 1000
    data = SHAPES[shape](rng, (draws, clips))
    wrong = np.mean([p_value(one) < 0.05 for one in data])
    student = np.mean(stats.ttest_1samp(data, 0, axis=1)[1] < 0.05)
    assert wrong <= student  # never more than the plain t test
    if "more" not in shape and "most" not in shape:
        assert wrong <= 0.05 + spread(0.05, draws)
    elif "more" in shape:
        assert wrong <= 0.06 + spread(0.06, draws)
    else:  # so skewed that nothing short of many clips helps
        assert wrong < student - 0.04


def test_the_interval_leaves_out_just_what_the_test_refuses():
    for clips in (6, 9, 16):
        rng, sides = np.random.default_rng(clips), set()
        for _ in range(300):
            values, margin = rng.exponential(1, clips) * rng.choice([-1, 1]), rng.normal(0, 2)
            found = clip_mean(values)
            assert found.low <= found.mean <= found.high
            outside = not found.low <= margin <= found.high
            assert (p_value(values, margin) < 0.05) == outside
            sides.add(outside)
        assert sides == {True, False}


def test_the_interval_holds_student_s_and_reaches_further_to_the_side_of_the_tail():
    values = [0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 4.0, 0.3]
    student, found = stats.ttest_1samp(values, 0.0), clip_mean(values)
    interval = student.confidence_interval(0.95)
    assert found.low == pytest.approx(interval.low)
    assert found.high > interval.high + 1
    assert p_value(values) == pytest.approx(student.pvalue)
    mirrored = clip_mean([-one for one in values])
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    even = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # without skewness they are one
    assert clip_mean(even).high == pytest.approx(stats.ttest_1samp(even, 0.0).confidence_interval(0.95).high)


def test_estimates_of_few_clips_have_no_interval_and_no_verdict():
    few = judge({"a": [-19.7, -8.0, -7.5, -6.9, -6.6]})["a"]
    assert (few.low, few.high, few.p, few.p_holm, few.verdict, few.count) == (None, None, None, None, "too few", 5)
    assert few.judged() == "-9.74 (-7.50) too few"
    assert (clip_mean([2.0]).cell(), str(clip_mean([1.0, 3.0]))) == ("2.00", "2.00")
    constant = judge({"a": [2.0] * FEWEST})["a"]
    assert (constant.low, constant.high, constant.p, constant.verdict) == (2.0, 2.0, 0.0, "ahead")
    assert constant.judged() == "+2.00 [+2.00, +2.00] (+2.00) ahead"
    assert judge({"none": []}) == {}
    with pytest.raises(ValueError, match=r"interval.*got none"):
        clip_mean([])


def test_arms_that_are_judged_together_must_stand_after_holm():
    lead = [0.1, 0.9, 0.2, 0.8, 1.9, 0.4, 1.1, -0.3]
    alone = judge({"a": lead})["a"]
    assert (alone.verdict, alone.together) == ("ahead", 1)
    assert alone.p == alone.p_holm < 0.05
    flat = [0.5, -0.5, 0.25, -0.25, 0.1, -0.1, 0.3, -0.3]
    many = judge({"a": lead, "few": lead[:3], **dict.fromkeys(range(8), flat)})
    assert (many["a"].p, many["a"].p_holm) == (alone.p, pytest.approx(9 * alone.p))
    assert many["a"].low > 0
    assert [many[key].verdict for key in ("a", "few", 0)] == ["open", "too few", "open"]
    assert many["a"].together == 9
    behind = judge({"a": [-one for one in lead]})["a"]
    assert (behind.verdict, behind.mean, behind.p) == ("behind", -alone.mean, pytest.approx(alone.p))
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1, "b": 1}
    assert holm({}) == {}


def test_a_margin_moves_what_is_tested_and_a_difference_of_rounding_decides_nothing():
    lead = [4.0, 5.0, 3.5, 6.0, 4.5, 5.5, 4.8, 5.2]
    found = {margin: judge({0: lead}, {0: margin})[0] for margin in (0.0, 3.0, 4.4, 9.0)}
    assert [one.verdict for one in found.values()] == ["ahead", "ahead", "open", "behind"]
    assert found[3.0].low > 3 > 0 < found[3.0].p
    assert found[3.0].p == pytest.approx(p_value([one - 3 for one in lead]))
    assert judge({0: [1e-6, 2e-6, 1e-6, 3e-6, 1e-6, 2e-6]})[0].verdict == "open"
    assert judge({0: [-1e-6, -2e-6, -1e-6, -3e-6, -1e-6, -2e-6]})[0].verdict == "open"


def test_a_cell_tells_the_mean_its_interval_and_how_many_clips_have_a_value():
    own = {clip: {"x": 2.0 + clip} for clip in range(8)}
    others = {clip: {"x": 1.0} for clip in range(1, 9)}
    assert paired_cell(own, others, "x") == "5.00 [3.00, 7.00]"  # of clips 1 to 7
    assert paired_cell(own, others, "x", scale=10, ratio=True).startswith("60.00 [")
    others[4]["x"] = math.nan
    assert paired_cell(own, others, "x") == "5.00 [2.52, 7.48] (6)"
    assert paired_cell({1: {"x": 3.0}}, others, "x") == "2.00"
    assert paired_cell(own, {}, "x") == paired_cell(own, others, "y") == ""
