"""Searched schedules: the costs of gaps against the engine's own forecasts, the lists against trying all of them."""

import itertools

import numpy as np
import pytest
import torch
from cache_calls import Driven, run_through, still
from dit_accel_eval.tune.skip_costs import SkipCosts, best_lists, grown, searched

from dit_accel import StaticCache

STEPS = 9
PREDICTORS = [("hold", 1), ("taylor", 1), ("taylor", 2), ("heun", 1), ("chebyshev", 1)]
LISTS = [(0,), (0, 3), (0, 1, 4, 5), (0, 2, 3, 6), (0, 2, 4, 7)]


def run_of(seed, prompts=2, size=6):
    """Return what a made-up run stores, [P, N, size], and the products of its steps."""
    stored = np.random.default_rng(seed).normal(size=(prompts, STEPS, size)).cumsum(1)
    return stored, np.einsum("pid,pjd->pij", stored, stored) / size


def costs_of(products, predictor="taylor", order=1, weights=None):
    times = [float(step) for step in range(STEPS)] + [STEPS - 1.0]
    weights = np.ones(STEPS) if weights is None else weights
    weights = np.broadcast_to(weights, (len(products), STEPS))
    return SkipCosts(products=products, weights=weights, times=times, predictor=predictor, order=order)


def gaps(path):
    return zip([path[: i + 1] for i in range(len(path))], [*path[1:], STEPS], strict=True)


def test_forecasts_are_the_engines():
    stored, products = run_of(0, prompts=1)
    values = torch.tensor(stored[0])
    for predictor, order in PREDICTORS:
        costs = costs_of(products, predictor, order)
        for path in LISTS:
            steps = tuple(int(step in path) for step in range(STEPS))
            listed = StaticCache(steps=steps, predictor=predictor, order=order, stored="output")
            driven = Driven(listed, lambda step, branch: (values[step].reshape(1, 2, 3),))
            outputs = [out["cond"].reshape(-1).numpy() for out in run_through(driven, still, steps=STEPS)]
            for so_far, upto in gaps(path):
                expected = np.array(outputs[so_far[-1] + 1 : upto]).reshape(-1, stored.shape[2])
                np.testing.assert_allclose(costs.forecasts(so_far, upto) @ stored[0], expected, rtol=1e-6, atol=1e-9)


def test_a_gap_costs_the_square_of_its_summed_weighted_errors():
    for predictor, order in PREDICTORS:
        stored, products = run_of(1)
        weights = np.random.default_rng(2).uniform(0.1, 1, (2, STEPS))
        costs = costs_of(products, predictor, order, weights)
        for path in LISTS:
            for so_far, upto in gaps(path):
                skipped = slice(so_far[-1] + 1, upto)
                off = costs.forecasts(so_far, upto) @ stored - stored[:, skipped]
                moved = (weights[:, skipped, None] * off).sum(1)
                assert costs(so_far, upto) == pytest.approx((moved**2).mean(), abs=1e-12)
            assert costs.of_list(path).mean() == pytest.approx(total(costs, path))


def total(costs, path):
    return sum(costs(so_far, upto) for so_far, upto in gaps(path))


def test_the_best_list_of_each_length_is_the_best_of_all():
    for predictor in ("hold", "taylor"):
        costs = costs_of(run_of(2)[1], predictor, 1, np.linspace(2, 1, STEPS))
        found = best_lists(costs, STEPS, STEPS)
        assert [*found] == [*range(1, STEPS + 1)]
        for count, (cost, path) in found.items():
            every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
            best = min(total(costs, one) for one in every)
            assert cost == pytest.approx(best, abs=1e-12)
            assert total(costs, path) == pytest.approx(best, abs=1e-12)
            assert (len(path), path[0]) == (count, 0)
        assert found[STEPS] == (0.0, tuple(range(STEPS)))


def test_where_forecasts_read_further_back_the_list_beats_nearly_all():
    for predictor, order in [("taylor", 2), ("heun", 1), ("chebyshev", 1)]:
        costs = costs_of(run_of(3)[1], predictor, order)
        cost, path = best_lists(costs, STEPS, 4)[4]
        every = sorted(total(costs, (0, *rest)) for rest in itertools.combinations(range(1, STEPS), 3))
        assert cost == pytest.approx(total(costs, path))
        assert cost <= every[len(every) // 20]


def test_a_run_that_lies_on_a_line_is_skipped_after_two_steps():
    line = np.arange(STEPS, dtype=float)[None, :, None] * np.ones((1, 1, 3))
    costs = costs_of(np.einsum("pid,pjd->pij", line, line))
    cost, path = best_lists(costs, STEPS, 2)[2]
    assert cost == pytest.approx(0, abs=1e-9)
    assert path[0] == 0
    assert path[1] == 1


def test_hard_prompts_count_no_more_than_easy_ones():
    products, weights = run_of(5, prompts=3)[1], np.random.default_rng(6).uniform(0.1, 1, (3, STEPS))
    found = searched(costs_of(products, weights=weights), 4)
    harder = products * np.array([1.0, 1e4, 1.0])[:, None, None]
    assert [path for _, path in searched(costs_of(harder, weights=weights), 4).values()] == [
        path for _, path in found.values()
    ]
    costs = costs_of(products, weights=weights)
    errors = {rest: np.log(costs.of_list((0, *rest))).mean() / 2 for rest in itertools.combinations(range(1, STEPS), 3)}
    assert np.log(found[4][0]) == pytest.approx(errors[found[4][1][1:]])
    assert errors[found[4][1][1:]] <= sorted(errors.values())[2]


def test_a_list_without_skips_costs_nothing():
    assert searched(costs_of(run_of(7)[1]), STEPS)[STEPS] == (0.0, tuple(range(STEPS)))


def test_growth_is_that_of_the_two_runs_from_where_they_have_settled():
    moved = [0, 0, 9, 5, 2, 2, 4, 8]  # step 1 was skipped
    np.testing.assert_allclose(grown(moved, 1), [4, 4, 4, 4, 4, 2, 1])
    np.testing.assert_allclose(grown([0.0] * 5, 1), np.ones(4))
