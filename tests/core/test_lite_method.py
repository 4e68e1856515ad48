"""LiteAttention's handler call by call, on random queries and keys: invariants of votes, bits and thresholds."""

import gc
import math
import weakref

import pytest
import torch
from dit_accel_kernels import Routing, Vote, block_sparse_attention_eager, pack_bits, unpack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from lite_calls import BLOCK, Calls, drifting
from wan_tiny import denoise, sharp_transformer

import dit_accel
from dit_accel import LiteAttention
from dit_accel.errors import ConfigError
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import Tiling

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
WIDE = torch.float64
NEVER = -1e9


def same_as(found: torch.Tensor, dense: torch.Tensor, backend: str) -> None:
    """Bit for bit; to rounding where votes take another path through the backend than lists do."""
    if backend == "reference":
        assert torch.equal(found, dense)
    else:
        torch.testing.assert_close(found, dense)


@BACKENDS
@pytest.mark.parametrize("text", [0, 9])
def test_a_threshold_that_nothing_falls_below_is_dense(backend, text):
    calls = Calls(LiteAttention(threshold=NEVER), text=text, backend=backend)
    dense = Calls(None, text=text, backend=backend)
    for q, k, v in drifting(calls.tokens, 5):
        same_as(calls.run(q, k, v), dense.run(q, k, v), backend)
        assert calls.exact().all()
    assert calls.reversed == [False, True, False, True, False]


@BACKENDS
@pytest.mark.parametrize("must_keep", [(), (20, 40)])
def test_a_huge_threshold_leaves_the_first_tile_and_what_must_be_kept(backend, must_keep):
    config = LiteAttention(
        threshold=1e6, allow_positive_threshold=True, must_keep=must_keep, bidirectional=False, detect_every=1
    )
    calls = Calls(config, backend=backend)
    for step, (q, k, v) in enumerate(drifting(calls.tokens, 4)):
        calls.run(q, k, v)
        expected = torch.zeros(calls.tiles, dtype=torch.bool)
        expected[0] = True
        if must_keep:
            expected[1:3] = True  # tokens 20 to 40 lie in the tiles of 16 to 48
        assert torch.equal(calls.exact(), expected.expand_as(calls.exact()) if step else calls.exact() | True)


@BACKENDS
def test_text_rows_and_columns_stay_whatever_the_threshold(backend):
    calls = Calls(LiteAttention(threshold=1e6, allow_positive_threshold=True), text=9, backend=backend)
    for q, k, v in drifting(calls.tokens, 3):
        calls.run(q, k, v)
    exact = calls.exact()
    text = calls.layout.visual_tokens // BLOCK
    assert exact[:, :, text:].all()
    assert exact[..., text:].all()
    assert not exact[:, :, :text, :text].all()
    open_text = LiteAttention(threshold=1e6, allow_positive_threshold=True, protect_text=False)
    calls = Calls(open_text, text=9, backend=backend)
    for q, k, v in drifting(calls.tokens, 3):
        calls.run(q, k, v)
    assert not calls.exact()[..., text:].all()
    assert "lets the 9 text tokens be dropped" in str(calls.handler.check_layout(calls.layout))


@BACKENDS
@pytest.mark.parametrize("config", [
    dict(threshold=-1.0), dict(criterion="mass", threshold=0.02), dict(criterion="budget", threshold=0.9)
])  # fmt: skip
def test_the_first_call_is_dense_bits_only_fall_and_outputs_follow_them(backend, config):
    calls = Calls(LiteAttention(**config), steps=7, backend=backend)
    dense, before = Calls(None, backend=backend), None
    for step, (q, k, v) in enumerate(drifting(calls.tokens, 6, sharp=6.0)):
        kept = calls.bits()
        out, exact = calls.run(q, k, v), calls.exact()
        if step == 0:
            same_as(out, dense.run(q, k, v), backend)
        else:
            assert torch.equal(exact, unpack_bits(kept, calls.tiles))
            assert not (exact & ~before).any()
            assert exact.any(-1).all()
            assert not (kept[..., -1] >> (calls.tiles % 32)).any()
        before = exact
        mask = exact.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, : calls.tokens, : calls.tokens]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(out, expected)
    assert not before.all()


