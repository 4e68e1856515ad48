"""Rules of sparse attention that are tried: their arithmetic, what they count, one run, and the tables."""

import json
from dataclasses import replace

import frontier_sparse
import pytest
import torch
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.suites.arms import Arm
from frontier_sparse import BASES, IDEAS, arms_of, calls_table, run_tried, table
from one_layer import context_of, random_call
from study import RESULTS
from tried_rules import Rule, dense_call, fewest, most, token_order
from tried_sparse import Beside, Tried

from dit_accel.plan.layout import TokenLayout

LAYOUT = TokenLayout(frames=4, height=4, width=8, text_after=16)
RULE = Rule(warm=1, every=0, first=0, density=0.25)
RESTS = ("cached", "delta", "delta, fresh weight", "delta of pooled", "fresh output", "fresh weight", "exact lists")


def steps(rule: Rule, *calls):
    """Give the output of calls that follow each other, and what computed them."""
    tried = Tried(rule)
    return [tried.attend(call, context_of(LAYOUT, step_index=step)) for step, call in enumerate(calls)], tried


@pytest.mark.parametrize("rest", RESTS)
def test_a_step_like_the_last_dense_one_is_dense_whatever_stands_for_the_rest(rest):
    call = random_call(LAYOUT, dtype=torch.float32)
    (first, second), tried = steps(replace(RULE, rest=rest), call, call)
    torch.testing.assert_close(first, dense_call(call).out)
    torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-4)
    assert tried.errors == pytest.approx([0.0], abs=1e-5)


def test_what_is_skipped_is_left_out_and_counted():
    one, two = (random_call(LAYOUT, dtype=torch.float32) for _ in range(2))
    (_, out), tried = steps(replace(RULE, rest="skip"), one, two)
    dense, tiles = dense_call(one), (LAYOUT.tokens + 15) // 16
    mass = dense.p.unflatten(2, (tiles, 16)).unflatten(-1, (tiles, 16)).sum((3, 5))[..., :-1, :-1]
    keep = torch.ones(2, 2, tiles, tiles, dtype=torch.bool)
    keep[..., :-1, :-1] = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.topk(2, -1).indices, True)
    keys = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)
    logits = (two.q.float() @ two.k.float().mT * two.q.shape[-1] ** -0.5).masked_fill(~keys, -torch.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ two.v.float(), atol=1e-5, rtol=1e-4)
    assert tried.shares == pytest.approx([1.0, float(keep.float().mean())])
    assert tried.errors[0] > 0.05


def test_the_difference_and_the_merged_rest_are_what_their_names_say():
    one, two = (random_call(LAYOUT, dtype=torch.float32) for _ in range(2))
    sparse = [steps(replace(RULE, rest="skip"), one, call)[0][1] for call in (one, two)]
    (first, out), _ = steps(replace(RULE, rest="delta"), one, two)
    torch.testing.assert_close(out, sparse[1] + first - sparse[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out, steps(replace(RULE, rest="cached"), one, two)[0][1], atol=1e-2)


def test_rows_layers_and_all_take_turns():
    calls = [random_call(LAYOUT, dtype=torch.float32) for _ in range(4)]
    whole, part = 1.0, steps(replace(RULE, rest="skip"), *calls[:2])[1].shares[1]
    for turn, expected in (("layers", [whole, part, whole, part]), ("all", [whole, part, whole, part])):
        assert steps(replace(RULE, every=2, turn=turn), *calls)[1].shares == pytest.approx(expected)
    outputs, tried = steps(replace(RULE, every=2, turn="rows"), *calls)
    for step in (1, 2, 3):
        rows = ((torch.arange(9) + step) % 2 == 0).repeat_interleave(16)
        dense = dense_call(calls[step]).out
        torch.testing.assert_close(outputs[step][:, :, rows], dense[:, :, rows])
        assert not torch.allclose(outputs[step][:, :, ~rows][:, :, :48], dense[:, :, ~rows][:, :, :48], atol=1e-3)
        assert part < tried.shares[step] < 1


def test_budgets_and_orders():
    scores = torch.rand(1, 2, 4, 8)
    assert most(scores, 3, 1).sum() == 2 * 4 * 3
    assert 20 <= most(scores, 20, 3).sum() <= 20 + 8
    assert (most(scores, 1, 3).sum(-1) >= 1).all()
    held = (scores * fewest(scores, 0.6)).sum(-1) / scores.sum(-1)
    assert (held >= 0.6 - 1e-6).all()
    assert not fewest(scores, 0.6).all()
    for order in ("patches", "cubes", "columns"):
        found = token_order(order, LAYOUT)
        assert found is not None
        assert torch.equal(found.sort().values, torch.arange(LAYOUT.tokens))
        assert torch.equal(found[-16:], torch.arange(128, 144))
        tile = found[:16]
        assert len({int(token) % 32 % 8 for token in tile}) == (4 if order == "patches" else 2)
    assert token_order("raster", LAYOUT) is None


def test_a_run_by_a_rule_counts_what_it_computes_and_differs_from_the_dense_one():
    model, arm = EmbeddedModel("flux-tiny", {}), Arm(name="any", num_inference_steps=3)
    rule = Rule(warm=1, every=0, density=0.3, rest="skip")
    made, tried = run_tried(model, 16, arm, 0.0, rule)
    dense, none = run_tried(model, 16, arm, 0.0, None)
    assert none is None
    assert len(tried.shares) == 3 * 12 * 2
    assert sum(share < 1 for share in tried.shares) == 2 * 11 * 2
    assert made.counts == dense.counts
    assert abs(made.frames - dense.frames).max() > 1e-3
    beside = [Tried(rule), Tried(replace(rule, rest="delta"))]
    same = frontier_sparse.run_by(Beside(beside), model, 16, arm)
    assert abs(same.frames - dense.frames).max() < 1e-3
    assert all(len(one.errors) == 2 * 11 * 2 for one in beside)
    assert beside[0].errors[:22] != beside[1].errors[:22]


def test_names_choose_arms_and_tables_show_what_ran():
    assert len(arms_of("")) == len(BASES) * len(IDEAS)
    assert [*arms_of("12 | delta;20 | skip")] == ["12 | delta", "20 | skip"]
    lines = [json.loads(line) for line in (RESULTS / "frontier-sparse.jsonl").read_text().splitlines()]
    shown = table(lines)
    for line in lines:
        if "|" in line["arm"]:
            assert f"| {line['arm']} |" in shown
    calls = [json.loads(line) for line in (RESULTS / "frontier-calls.jsonl").read_text().splitlines()]
    assert calls_table(calls).count("\n") == 1 + len({(line["model"], line["arm"]) for line in calls})
