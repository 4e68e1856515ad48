"""The study of attention calls: real layouts, presets' rules, lines and the table."""

import dataclasses
import json

import attention_calls
import numpy as np
import pytest
import torch
from attention_calls import Attention, handler_of, sparse_call, timed
from attention_table import DENSE, SPARSE, last_of
from dit_accel_eval.bench.shapes import named_shapes
from dit_accel_eval.runs.results import read_lines
from study import RESULTS
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import SolAttention
from dit_accel.estimate.prediction import KERNEL_COST
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.presets import PRESETS

SMALL = "wan2.1-1.3b:128x128x17"  # 320 tokens, 5 tiles


def attention(name=SMALL, heads=1):
    return Attention(shape=named_shapes(name)[0], heads=heads, dtype=torch.float32, rate=1e11)


@pytest.fixture
def quick(monkeypatch):
    """Fixed rates in place of those that are measured."""
    monkeypatch.setattr(attention_calls, "dense_rate", lambda dtype: 1e11)
    monkeypatch.setattr(attention_calls, "feed_forward_rate", lambda family, dtype: 2e11)


def lines_of(name=SMALL, rounds=2, flex=False):
    one = attention(name)
    arms = [arm for arm in one.arms if flex or arm.backend != "flex"]
    return list(timed(one, arms, rounds, np.inf))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("flux-4mp", "dense by rule: video models alone"),
        ("wan-480p", "dense by rule: below 40,000 visual tokens"),
        ("wan-720p", SPARSE),
    ],
)
def test_arms_are_the_presets_sparse_parts_with_what_their_rule_says(name, rule):
    dense, *others, flex = attention(name).arms
    assert (dense.name, dense.presets) == (DENSE, {"careful": "no sparse part"})
    assert [(arm.name, arm.backend, arm.presets) for arm in others] == [
        ("sol, beta 1", "auto", {"balanced": rule}), ("sol, beta 1.3", "auto", {"fast": rule}),
    ]  # fmt: skip
    assert (flex.name, flex.backend) == ("sol, beta 1, flex", "flex")
    acting = others[0].acting
    assert (acting.min_tokens, acting.dense_steps, acting.dense_layers, acting.beta) == (None, 0, 0, 1.0)


def test_a_line_tells_what_was_measured_and_what_was_predicted(quick):
    dense, sparse, _ = lines_of()
    assert (dense["arm"], dense["density"], dense["ratio"]["median"], dense["rounds"]) == (DENSE, 1.0, 1.0, 2)
    assert (sparse["tokens"], sparse["heads"], sparse["all_heads"], sparse["dtype"]) == (320, 1, 12, "float32")
    assert (sparse["threads"], sparse["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert sparse["predicted"] == pytest.approx(1 / (sparse["pair_density"] * KERNEL_COST))
    assert sparse["min_tokens"] == 40_000
    assert sparse["dense_share"] == pytest.approx(1 - 0.8 * 29 / 30)  # a fifth of the steps, and a layer of thirty
    family, rest = attention().of[1], sparse["rest_seconds"]
    width, tokens = 12 * 128, 320
    linear = (8 + 4) * tokens * width**2 + 4 * tokens * width * family.ffn_dim
    cross = 4 * 512 * width**2 + 4 * tokens * 512 * width
    assert rest == pytest.approx((linear + cross) / 2e11)
    whole = {line["arm"]: 12 * line["seconds"]["median"] for line in (dense, sparse)}
    assert sparse["block_ratio"] == pytest.approx((rest + whole[DENSE]) / (rest + whole["sol, beta 1"]))
    json.dumps([dense, sparse], allow_nan=False)


def test_of_normal_data_sol_keeps_what_its_beta_stands_for(quick):
    """64 tiles of one head, with the diagonal and its neighbours."""
    one = attention("wan2.1-1.3b:256x256x61")
    lines = lines_of(one.shape.name, rounds=1)
    assert lines[0]["tokens"] == 4096
    for arm, line in zip(one.arms[1:], lines[1:], strict=False):
        assert line["density"] == pytest.approx(one.with_methods(arm.acting).tiles.density, abs=0.02)


def sparse_result(beta, tokens=320):
    one = attention(heads=2)
    arm = dataclasses.replace(one.arms[1], config=SolAttention(beta=beta))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 128) for _ in range(3))
    return (q, k, v), sparse_call(*handler_of(arm, one), q, k, v)


def test_a_call_that_keeps_every_tile_is_dense_attention():
    (q, k, v), (_, out, _) = sparse_result(-8.0)
    assert torch.allclose(out, scaled_dot_product_attention(q, k, v), atol=1e-5)


def test_a_call_is_planned_as_an_attachment_plans_it():
    (_, k, _), (plan, _, exact) = sparse_result(1.0)
    (handler,) = make_handlers([PRESETS["balanced"][1].config], attention().model(2))
    assert plan.selection.routing.beta == handler.settings.beta == 1.0
    assert plan.tiles.block_q == handler.settings.block_size == 64
    assert exact.shape == (1, 2, 5, 1)
    assert plan.tiles.num_k == k.shape[2]


@pytest.mark.slow
def test_flexattention_runs_by_the_same_tiles(quick):
    lines = {line["arm"]: line for line in lines_of(rounds=1, flex=True)}
    assert lines["sol, beta 1, flex"]["density"] == lines["sol, beta 1"]["density"]


def test_an_arm_that_can_not_run_here_is_left_out_with_its_reason(quick):
    one = attention()
    dense, sparse = one.arms[:2]
    other = dataclasses.replace(sparse, name="sol by fa4", backend="fa4")
    lines = {line["arm"]: line for line in timed(one, [dense, sparse, other], 1, np.inf)}
    assert "fa4" in lines["sol by fa4"]["reason"]
    assert "seconds" in lines["sol, beta 1"]


def test_what_the_budget_has_no_time_for_says_so(quick, tmp_path, capsys):
    """At 1e11 FLOP/s a dense call of 32,760 tokens and 128 channels takes 5.5 s."""
    out = tmp_path / "calls.jsonl"
    assert attention_calls.main(["--shapes", "wan-480p", "--budget", "5", "--out", str(out)]) == 0
    lines = read_lines(out)
    assert [(line["dtype"], "reason" in line) for line in lines] == [("float32", True)] * 4 + [("bfloat16", True)] * 4
    assert "would take about 5 s more than a budget of 5 s has left" in capsys.readouterr().out


def test_of_lines_that_are_alike_the_last_measured_one_counts():
    early = next(line for line in read_lines(RESULTS / "attention-shapes.jsonl") if "seconds" in line)
    late = {**early, "rounds": 9}
    left_out = {"reason": "no time", **{name: value for name, value in early.items() if name != "seconds"}}
    assert last_of([early, late]) == last_of([left_out, late]) == last_of([late, left_out]) == [late]
    assert len(last_of([late, {**late, "dtype": "another"}, {**late, "threads": 1}])) == 3