@BACKENDS
@pytest.mark.parametrize("criterion", ["maxgap", "mass", "budget"])
def test_bits_are_the_specification_s_votes(backend, criterion):
    threshold = {"maxgap": -1.0, "mass": 0.02, "budget": 0.3}[criterion]
    calls = Calls(LiteAttention(criterion=criterion, threshold=threshold), backend=backend)
    for q, k, v in drifting(calls.tokens, 4):
        plan, _ = calls.plan()
        _, expected = block_sparse_attention_eager(
            q, k, v, plan.tiles, layout="bhsd", selection=plan.selection, backend="reference"
        )
        calls.finish(plan, q, k, v)
        assert torch.equal(calls.bits(), expected)


@BACKENDS
def test_the_largest_logit_of_every_row_is_never_dropped(backend):
    calls = Calls(LiteAttention(threshold=-1e-6), backend=backend)
    for q, k, v in drifting(calls.tokens, 6):
        exact = calls.exact() if calls.step else torch.ones(1, 2, calls.tiles, calls.tiles, dtype=torch.bool)
        calls.run(q, k, v)
        exact = calls.exact()
        visited = exact.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, : calls.tokens, : calls.tokens]
        best = (q @ k.mT).masked_fill(~visited, -torch.inf).argmax(-1) // BLOCK
        kept = unpack_bits(calls.bits(), calls.tiles).repeat_interleave(BLOCK, 2)[:, :, : calls.tokens]
        assert kept.gather(-1, best[..., None]).all()


@BACKENDS
def test_fixed_inputs_settle_after_two_calls_and_larger_thresholds_drop_more(backend):
    (inputs,) = drifting(80, 1)
    dropped = []
    for threshold in (-8.0, -2.0, -0.5):
        calls = Calls(LiteAttention(threshold=threshold), backend=backend)
        bits = []
        for _ in range(5):
            calls.run(*inputs)
            bits.append(calls.bits())
        assert torch.equal(bits[1], bits[2])
        assert torch.equal(bits[2], bits[4])
        dropped.append(~unpack_bits(bits[0], calls.tiles))
    assert not (dropped[0] & ~dropped[1]).any()
    assert not (dropped[1] & ~dropped[2]).any()
    assert dropped[2].sum() > dropped[0].sum()


@BACKENDS
def test_a_known_pattern_is_found_and_padding_neither_vetoes_nor_wins(backend):
    """Key tiles +q, -q, -q, +q and a ragged tile of -q: the three of -q go, whatever zeros pad the tail."""
    direction = torch.randn(8, dtype=WIDE)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=WIDE).repeat_interleave(BLOCK)[:70]
    q = (4 * direction).expand(1, 2, 70, 8).contiguous()
    k = (direction * signs[:, None]).expand(1, 2, 70, 8).contiguous()
    calls = Calls(LiteAttention(threshold=-3.0), tokens=70, backend=backend)
    calls.run(q, k, torch.randn_like(k))
    found = unpack_bits(calls.bits(), 5)
    assert torch.equal(found, torch.tensor([True, False, False, True, False]).expand_as(found))


def test_votes_come_every_so_often_turn_round_each_time_and_end_with_the_run():
    calls = Calls(LiteAttention(threshold=-1.0, detect_every=2), steps=7)
    voted, turned = [], []
    for q, k, v in drifting(calls.tokens, 7):
        plan, _ = calls.plan()
        voted.append(plan.selection.vote is not None)
        turned.append(plan.selection.reverse)
        calls.finish(plan, q, k, v)
    assert voted == [True, False, True, False, True, False, False]  # nobody would read the last
    assert [turn for turn, vote in zip(turned, voted, strict=True) if vote] == [False, True, False]
    assert not calls.handler._states
    assert calls.handler.state_bytes() == 4 * 2 * calls.tiles


