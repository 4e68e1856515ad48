"""The caches that lead furthest within a budget: on made-up results."""

from budgets import table
from dit_accel_eval.statistics import clip_mean
from dit_accel_eval.suites.arms import Arm
from dit_accel_eval.suites.suite import Suite

from dit_accel import EasyCache, MagCache, RadialAttention


def suite(name, *arms):
    return Suite(name=name, model="wan-plain", clips=9, arms=arms)


def lines(arm, work, psnr, clips=8):
    return [
        {"arm": arm.name, "clip": clip, "num_inference_steps": arm.num_inference_steps, "work": work, "work_real": work,
         "psnr": psnr + clip, "ssim": 1.0, "score": 1.0}
        for clip in range(clips)
    ]  # fmt: skip


def arm(name, *methods, steps=12):
    return Arm(name=name, num_inference_steps=steps, methods=methods)


def test_the_best_arm_of_each_cache_within_the_budget():
    far, near, over = arm("easy, 1", EasyCache()), arm("easy, 2", EasyCache()), arm("easy, 3", EasyCache())
    mag, beside = arm("mag", MagCache(ratios=(1.0, 1.0))), arm("both", EasyCache(), RadialAttention())
    rare, below = arm("rare", MagCache(ratios=(1.0, 1.0))), arm("below", MagCache(ratios=(1.0, 1.0)))
    dense = [arm(f"unipc {steps}", steps=steps) for steps in (7, 8)]
    one = [
        *lines(far, 7.5, 30.0), *lines(near, 8.0, 29.0), *lines(over, 8.5, 60.0), *lines(beside, 8.0, 60.0),
        *lines(dense[0], 7.0, 20.0), *lines(dense[1], 8.0, 22.0),
    ]  # fmt: skip
    other = [*lines(mag, 8.0, 25.0, clips=6), *lines(rare, 8.0, 60.0, clips=3), *lines(below, 6.0, 60.0)]
    rows = table(
        [(suite("a", far, near, over, beside, *dense), one), (suite("b", mag, rare, below), other)]
    ).splitlines()
    own = clip_mean([30.0 + clip for clip in range(8)]).cell()
    assert rows[2] == f"| wan-plain | 8 | easy, 1 | 8 | 7.50 | {own} | +9.00 [+9.00, +9.00] (+9.00) ahead |"
    assert rows[3].startswith("| wan-plain | 8 | mag | 6 | 8.00 | 27.50 [")
    assert rows[3].endswith("| +3.00 [+3.00, +3.00] (+3.00) ahead |")
    assert len(rows) == 4  # no dense run beside what costs more
