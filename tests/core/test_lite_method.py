"""LiteAttention call by call on random queries and keys: votes, bits, budgets, ranges and thresholds."""

import itertools
import math

import pytest
import torch
from dit_accel_kernels import Routing, Vote, pack_bits, unpack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from lite_calls import BLOCK, MODEL, Calls, drifting

from dit_accel import LiteAttention
from dit_accel.errors import ConfigError
from dit_accel.methods.attention.lite.handler import LiteHandler
from dit_accel.methods.attention.lite.lite_config import THRESHOLDS
from dit_accel.methods.attention.lite.ranges import range_tiles
from dit_accel.methods.attention.lite.thresholds import LiteThresholds, read_thresholds, write_thresholds
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import Tiling

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
ALL = dict(threshold=1e6, allow_positive_threshold=True)


@BACKENDS
@pytest.mark.parametrize("must_keep", [(), (20, 40)])
def test_a_huge_threshold_leaves_the_first_tile_and_what_must_be_kept(backend, must_keep):
    calls = Calls(LiteAttention(**ALL, must_keep=must_keep, bidirectional=False), backend=backend)
    expected = torch.tensor([True, bool(must_keep), bool(must_keep), False, False])  # of 16 to 48: tokens 20 to 40
    for step, x in enumerate(drifting(calls.tokens, 4)):
        calls.run(*x)
        assert torch.equal(calls.exact(), expected.expand_as(calls.exact()) if step else calls.exact() | True)


@BACKENDS
@pytest.mark.parametrize("protect_text", [True, False])
def test_text_rows_and_columns_stay_whatever_the_threshold(backend, protect_text):
    calls = Calls(LiteAttention(**ALL, protect_text=protect_text), text=9, backend=backend)
    for x in drifting(calls.tokens, 3):
        calls.run(*x)
    exact, text = calls.exact(), calls.layout.visual_tokens // BLOCK
    assert exact[:, :, text:].all() == exact[..., text:].all() == protect_text
    assert not exact[:, :, :text, :text].all()
    assert ("lets the 9 text tokens" in str(calls.handler.check_layout(calls.layout))) != protect_text


@BACKENDS
@pytest.mark.parametrize("config", [
    dict(threshold=-1.0), dict(criterion="mass", threshold=0.02), dict(criterion="budget", threshold=0.9)
])  # fmt: skip
def test_the_first_call_is_dense_bits_only_fall_and_outputs_follow_them(backend, config):
    """The votes' own rules are written out in the tests of the kernels."""
    calls, before = Calls(LiteAttention(**config), steps=7, backend=backend), None
    for step, (q, k, v) in enumerate(drifting(calls.tokens, 6, sharp=6.0)):
        kept = calls.bits()
        out, exact = calls.run(q, k, v), calls.exact()
        if step == 0:
            assert exact.all()
        else:
            assert torch.equal(exact, unpack_bits(kept, calls.tiles))
            assert not (exact & ~before).any()
            assert exact.any(-1).all()
        before = exact
        mask = exact.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, : calls.tokens, : calls.tokens]
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask))
    assert not before.all()


def test_votes_come_every_so_often_turn_round_each_time_and_end_with_the_run():
    calls = Calls(LiteAttention(threshold=-1.0, detect_every=2), steps=7)
    voted, turned = [], []
    for x in drifting(calls.tokens, 7):
        plan, _ = calls.plan()
        voted.append(plan.selection.vote is not None)
        turned.append(plan.selection.reverse)
        calls.finish(plan, *x)
    assert voted == [True, False, True, False, True, False, False]  # nobody would read the last
    assert [turn for turn, vote in zip(turned, voted, strict=True) if vote] == [False, True, False]
    assert not calls.handler._states
    assert calls.handler.state_bytes() == 4 * 2 * calls.tiles
    calls, dense = Calls(LiteAttention(threshold=-0.5, refresh_every=3)), []
    for x in drifting(calls.tokens, 7):
        calls.run(*x)
        dense.append(bool(calls.exact().all()))
    assert dense == [True, False, False, True, False, False, True]