def test_refreshing_begins_anew():
    calls = Calls(LiteAttention(threshold=-0.5, refresh_every=3))
    shares = []
    for q, k, v in drifting(calls.tokens, 7):
        calls.run(q, k, v)
        shares.append(float(calls.exact().float().mean()))
    assert [share == 1 for share in shares] == [True, False, False, True, False, False, True]


def test_dense_steps_and_layers_leave_the_state_alone():
    config = LiteAttention(dense_steps=2, dense_layers=1, dense_last_steps=1)
    calls = Calls(config, steps=6)
    active = [calls.handler.is_active(calls.context(step), 1) for step in range(6)]
    assert active == [False, False, True, True, True, False]
    assert not calls.handler.is_active(calls.context(3), 0)
    assert not calls.handler.is_active(calls.context(3, training=True), 1)
    plans = []
    for step in (2, 3, 4):
        calls.step = step
        plan, _ = calls.plan()
        plans.append(plan.selection.vote is not None)
    assert plans == [True, True, False]  # step 4 is the last that is not dense


@BACKENDS
def test_rows_layers_branches_and_calls_of_a_forward_do_not_meet(backend):
    """Each key evolves as it does alone, in whatever order they run."""
    keys = [
        dict(branch=branch, layer=layer, row=row) for branch in ("cond", "uncond") for layer in (0, 1) for row in (0, 1)
    ]
    inputs = {str(key): drifting(80, 4, seed=seed) for seed, key in enumerate(keys)}
    config = LiteAttention(threshold=-1.0)
    alone = {}
    for key in keys:
        calls = Calls(config, backend=backend)
        alone[str(key)] = [(calls.run(*x, **key), calls.exact(), calls.bits(**key))[1:] for x in inputs[str(key)]]
    together = Calls(config, backend=backend)
    for step in range(4):
        for key in keys if step % 2 else reversed(keys):
            together.step = step
            together.run(*inputs[str(key)][step], **key)
            exact, bits = alone[str(key)][step]
            assert torch.equal(together.exact(), exact)
            assert torch.equal(together.bits(**key), bits)


@pytest.mark.parametrize("change", ["batch", "layout", "reset"])
def test_another_batch_or_layout_and_a_reset_begin_anew(change):
    calls = Calls(LiteAttention(threshold=-0.5))
    for x in drifting(80, 2):
        calls.run(*x)
    assert not calls.exact().all()
    if change == "reset":
        calls.handler.reset()
    batch, tokens = (2, 80) if change == "batch" else (1, 96 if change == "layout" else 80)
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


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31), budget=st.sampled_from([0.01, 0.1, 0.4]), every=st.integers(1, 3),
    steps=st.sampled_from([2, 5, 8, None]),
)  # fmt: skip
def test_a_budget_bounds_the_mass_of_every_row_at_every_call(backend, seed, budget, every, steps):
    """Fixed inputs: every row under the budget, whatever the votes' number; drift by D: times 2^(2D) (bound C)."""
    for drift in (0.0, 0.05):
        calls = Calls(
            LiteAttention(criterion="budget", threshold=budget, detect_every=every), steps=steps, backend=backend
        )
        logits, lost = [], []
        for q, k, v in drifting(80, 8 if steps is None else steps, seed=seed, drift=drift, sharp=3.0):
            calls.run(q, k, v)
            x = (q @ k.mT) * q.shape[-1] ** -0.5 * math.log2(math.e)
            logits.append(x)
            visited = calls.exact().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
            lost.append(float(((x * math.log(2)).softmax(-1) * ~visited).sum(-1).max()))
        largest = max(float((a - b).abs().max()) for a in logits for b in logits)
        assert max(lost) <= budget * 2 ** (2 * largest) + 1e-12


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), threshold=st.sampled_from([-1.0, -4.0, -12.0]))
def test_bounds_a_and_b_and_the_identity_of_the_error(seed, threshold):
    calls = Calls(LiteAttention(threshold=threshold))
    logits = []
    for q, k, v in drifting(80, 4, seed=seed, drift=0.05, sharp=6.0):
        out = calls.run(q, k, v)
        x = (q @ k.mT) * q.shape[-1] ** -0.5 * math.log2(math.e)
        logits.append(x)
        p = (x * math.log(2)).softmax(-1)
        visited = calls.exact().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        lost = (p * ~visited).sum(-1, keepdim=True)
        drift = max(float((x - earlier).abs().max()) for earlier in logits)
        if -threshold >= 2 * drift:
            tiles = (~calls.exact()).sum(-1).repeat_interleave(BLOCK, 2)[..., None]
            bound = tiles * BLOCK * 2.0 ** (threshold + 2 * drift)
            assert bool((lost <= bound / (1 + bound) + 1e-12).all())
        dense, rest = p @ v, (p * ~visited) @ v
        torch.testing.assert_close(dense - out, rest - lost * out)


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
    calls = Calls(LiteAttention(threshold=NEVER, must_skip=(10, 50), must_keep=(40, 41)))
    (x,) = drifting(80, 1)
    calls.run(*x)
    assert calls.exact()[0, 0].all(0).tolist() == [True, False, True, True, True]
    every = Calls(LiteAttention(must_skip=(0, 80)))
    with pytest.raises(ConfigError, match=r"lite\.must_skip = \(0, 80\).*no key"):
        every.plan()
    every = Calls(LiteAttention(must_skip=(0, 80), rest="pooled"))
    assert torch.isfinite(every.run(*x)).all()


