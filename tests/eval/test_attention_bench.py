"""The bench of attention calls: real layouts, presets' rules, a budget that is kept, lines and the table."""

import dataclasses
import json
import time

import pytest
import torch
from dit_accel_eval.bench import attention_budget, attention_timing
from dit_accel_eval.bench.attention_budget import Machine, key_of, plan_groups
from dit_accel_eval.bench.attention_shapes import DENSE, SHAPES, SPARSE, arms_of, shapes_of
from dit_accel_eval.bench.attention_table import COLUMNS, PAYS, cells, last_of, page_text, run_ratio, verdicts
from dit_accel_eval.bench.attention_timing import run_groups, sparse_call
from dit_accel_eval.runs.results import read_lines
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from dit_accel import SolAttention
from dit_accel.cli.app import app
from dit_accel.estimate.estimate import KERNEL_COST
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.presets import PRESETS

SMALL = "wan2.1-1.3b:128x128x17"  # 320 tokens, 5 tiles
CPU = torch.device("cpu")


def machine(**options):
    return Machine(**{"device": CPU, "heads": 1, "most_rounds": 2, "limit": 1000.0, **options})


def without_flex(shape):
    return [arm for arm in arms_of(shape) if arm.backend != "flex"]


@pytest.fixture
def quick(monkeypatch):
    """Fixed rates in place of those that are measured, and no FlexAttention, which would compile."""
    monkeypatch.setattr(attention_budget, "dense_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(attention_timing, "feed_forward_rate", lambda shape, device, dtype: 2e11)
    monkeypatch.setattr(attention_budget, "arms_of", without_flex)


@pytest.fixture
def fixed_rate(monkeypatch):
    monkeypatch.setattr(attention_budget, "dense_rate", lambda device, dtype: 1e11)


def planned(names, *, budget=1e6, known=(), dtypes=(torch.float32,), **options):
    return plan_groups(shapes_of(names), dtypes, machine(**options), budget, known)


def timed(names, known=(), deadline=1e6, **options):
    groups = planned(names, known=known, **options)
    return [line for lines in run_groups(groups, machine(**options), time.perf_counter() + deadline, print)
            for line in lines]  # fmt: skip


def test_the_named_shapes_are_the_sequences_of_the_released_models():
    """Tokens by hand: latents of an eighth, patches of two, a frame and one for every four; text where it joins."""
    assert {name: shape.layout.tokens for name, shape in SHAPES.items()} == {
        "flux-1mp": 64 * 64 + 512, "flux-4mp": 128 * 128 + 512, "wan-480p": 21 * 30 * 52, "wan-720p": 21 * 45 * 80,
        "hunyuan-720p": 33 * 45 * 80 + 256,
    }  # fmt: skip
    assert (SHAPES["flux-1mp"].layout.text_before, SHAPES["hunyuan-720p"].layout.text_after) == (512, 256)
    heads = {name: (shape.of[1].heads, shape.of[1].head_dim) for name, shape in SHAPES.items()}
    assert heads == {"flux-1mp": (24, 128), "flux-4mp": (24, 128), "wan-480p": (12, 128), "wan-720p": (40, 128),
                     "hunyuan-720p": (24, 128)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("flux-4mp", "dense by rule: video models alone"),
        ("wan-480p", "dense by rule: below 40,000 visual tokens"),
        ("wan-720p", SPARSE),
    ],
)
def test_arms_are_the_presets_sparse_parts_with_what_their_rule_says(name, rule):
    dense, *others, flex = arms_of(SHAPES[name])
    assert (dense.name, dense.presets) == (DENSE, {"careful": "no sparse part"})
    assert [(arm.name, arm.backend, arm.presets) for arm in others] == [
        ("sol, beta 1", "auto", {"balanced": rule}), ("sol, beta 1.3", "auto", {"fast": rule}),
    ]  # fmt: skip
    assert (flex.name, flex.backend) == ("sol, beta 1, flex", "flex")
    acting = others[0].config
    assert (acting.min_tokens, acting.dense_steps, acting.dense_layers, acting.beta) == (None, 0, 0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench needs --family NAME, such as wan2.1-1.3b, or --shapes all"),
        (["--shapes", "wan-48p"], "no shape is called 'wan-48p'; did you mean 'wan-480p'?"),
        (["--shapes", "wan2.1-1.3:480x832x81"], "no model family is called 'wan2.1-1.3'; did you mean"),
        (["--shapes", "wan2.1-1.3b:481x832x81"], "height must be a multiple of 16 for wan2.1-1.3b, got 481"),
        (["--shapes", ","], "--shapes names none; say all, or some of flux-1mp"),
        (["--shapes", "wan-480p", "--heads", "13"], "wan2.1-1.3b has 12 heads, got --heads 13; ask for 1 to 12"),
        (["--shapes", "all", "--family", "sd3-medium"], "which take no --family; leave it out"),
        (["--shapes", "all", "--num-frames", "5", "--layers", "3"], "which take no --layers, --num-frames; leave"),
        (["--shapes", "all", "--radial"], "which take no --radial; leave it out"),
        (["--family", "wan2.1-1.3b", "--heads", "3"], "--heads is for attention calls alone; leave it out"),
        (["--shapes", "all", "--dtype", "float23"], "no dtype is called 'float23'; did you mean 'float32'?"),
        (["--shapes", "all", "-o", "/no/folder/x.jsonl"], "is not a folder; create it first"),
    ],
)
def test_what_can_not_be_timed_is_one_clear_error(arguments, message):
    found = CliRunner().invoke(app, ["bench", *arguments])
    assert found.exit_code == 2
    assert message in found.stderr


