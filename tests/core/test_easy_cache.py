"""EasyCache: its rule against the published one written out, its guards, and one run on a tiny model."""

import pytest
import torch
from cache_calls import Driven, run_through
from wan_tiny import denoise, require_runs_do_not_meet, sharp_transformer, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, StaticCache
from dit_accel.methods.caches.easy import mean_size

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = [torch.randn(1, 4, 3, generator=GENERATOR).cumsum(0) for _ in range(20)]
for _index in range(1, 20):
    LATENTS[_index] = LATENTS[_index - 1] + 0.05 * LATENTS[_index]


def output(step, branch):
    return (torch.sin(LATENTS[step]) + (branch != "cond"),)


def written_out(threshold, warmup, steps):
    """The published rule, step by step; returns what is computed, what is added up, and the outputs."""
    drawn, sums, given = "", [], []
    x_old = v_old = rate = residual = x_computed = None
    total = 0.0
    for step in range(steps):
        x = LATENTS[step]
        skip = False
        if warmup <= step < steps - 1 and rate is not None:
            total += float(rate * (x - x_old).abs().mean() / v_old.abs().mean())
            sums.append(total)
            skip = total < threshold
        if skip:
            given.append(x + residual)
        else:
            v, total = torch.sin(x), 0.0
            if v_old is not None:
                rate = (v - v_old).abs().mean() / (x - x_computed).abs().mean()
            v_old, x_computed, residual = v, x, v - x
            given.append(v)
        x_old = x
        drawn += "." if skip else "#"
    return drawn, sums, given


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_the_rule(threshold):
    drawn, sums, given = written_out(threshold, 4, 20)
    driven = Driven(EasyCache(threshold=threshold, warmup_steps=4), output)
    out = run_through(driven, lambda step: LATENTS[step], 20)
    assert driven.drawn(steps=20) == drawn
    assert 0 < drawn.count(".") < 16
    forwards = driven.handler.report().data["forwards"]
    assert [entry["value"] for entry in forwards if entry["value"] is not None] == pytest.approx(sums)
    for one, other in zip(out, given, strict=True):
        torch.testing.assert_close(one["cond"], other)


def test_more_is_skipped_at_a_higher_threshold():
    skipped = []
    for threshold in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1e9):
        driven = Driven(EasyCache(threshold=threshold, warmup_steps=4), output)
        run_through(driven, lambda step: LATENTS[step], 20)
        skipped.append(driven.drawn(steps=20).count("."))
    assert skipped[0] == 0
    assert skipped[-1] == 15
    assert skipped == sorted(skipped)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_computed(bad):
    def broken(step, branch):
        return (torch.full((1, 4, 3), bad if step == 3 else 1.0),)

    driven = Driven(EasyCache(threshold=1e9, warmup_steps=4), broken)
    run_through(driven, lambda step: LATENTS[step], 8)
    assert driven.drawn(steps=8) == "######.#"  # until two numbers were computed in a row
    frozen = Driven(EasyCache(threshold=0.1, warmup_steps=2), lambda step, branch: (torch.ones(1, 4, 3),))
    run_through(frozen, lambda step: LATENTS[0], 8)  # the latents stand still: 0 / 0
    assert frozen.drawn(steps=8) == "########"
    assert "not a number" in {entry["reason"] for entry in frozen.handler.report().data["forwards"]}


def test_the_rate_is_taken_in_float32():
    def drawn(dtype):
        driven = Driven(EasyCache(threshold=0.1, warmup_steps=4), lambda *which: (output(*which)[0].to(dtype),))
        run_through(driven, lambda step: LATENTS[step].to(dtype), 20)
        return driven.drawn(steps=20)

    assert drawn(torch.bfloat16) == drawn(torch.float32)


def test_negative_thresholds_are_refused():
    with pytest.raises(ConfigError, match=r"^easycache\.threshold.*got -0\.1"):
        EasyCache(threshold=-0.1)
    with pytest.raises(
        ConfigError,
        match=r"^EasyCache and StaticCache",
    ):
        dit_accel.attach(tiny_transformer(), EasyCache(), StaticCache(every=2))


def test_on_a_model():
    transformer = tiny_transformer()
    plain = denoise(transformer, 8)
    with dit_accel.attach(transformer, EasyCache(threshold=0.0)) as attachment:
        assert torch.equal(denoise(transformer, 8), plain)
        assert len(attachment.report().steps) == 16
    with dit_accel.attach(transformer, EasyCache(threshold=1e9)) as attachment:
        cached = denoise(transformer, 8)
        report = attachment.report()
        assert report.section("easycache").data["reused"] == 2 * (8 - 2 - 1)
        assert {(step.step_index, step.branch) for step in report.steps} == {
            (step, branch) for step in (0, 1, 7) for branch in ("cond", "uncond")
        }
        assert report.section("easycache").lines[0] == "transformer, cond: ##.....#"
        assert report.section("easycache").title == "easycache: 10 of 16 forwards reused (# computed, . reused)"
        # two branches' residuals; latents of the last and the last computed step, an output, two numbers
        assert report.state_bytes["easycache"] == (2 + 3) * 12 * 5 * 8 * 8 * 4 + 2 * 4
    assert not torch.equal(cached, plain)
    assert torch.equal(denoise(transformer, 8), plain)


@pytest.mark.parametrize("predictor", ["hold", "taylor", "heun", "chebyshev"])
def test_runs_do_not_meet(predictor):
    require_runs_do_not_meet(StaticCache(every=2, warmup_steps=2, predictor=predictor))


def test_beside_a_sparse_method_both_act():
    transformer = sharp_transformer()
    sparse = dit_accel.SparseD(block_size=16, density=0.5, dense_steps=2, dense_layers=0)
    with dit_accel.attach(transformer, sparse, StaticCache(every=100, warmup_steps=0, last_steps=0)) as attachment:
        denoise(transformer, 6)
        steps = attachment.report().steps
    ran = [(step.step_index, step.branch, step.sparse_layers) for step in steps]
    assert ran == [
        (0, "cond", 0),
        (0, "uncond", 0),
        (2, "cond", 3),
        (2, "uncond", 3),
    ]  # fmt: skip - the pattern is learned in step 2


def test_the_size_of_a_tensor_is_the_mean_of_its_absolute_values_in_float32():
    ones = torch.full((64, 65), -1.0, dtype=torch.bfloat16)
    assert mean_size(ones) == 1  # a sum of 4160 in bfloat16 is off
    assert mean_size(torch.tensor([1.0, -3.0], dtype=torch.float64)).dtype == torch.float64
    assert mean_size(torch.tensor([1.0, -3.0]), spent=True) == 2