def test_dropped_tiles_may_stay_as_their_mean():
    skipped, pooled = (Calls(LiteAttention(threshold=-0.5, rest=rest)) for rest in ("skip", "pooled"))
    dense = Calls(None)
    errors = {"skip": 0.0, "pooled": 0.0}
    for x in drifting(80, 4, sharp=1.0, drift=0.0):
        expected = dense.run(*x)
        for calls in (skipped, pooled):
            errors[calls.handler.settings.rest] = float((calls.run(*x) - expected).norm())
    assert torch.equal(skipped.exact(), pooled.exact())
    assert 0 < errors["pooled"] < errors["skip"]


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
    base = AttentionPlan().with_tiles(*Tiling(BLOCK).full(Calls(None).layout))
    base = base.narrow(pinned=pack_bits(pinned)).route(Routing(beta=2.0))
    calls = Calls(LiteAttention(must_keep=(16, 17)))
    plan, _ = calls.plan(base=base)
    assert plan.selection.routing == Routing(beta=2.0)
    assert plan.selection.vote == Vote(threshold=-10.0)
    found = unpack_bits(plan.selection.pinned, 5)
    pinned[:, 1] = True
    assert torch.equal(found, pinned)


def test_a_layout_of_one_tile_runs():
    calls = Calls(LiteAttention(threshold=-0.5), tokens=10)
    for x in drifting(10, 3):
        calls.run(*x)
        assert calls.exact().all()
    assert TokenLayout(frames=1, height=1, width=10).tokens == 10


@pytest.mark.parametrize("options", [dict(threshold=-1.0), dict(target_density=0.6)], ids=str)
def test_a_reset_frees_all_that_is_held(options):
    """Bits, dials, and the tiles that no vote decides, which hold the lists that they are of."""
    transformer = sharp_transformer()
    config = LiteAttention(block_size=BLOCK, dense_steps=0, must_keep=(0, 16), must_skip=(48, 64), **options)
    with dit_accel.attach(transformer, config) as attachment:
        (handler,) = attachment.engine.handlers
        denoise(transformer, until=3)  # the last step frees some by itself
        assert handler._states
        assert handler._fixed
        assert bool(handler._calibrators) == ("target_density" in options)
        held = [state.bits for state in handler._states.values()]
        held += [bits for _, fixed in handler._fixed.values() for bits in fixed]
        freed = [weakref.ref(bits) for bits in held]
        del held
        attachment.reset()
        gc.collect()
        assert not handler._states
        assert not handler._fixed
        assert not handler._calibrators
        assert not any(ref() is not None for ref in freed)
        assert attachment.report().state_bytes["lite"] > 0  # the most that it held
        assert attachment.report().steps  # the report stays