def test_rounds_go_first_then_flexattention_then_the_longest_shapes(fixed_rate):
    names = "flux-1mp,wan-480p"
    whole = planned(names, most_rounds=3)
    assert [(group.shape.name, group.rounds, len(group.arms)) for group in whole] == [
        ("flux-1mp", 3, 4), ("wan-480p", 3, 4),
    ]  # fmt: skip
    single = sum(group.expected(1) for group in whole)
    fewer = planned(names, most_rounds=3, budget=single + 1)
    assert [group.rounds for group in fewer][1] == 1
    assert all(len(group.arms) == 4 for group in fewer)
    no_flex = planned(names, most_rounds=3, budget=single - 1)
    assert [len(group.arms) for group in no_flex] == [4, 3]
    (reason,) = no_flex[1].left_out.values()
    assert f"a budget of {single - 1:,.0f} s" in reason
    short = planned(names, most_rounds=3, budget=0.5 * whole[0].expected(1))
    assert [[arm.backend for arm in group.arms] for group in short] == [[None, "auto", "auto"], []]
    for groups, budget in ((fewer, single + 1), (no_flex, single - 1), (short, 0.5 * whole[0].expected(1))):
        assert sum(group.expected() for group in groups) <= budget


def test_no_arm_takes_longer_than_the_limit(fixed_rate):
    (group,) = planned("wan-480p", most_rounds=50, limit=30.0)
    assert group.rounds == int(30 / group.seconds)
    assert group.seconds == pytest.approx(4 * 32_760**2 * 128 / 1e11)
    assert [arm.name for arm in group.left_out] == []
    (group,) = planned("wan-480p", limit=15.0)
    assert list(group.left_out.values()) == ["sol, beta 1, flex would take about 25 s, the limit is 15"]
    (group,) = planned("wan-480p", limit=5.0)
    assert (group.arms, len(group.left_out)) == ([], 4)


def test_a_line_tells_what_was_measured_and_what_was_predicted(quick):
    dense, sparse, _ = timed(SMALL)
    shape = shapes_of(SMALL)[0]
    assert (dense["arm"], dense["density"], dense["ratio"]["median"], dense["rounds"]) == (DENSE, 1.0, 1.0, 2)
    assert (sparse["tokens"], sparse["heads"], sparse["all_heads"], sparse["dtype"]) == (320, 1, 12, "float32")
    assert (sparse["threads"], sparse["torch"]) == (torch.get_num_threads(), torch.__version__)
    assert sparse["predicted"] == pytest.approx(1 / (sparse["pair_density"] * KERNEL_COST))
    assert 0 < sparse["error"] < 1e-5
    assert (sparse["min_tokens"], sparse["steps"]) == (40_000, 50)
    assert sparse["dense_share"] == pytest.approx(1 - 0.8 * 29 / 30)  # a fifth of the steps, and a layer of thirty
    family, rest = shape.of[1], sparse["rest_seconds"]
    width, tokens = 12 * 128, 320
    linear = (8 + 4) * tokens * width**2 + 4 * tokens * width * family.ffn_dim
    cross = 4 * 512 * width**2 + 4 * tokens * 512 * width
    assert rest == pytest.approx((linear + cross) / 2e11)
    whole = {line["arm"]: 12 * line["seconds"]["median"] for line in (dense, sparse)}
    assert sparse["block_ratio"] == pytest.approx((rest + whole[DENSE]) / (rest + whole["sol, beta 1"]))
    assert dense["attention_share"] == pytest.approx(whole[DENSE] / (whole[DENSE] + rest))
    json.dumps([dense, sparse], allow_nan=False)