def test_dense_steps_and_layers_leave_the_state_alone():
    calls = Calls(LiteAttention(dense_steps=2, dense_layers=1, dense_last_steps=1), steps=6)
    active = [calls.handler.is_active(calls.context(step), 1) for step in range(6)]
    assert active == [False, False, True, True, True, False]
    assert not calls.handler.is_active(calls.context(3), 0)
    assert not calls.handler.is_active(calls.context(3, training=True), 1)
    votes = [calls.plan(step=step)[0].selection.vote is not None for step in (2, 3, 4)]
    assert votes == [True, True, False]  # step 4 is the last that is not dense


def test_rows_layers_branches_and_calls_of_a_forward_do_not_meet():
    """Each key evolves as it does alone, in whatever order they run."""
    places = itertools.product(("cond", "uncond"), (0, 1), (0, 1))
    keys = [dict(branch=branch, layer=layer, row=row) for branch, layer, row in places]
    inputs, alone = [drifting(80, 4, seed=seed) for seed in range(len(keys))], []
    for key, steps in zip(keys, inputs, strict=True):
        calls = Calls(LiteAttention(threshold=-1.0))
        alone.append([(calls.run(*x, **key), calls.exact(), calls.bits(**key))[1:] for x in steps])
    together = Calls(LiteAttention(threshold=-1.0))
    for step in range(4):
        for number in range(8)[:: 1 if step % 2 else -1]:
            together.step = step
            together.run(*inputs[number][step], **keys[number])
            exact, bits = alone[number][step]
            assert torch.equal(together.exact(), exact)
            assert torch.equal(together.bits(**keys[number]), bits)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 80), (2, 80), (1, 96)])
def test_another_batch_or_layout_and_a_reset_begin_anew(batch, tokens):
    calls = Calls(LiteAttention(threshold=-0.5))
    for x in drifting(80, 2):
        calls.run(*x)
    assert not calls.exact().all()
    if (batch, tokens) == (1, 80):
        calls.handler.reset()
    calls.resize(tokens)
    (x,) = drifting(tokens, 1, batch=batch)
    calls.run(*x)
    assert calls.exact().all()


def test_a_plan_kept_for_a_backward_keeps_its_bits_and_a_repeat_gets_the_same():
    calls = Calls(LiteAttention(threshold=-0.5))
    plans = []
    for x in drifting(80, 3):
        plan, _ = calls.plan(differentiate=True)
        kept = None if plan.selection.keep is None else plan.selection.keep.clone()
        again, _ = calls.plan(differentiate=True, repeated=True)
        assert again.selection.vote is None
        assert again.selection.keep is plan.selection.keep
        assert again.selection.reverse == plan.selection.reverse
        calls.finish(plan, *x)
        late, _ = calls.plan(differentiate=True, repeated=True, step=calls.step - 1)
        assert late.selection.keep is plan.selection.keep
        plans.append((plan, kept))
    assert all(kept is None or torch.equal(plan.selection.keep, kept) for plan, kept in plans)
    plan, _ = calls.plan()
    calls.finish(plan, *x)
    with pytest.raises(ConfigError, match=r"layer 0.*step 3.*gradients.*False"):
        calls.plan(repeated=True, step=3)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31), budget=st.sampled_from([0.01, 0.1, 0.4]), every=st.integers(1, 3),
    steps=st.sampled_from([2, 5, 8, None]),
)  # fmt: skip
def test_a_budget_bounds_the_mass_of_every_row_at_every_call(seed, budget, every, steps):
    """Fixed inputs: every row under the budget, whatever the votes' number; drift by D: times 2^(2D) (bound C)."""
    config = LiteAttention(criterion="budget", threshold=budget, detect_every=every)
    for drift in (0.0, 0.05):
        calls, logits, lost = Calls(config, steps=steps), [], []
        for q, k, v in drifting(80, steps or 8, seed=seed, drift=drift, sharp=3.0):
            calls.run(q, k, v)
            logits.append((q @ k.mT) * q.shape[-1] ** -0.5 * math.log2(math.e))
            visited = calls.exact().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
            lost.append(float(((logits[-1] * math.log(2)).softmax(-1) * ~visited).sum(-1).max()))
        largest = max(float((a - b).abs().max()) for a in logits for b in logits)
        assert max(lost) <= budget * 2 ** (2 * largest) + 1e-12


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_a_target_density_is_met_over_all_layers_from_the_second_call_on(target):
    config = LiteAttention(target_density=target, must_skip=(0, 16))
    calls = Calls(config, tokens=160)
    inputs = [drifting(160, 4, seed=layer, sharp=1.0 + 4 * layer, drift=0.05) for layer in range(3)]
    for step in range(4):
        shares = []
        for layer in range(3):
            calls.step = step
            calls.run(*inputs[layer][step], layer=layer)
            shares.append(float(calls.exact().float().mean()))
            assert calls.exact().any(-1).all()
            assert not calls.exact()[..., 0].any()
        assert sum(shares) / 3 == pytest.approx(target if step else 0.9, abs=0.02)
    assert max(shares) > min(shares) + 0.1  # of all layers together, not of each


