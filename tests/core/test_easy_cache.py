"""EasyCache: its rule against the published one written out, its guards, and one run on a tiny model."""

import math

import pytest
import torch
from cache_calls import Driven, line, run_through
from wan_tiny import denoise, require_runs_do_not_meet, sharp_transformer, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, StaticCache
from dit_accel.methods.caches.easy import mean_size
from dit_accel.rules.forecast import taylor

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


def expected_errors(threshold, warmup, steps, place):
    """The rule of ``error`` written out, step by step: what is computed, and what each forecast may be off by."""
    drawn, found, known, rate = "", [], [], None
    for step in range(steps):
        size = lambda at, points: math.prod(place(at) - place(one) for one in points[-2:]) ** 0.8  # noqa: E731
        value = None if rate is None else rate * size(step, known)
        must = step < warmup or step == steps - 1
        if value is not None and not must:
            found.append(value)
        if not must and value is not None and value < threshold:
            drawn += "."
            continue
        if known:
            x, v = LATENTS[step], torch.sin(LATENTS[step])
            values = [torch.sin(LATENTS[at]) - LATENTS[at] for at in known[-2:]]
            weights = taylor(known[-2:], step, 1)
            made = x + sum(weight * value for weight, value in zip(weights, values, strict=True))
            rate = float((v - made).abs().mean() / v.abs().mean()) / size(step, known)
        known.append(step)
        drawn += "#"
    return drawn, found


def flow(step):
    return 1 - step / 20


@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize(
    ("noise", "sigma", "place"),
    [
        ("none", lambda step: None, lambda step: step),
        ("flow", flow, lambda step: math.log((1 - flow(step)) / flow(step)) if step else -7.0),
        ("exploding", lambda step: 20 * flow(step), lambda step: -math.log(20 * flow(step))),
    ],
    ids=["steps", "flow", "noise over signal"],
)
def test_the_rule_of_a_bounded_error(error, noise, sigma, place):
    drawn, values = expected_errors(error, 4, 20, place)
    driven = Driven(EasyCache(error=error, warmup_steps=4, predictor="taylor"), output)
    for step in range(20):
        for branch in ("cond", "uncond"):
            driven.forward(step, LATENTS[step], branch, steps=20, sigma=sigma(step), noise=noise)
    assert driven.drawn(steps=20) == driven.drawn("uncond", steps=20) == drawn
    assert 0 < drawn.count(".") < 16
    section = driven.handler.report()
    found = [entry["value"] for entry in section.data["forwards"] if entry["value"] is not None]
    assert found == pytest.approx(values, rel=1e-4)
    assert section.data["threshold"] == error
    rises = [(one, after) for one, after, kind in zip(found, found[1:], drawn[4:], strict=False) if kind == "."]
    assert all(one < after for one, after in rises)  # what is expected grows with each step that is skipped


def test_a_larger_error_skips_more():
    skipped = []
    for error in (1e-6, 0.05, 0.1, 0.2, 0.4, 1e9):
        driven = Driven(EasyCache(error=error, warmup_steps=4, predictor="taylor"), output)
        run_through(driven, lambda step: LATENTS[step], 20)
        skipped.append(driven.drawn(steps=20).count("."))
    assert skipped == sorted(skipped)
    assert (skipped[0], skipped[-1]) == (0, 15)


def test_what_an_error_keeps_and_refuses():
    driven = Driven(EasyCache(error=1e9, warmup_steps=4), output)
    run_through(driven, lambda step: LATENTS[step])
    assert driven.handler.state_bytes() == 12 * 4 + 2 * 4  # one residual, two numbers
    assert driven.handler.settings.threshold is None
    assert Driven(EasyCache(error=0.1), line, recipe={"threshold": 0.2}).handler.threshold() == 0.1
    with pytest.raises(ConfigError, match=r"^easycache\.threshold = 0\.1 and easycache\.error = 0\.2"):
        EasyCache(threshold=0.1, error=0.2)
    with pytest.raises(ConfigError, match=r"^easycache\.error.*got 0"):
        EasyCache(error=0.0)


def test_what_is_no_number_is_computed_by_a_bounded_error():
    driven = Driven(EasyCache(error=1e9, warmup_steps=2), lambda step, branch: (torch.zeros(1, 4, 3),))
    run_through(driven, lambda step: 0 * LATENTS[0], 8)  # 0 / 0
    assert driven.drawn(steps=8) == "########"


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