def test_of_normal_data_sol_keeps_what_its_beta_stands_for(quick):
    """64 tiles of one head, with the diagonal and its neighbours."""
    lines = timed("wan2.1-1.3b:256x256x61", most_rounds=1)
    assert lines[0]["tokens"] == 4096
    for line in lines[1:]:
        assert line["density"] == pytest.approx(line["expected_density"], abs=0.02)


def sparse_result(beta, tokens=320):
    shape = shapes_of(SMALL)[0]
    arm = arms_of(shape)[1]
    arm = dataclasses.replace(arm, choice=dataclasses.replace(arm.choice, config=SolAttention(beta=beta)))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 128) for _ in range(3))
    handler, context, backend = attention_timing._handler_of(arm, machine(heads=2), shape)
    return (q, k, v), sparse_call(handler, context, backend, q, k, v)


def test_a_call_that_keeps_every_tile_is_dense_attention():
    (q, k, v), (_, out, _) = sparse_result(-8.0)
    assert torch.allclose(out, scaled_dot_product_attention(q, k, v), atol=1e-5)


def test_a_call_is_planned_as_an_attachment_plans_it():
    shape = shapes_of(SMALL)[0]
    (_, k, _), (plan, _, exact) = sparse_result(1.0)
    (handler,) = make_handlers([PRESETS["balanced"][1].config], shape.model(2))
    assert plan.selection.routing.beta == handler.settings.beta == 1.0
    assert plan.tiles.block_q == handler.settings.block_size == 64
    assert exact.shape == (1, 2, 5, 1)
    assert plan.tiles.num_k == k.shape[2]


def test_a_wrong_output_shows_as_an_error():
    qkv, (plan, out, exact) = sparse_result(1.0)
    assert attention_timing._error(plan, exact, *qkv, out) < 1e-5
    out[:, -1, :64] = 0
    assert attention_timing._error(plan, exact, *qkv, out) > 0.1


def test_an_arm_that_can_not_run_here_is_left_out_with_its_reason(quick, monkeypatch):
    def with_fa4(shape):
        dense, sparse, _ = without_flex(shape)
        return [dense, sparse, dataclasses.replace(sparse, name="sol by fa4", backend="fa4")]

    monkeypatch.setattr(attention_budget, "arms_of", with_fa4)
    monkeypatch.setattr(attention_budget, "OVER_DENSE", {"auto": 1.0, "fa4": 1.0})
    lines = {line["arm"]: line for line in timed(SMALL)}
    assert "fa4" in lines["sol by fa4"]["reason"]
    assert "seconds" in lines["sol, beta 1"]


def test_what_is_there_is_not_timed_again(quick):
    lines = timed(SMALL)
    assert planned(SMALL, known=lines) == []
    again = timed(SMALL, known=[lines[0], lines[1]])
    assert [line["arm"] for line in again] == [lines[2]["arm"]]
    assert key_of(again[0]) == key_of(lines[2])
    assert len(timed(SMALL, known=[line | {"heads": 2} for line in lines])) == 3
    left_out = [line | {"reason": "no time"} for line in lines]
    assert len(timed(SMALL, known=left_out)) == 3


def test_when_the_time_is_over_nothing_more_begins(quick):
    lines = timed(SMALL, deadline=0.0)
    assert len(lines) == 3
    assert all("0 s of the budget were left" in line["reason"] for line in lines)


def test_a_file_of_other_lines_is_refused(quick, tmp_path):
    out = tmp_path / "models.jsonl"
    out.write_text('{"arm": "radial"}\n')
    found = CliRunner().invoke(app, ["bench", "--shapes", SMALL, "-o", str(out)])
    assert found.exit_code == 2
    assert "has lines that are none of bench --shapes; name another file" in found.stderr.replace("\n", " ")
    assert out.read_text() == '{"arm": "radial"}\n'


@pytest.mark.slow
def test_flexattention_gives_the_same_by_the_same_tiles(monkeypatch):
    monkeypatch.setattr(attention_timing, "feed_forward_rate", lambda shape, device, dtype: 2e11)
    lines = {line["arm"]: line for line in timed(SMALL, most_rounds=1)}
    ours, flex = lines["sol, beta 1"], lines["sol, beta 1, flex"]
    assert flex["density"] == ours["density"]
    assert flex["error"] < 1e-5


def test_rates_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(attention_budget, "PROBE_TOKENS", 256)
    monkeypatch.setattr(attention_budget, "SLICE", 16)
    monkeypatch.setattr(attention_timing, "SLICE", 16)
    shape = shapes_of(SMALL)[0]
    for rate in (
        attention_budget.dense_rate(CPU, torch.float32), attention_timing.feed_forward_rate(shape, CPU, torch.float32)
    ):  # fmt: skip
        assert 1e8 < rate < 1e14