def test_what_must_be_skipped_is_gone_from_the_first_call_rounded_inward():
    calls = Calls(LiteAttention(threshold=-1e9, must_skip=(10, 50), must_keep=(40, 41)))
    (x,) = drifting(80, 1)
    calls.run(*x)
    assert calls.exact()[0, 0].all(0).tolist() == [True, False, True, True, True]
    with pytest.raises(ConfigError, match=r"lite\.must_skip = \(0, 80\)"):
        Calls(LiteAttention(must_skip=(0, 80))).plan()
    assert torch.isfinite(Calls(LiteAttention(must_skip=(0, 80), rest="pooled")).run(*x)).all()
    with pytest.raises(ConfigError, match=r"lite\.must_keep.* 81.*80"):
        Calls(LiteAttention(must_keep=(0, 81))).handler.check_layout(calls.layout)


def test_dropped_tiles_may_stay_as_their_mean():
    skipped, pooled = (Calls(LiteAttention(threshold=-0.5, rest=rest)) for rest in ("skip", "pooled"))
    errors = {skipped: 0.0, pooled: 0.0}
    for q, k, v in drifting(80, 4, sharp=1.0, drift=0.0):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        for calls in errors:
            errors[calls] += float((calls.run(q, k, v) - expected).norm())
    assert torch.equal(skipped.exact(), pooled.exact())
    assert 0 < errors[pooled] < errors[skipped]


def test_probes_take_back_tiles_that_matter_again():
    calls = Calls(LiteAttention(threshold=-1.0, must_skip=(64, 80)))
    for x in drifting(80, 3):
        calls.run(*x)
    plan, context = calls.plan()
    gaps = torch.full((1, 2, 5, 5), -5.0)
    gaps[..., 2, 1], gaps[..., 3, 1], gaps[..., 2, 4] = 0.0, -0.9, 0.0
    before = unpack_bits(calls.bits(), 5)
    calls.handler.restore_tiles(plan, context, lambda: (gaps, torch.zeros_like(gaps)), 0.5)
    back = unpack_bits(calls.bits(), 5) & ~before
    expected = torch.zeros_like(back)
    expected[..., 2, 1] = ~before[..., 2, 1]
    assert torch.equal(back, expected)
    Calls(LiteAttention(target_density=0.5)).handler.restore_tiles(plan, context, pytest.fail, 0.5)  # asks no probe


def test_another_selection_is_kept_and_added_to():
    pinned = torch.zeros(5, 5, dtype=torch.bool)
    pinned[0] = True
    calls = Calls(LiteAttention(must_keep=(16, 17)))
    base = AttentionPlan().with_tiles(*Tiling(BLOCK).full(calls.layout)).narrow(pinned=pack_bits(pinned))
    plan, _ = calls.plan(base=base.route(Routing(beta=2.0)))
    assert plan.selection.routing == Routing(beta=2.0)
    assert plan.selection.vote == Vote(threshold=-10.0)
    found = unpack_bits(plan.selection.pinned, 5)
    pinned[:, 1] = True
    assert torch.equal(found, pinned)