def made(tokens, ratio, block, **others):
    """A line of the curve of Sol at beta 1."""
    quartiles = {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    return {
        "shape": f"s{tokens}", "family": "f", "height": 64, "width": 96, "num_frames": 5, "tokens": tokens,
        "visual_tokens": tokens, "heads": 2, "all_heads": 12, "head_dim": 128, "inputs": "standard normal",
        "arm": "sol, beta 1", "methods": {}, "backend": "auto", "presets": {"balanced": SPARSE}, "dtype": "float32",
        "device": "a processor", "threads": 2, "torch": "2", "density": 0.17, "rounds": 3, "seconds": quartiles,
        "ratio": quartiles, "block_ratio": block, "dense_share": 0.2, "predicted": 4.0, "predicted_by_table": 4.5,
        "min_tokens": 40_000, "load": 0.1, **others,
    }  # fmt: skip


def test_a_run_gains_less_than_a_block():
    line = made(50_000, 4.0, 2.0)
    assert run_ratio(line) == pytest.approx(1 / (0.2 + 0.8 / 2))
    assert cells(line) == (
        "s50000", "50,000", "float32", "sol, beta 1", "balanced", "0.170", "4 [3.9, 4.1]", "4.00 [3.90, 4.10]", "4.00",
        "4.50", "2.00", "1.67",
    )  # fmt: skip
    assert len(cells(line | {"reason": "no time"})) == len(COLUMNS)


def test_the_threshold_is_held_against_the_clock_both_ways():
    short, long = made(5_000, 2.0, 1.5), made(75_600, 4.0, 2.5)
    (text,) = verdicts([short, long])
    assert "5,000: 2.0 / 1.36, 75,600: 4.0 / 1.92" in text
    assert "the presets' 40,000 is too high on this machine" in text
    assert f"{PAYS:g} times as fast at 5,000 too" in text
    assert "From 40,000 on all that was measured pays" in text
    (text,) = verdicts([made(5_000, 1.2, 1.05), made(75_600, 1.2, 1.05)])
    assert "Below the presets' 40,000 no measured run would be 1.1 times as fast" in text
    assert "At 75,600 the rule switches it on, and a run would not be 1.1 times as fast" in text
    assert verdicts([made(5_000, 2.0, 1.5, arm=DENSE, backend=None, min_tokens=None)]) == []


def test_of_lines_that_are_alike_the_last_measured_one_counts():
    early, late = made(5_000, 2.0, 1.5), made(5_000, 3.0, 1.5)
    left_out = {"reason": "no time", **{name: value for name, value in early.items() if name != "seconds"}}
    assert last_of([early, late]) == [late]
    assert last_of([left_out, late]) == [late]
    assert last_of([late, left_out]) == [late]
    assert len(last_of([late, made(5_000, 3.0, 1.5, dtype="bfloat16"), made(5_000, 3.0, 1.5, threads=1)])) == 3


def test_the_page_says_where_and_how_it_was_measured():
    text = page_text([made(5_000, 2.0, 1.5), made(75_600, 4.0, 2.5, device="another", rounds=1)])
    assert (
        "a processor, 2 threads, torch 2; rounds: 3; standard normal inputs; s5000 is f at 64 x 96 x 5, 2 of its"
        in text
    )
    assert "another, 2 threads, torch 2; rounds: 1;" in text
    assert "load before the measurement was 0.1 at most" in text
    assert text.count("| shape | tokens |") == 2


def test_the_command_tells_its_plan_prints_the_table_and_goes_on(quick, tmp_path):
    out = tmp_path / "shapes.jsonl"
    arguments = ["bench", "--shapes", SMALL, "--heads", "1", "--rounds", "1", "--budget", "60", "-o", str(out)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "heads of each call: 1; about " in found.stderr
    assert "of at most 60 s (--budget)" in found.stderr
    assert f"{SMALL}, bfloat16: 3 calls in turn, rounds: 1" in found.stderr
    assert f"{SMALL} is wan2.1-1.3b at 128 x 128 x 17, 1 of its 12 heads of 128" in found.stdout
    assert "balanced: dense by rule: below 40,000 visual tokens" in found.stdout
    assert "x dense" in found.stdout
    lines = read_lines(out)
    assert [(line["dtype"], line["arm"]) for line in last_of(lines)][:2] == [
        ("float32", DENSE),
        ("float32", "sol, beta 1"),
    ]
    assert len(lines) == 6
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert "nothing is left to time" in again.stderr
    assert json.loads(again.stdout) == lines == read_lines(out)