def test_unset_thresholds_are_the_criterion_s_and_a_recipe_can_t_set_one():
    for criterion, usual in THRESHOLDS.items():
        assert LiteAttention(criterion=criterion).filled().threshold == usual
    assert LiteAttention(threshold=-3).filled().threshold == -3
    assert LiteAttention(threshold=5, allow_positive_threshold=True).threshold == 5
    assert LiteAttention().filled({"block_size": 64}).block_size == 64
    with pytest.raises(ConfigError, match=r"recipe.*lite.*'threshold'"):
        LiteAttention().filled({"threshold": -3})


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 60), unique=True, max_size=6).map(sorted), st.sampled_from([16, 32]),
    st.integers(0, 9), st.booleans(),
)  # fmt: skip
def test_ranges_round_outward_or_inward(edges, block, before, shuffled):
    ranges = edges[: len(edges) // 2 * 2]
    layout = TokenLayout(frames=1, height=1, width=61, text_before=before, text_after=3)
    order = torch.randperm(layout.tokens) if shuffled else None
    inside = {before + t for start, end in zip(ranges[::2], ranges[1::2], strict=True) for t in range(start, end)}
    tokens = list(range(layout.tokens)) if order is None else order.tolist()
    tiles = [set(tokens[start : start + block]) for start in range(0, len(tokens), block)]
    assert range_tiles(ranges, layout, order, block, inward=False).tolist() == [bool(t & inside) for t in tiles]
    assert range_tiles(ranges, layout, order, block, inward=True).tolist() == [t <= inside for t in tiles]


TABLE = LiteThresholds(
    model="any, 3 layers, 2 heads", criterion="maxgap", num_inference_steps=3, target_error=0.05,
    thresholds={"transformer": ((-10.0, -math.inf, -4.0), (-1.0, -2.0, -3.0)) * 2},
)  # fmt: skip


def test_a_thresholds_file_survives_writing_and_sets_each_vote(tmp_path):
    path = tmp_path / "lite.toml"
    write_thresholds(path, TABLE)
    assert read_thresholds(path) == TABLE
    assert [p.name for p in tmp_path.iterdir()] == ["lite.toml"]
    calls = Calls(LiteAttention(thresholds_file=str(path)), steps=3)
    assert calls.handler.is_active(calls.context(0), 0)
    votes = [calls.plan(step=step, layer=layer)[0].selection.vote for layer in (0, 1) for step in (0, 1, 2)]
    assert [vote and vote.threshold for vote in votes] == [-10.0, -math.inf, None, -1.0, -2.0, None]
    with pytest.raises(ConfigError, match=r"layer 7.*4 layers"):
        calls.plan(layer=7)
    for steps in (50, None):
        with pytest.raises(ConfigError, match=rf"3 steps.*{steps or 'unknown'}"):
            calls.handler.is_active(calls.context(0, num_inference_steps=steps), 0)
    with pytest.raises(ConfigError, match=r"'maxgap', lite\.criterion.*'mass'"):
        LiteHandler(LiteAttention(thresholds_file=str(path), criterion="mass"), MODEL)
    path.write_text(path.read_text().replace("any, 3", "other, 3"))
    with pytest.raises(ConfigError, match=r"'other, 3 layers, 2 heads'.*'any, 3 layers, 2 heads'"):
        LiteHandler(LiteAttention(thresholds_file=str(path)), MODEL)


def test_what_is_no_thresholds_file_is_refused(tmp_path):
    for text, error in (
        (None, r"\(No such file.*tune lite"),
        ("a = = b", "TOML"),
        ("version = 2", r"version 2.*version 1"),
        ("version = 1\nmodel = 'm'", r"tune lite.*KeyError\('thresholds'\)"),
        (("maxgap", 2, "transformer=[[-1.0]]"), r"layer 0.*2 in all, got 1"),
        (("maxgap", 1, "transformer=[[1.0]]"), r"lite.*layer 0.*< 0 .*got 1\.0"),
        (("sum", 1, "transformer=[[-1.0]]"), r"lite.*'maxgap'.*'mass'.*'sum'"),
        (("mass", 1, ""), r"layer.*got none"),
    ):
        path = tmp_path / "lite.toml"
        if isinstance(text, tuple):
            criterion, steps, table = text
            head = f"version = 1\nmodel='m'\ncriterion='{criterion}'\nnum_inference_steps={steps}\n"
            text = f"{head}[thresholds]\n{table}"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=error):
            read_thresholds(path)
