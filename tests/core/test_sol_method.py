"""SolAttention: its checks, density and recipes, its plans alone and in Radial's list, and a tiny Wan under it."""

import dataclasses
import math
import re

import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, Selection, count_bits, flex_requirement, pack_bits, unpack_bits
from dit_accel_pipelines.families.wan import WAN
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import ADAPTER, Fixed, OneLayer, context_of, layout_of
from wan_tiny import RADIAL, denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, RadialAttention, SolAttention
from dit_accel.adapters.installed import family
from dit_accel.estimate.prediction import estimate
from dit_accel.methods.base import Handler, Model
from dit_accel.methods.compose import make_handlers
from dit_accel.plan.call import Call
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import pinned_bits
from dit_accel.testing.recording import recorded, require_as_planned
from dit_accel.testing.reference import tile_states

MODEL = Model(adapter=ADAPTER, family=None, heads=4, layers=3)
WAN_720P = TokenLayout(frames=21, height=45, width=80)
SPARSE = dict(dense_steps=0, dense_layers=0)


def handlers(*configs) -> list[Handler]:
    return make_handlers(configs, MODEL)


def planned(layout: TokenLayout, *configs, plan: AttentionPlan | None = None, **when) -> AttentionPlan:
    """What methods plan, whatever the queries and keys are."""
    plan, nothing = plan or AttentionPlan(), torch.empty(1, 4, layout.tokens, 0)
    for handler in handlers(*configs):
        plan = handler.plan(plan, Call(q=nothing, k=nothing, v=nothing), context_of(layout, **when))
    return plan


def run(plan: AttentionPlan, layout: TokenLayout, q, k, v, backend: str = "reference"):
    """Execute a plan; output and report shares (exact, pooled, by head)."""
    layer = OneLayer(Fixed(plan), backend=backend)
    out = layer.call(q, k, v, layout)
    ((entry,),) = [forward.calls for forward in layer.engine.recorder.forwards.values()]
    return out, entry


def test_beta_moves_linearly_over_the_sparse_steps():
    config = SolAttention(beta=1.3, beta_last=0.8, dense_steps=2, dense_last_steps=1, block_size=512)
    betas = [config.filled().beta_at(step, 9) for step in range(2, 8)]
    assert betas == pytest.approx([1.3, 1.2, 1.1, 1.0, 0.9, 0.8])
    assert SolAttention(beta_last=0.5, dense_steps=3).filled().beta_at(3, 4) == 1.0  # one sparse step
    assert SolAttention(beta=2.0).filled().beta_at(5, None) == 2.0
    with pytest.raises(ConfigError, match=r"sol\.beta_last = 0\.8"):
        SolAttention(beta_last=0.8).filled().beta_at(3, None)
    for when, beta in (
        (dict(step_index=4, num_inference_steps=9), 1.1),
        (dict(num_inference_steps=None, training=True), 1.3),  # no step is told
    ):
        routing = planned(WAN_720P, config, **when).selection.routing
        assert (routing.beta, routing.threshold) == (pytest.approx(beta), "diag")


@pytest.mark.parametrize("threshold", ["diag", "exact"])
@pytest.mark.parametrize(("beta", "key_heads", "batch"), [(-0.5, 4, 1), (0.5, 2, 2), (1.0, 4, 1), (1.5, 1, 1)])
def test_gaussian_data_keeps_the_normal_tail_and_the_report_says_so(threshold, beta, key_heads, batch):
    """Density 1 - Phi(beta) beside what is pinned, as published; grouped heads and batches alike."""
    layout = TokenLayout(frames=4, height=8, width=32)
    q = torch.randn(batch, 4, layout.tokens, 32)
    k, v = torch.randn(2, batch, key_heads, layout.tokens, 32)
    config = SolAttention(beta=beta, threshold=threshold, block_size=16)
    plan = planned(layout, config)
    _, call = run(plan, layout, q, k, v, "torch")
    pinned = float(count_bits(plan.selection.pinned).sum()) / 64**2
    assert pinned == (3 * 64 - 2) / 64**2
    share = 0.5 * math.erfc(beta / math.sqrt(2))
    assert abs(float(call.exact) - (pinned + (1 - pinned) * share)) < 4 * math.sqrt(share / (batch * 4 * 64))
    assert float(call.exact) == pytest.approx(float(call.by_head.mean()))
    assert float(call.exact) + float(call.pooled) == pytest.approx(1.0)
    assert config.filled().density(layout) == pytest.approx(pinned + (1 - pinned) * share, abs=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    text=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    sink=st.sampled_from(["text", "first_frame"]),
    beta=st.sampled_from([-1.0, 0.3, 8.0]),
)
def test_text_diagonal_and_sink_stay_exact_and_the_rest_is_pooled(grid, text, sink, beta):
    layout = layout_of(grid, text)
    plan = planned(layout, SolAttention(beta=beta, sink=sink, block_size=16))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 8, dtype=torch.float64)
    layer, seen = OneLayer(Fixed(plan)), []
    layer.observe(seen.append)
    layer.call(q, k, v, layout)
    states = tile_states(plan, 2, layout.tokens, seen[0].exact)
    assert set(states.unique().tolist()) <= {EXACT, POOLED}
    order = torch.arange(layout.tokens) if plan.token_order is None else plan.token_order
    exact = (states == EXACT).repeat_interleave(16, -1)[..., : layout.tokens].repeat_interleave(16, -2)
    exact = exact[..., : layout.tokens, :].all(0).all(0)
    is_text = (order < text[0]) | (order >= text[0] + layout.visual_tokens)
    assert exact[is_text].all()
    assert exact[:, is_text].all()
    assert exact.diagonal().all()
    if sink == "first_frame":
        assert exact[:, (order >= text[0]) & (order < text[0] + layout.tokens_per_frame)].all()
    if beta == 8.0:
        assert torch.equal(states == EXACT, unpack_bits(plan.selection.pinned, states.shape[-1]).expand_as(states))


LISTED = TokenLayout(frames=7, height=8, width=8, text_before=6)


@pytest.mark.parametrize(("rest", "order"), [("skip", "raster"), ("pooled", "tiles")])
def test_routing_demotes_from_radials_list(rest, order):
    radial = dataclasses.replace(RADIAL, rest=rest, order=order)
    plan, alone = planned(LISTED, SolAttention(), radial), planned(LISTED, radial)
    assert plan.tiles is alone.tiles
    assert plan.token_order is alone.token_order
    _, call = run(plan, LISTED, *torch.randn(3, 1, 2, LISTED.tokens, 16))
    listed = plan.tiles.tiles_exact / plan.tiles.tiles_total
    assert float(call.exact) < listed
    assert float(call.exact) + float(call.pooled) == pytest.approx(1.0 if rest == "pooled" else listed)


def test_another_selection_is_kept():
    plan = planned(LISTED, RADIAL)
    tiles = plan.tiles.key_tiles
    pinned, keep = torch.zeros(tiles, tiles, dtype=torch.bool), torch.ones(1, 2, tiles, tiles, dtype=torch.bool)
    pinned[0, -1] = True
    plan = dataclasses.replace(plan, selection=Selection(keep=pack_bits(keep), pinned=pack_bits(pinned)))
    both = planned(LISTED, SolAttention(block_size=16), plan=plan).selection
    assert both.keep is plan.selection.keep
    ours = unpack_bits(pinned_bits(LISTED, 16, 1, "text", "cpu"), tiles)
    assert torch.equal(unpack_bits(both.pinned, tiles), ours | pinned)


@pytest.mark.parametrize(
    ("options", "side", "text"),
    [({}, 8, r"1 tiles.*64 visual"), ({"sink": "first_frame"}, 64, r"4096 tiles.*4096"), ({}, 64, r"40000.*4096")],
)
def test_advice_names_what_does_not_fit(options, side, text):
    assert re.search(text, SolAttention(**options).filled().advice(layout_of((1, side, side))))
    assert SolAttention().filled().advice(WAN_720P) is None


def test_the_estimate_alone_and_in_radials_list_by_layer_and_step():
    alone = estimate(WAN, family("wan2.1-14b"), methods=[SolAttention()])
    tiles, share = 1182, 0.158655
    pinned = 3 * tiles - 2
    assert alone.tiles.total == tiles**2
    assert alone.tiles.kept == pytest.approx(pinned + share * (tiles**2 - pinned), abs=2)
    assert alone.pair_density == pytest.approx(alone.tiles.density + (1 - alone.tiles.density) / 64, abs=1e-4)
    radial, sol = RadialAttention(dense_steps=12, dense_layers=1), SolAttention(dense_steps=10, dense_layers=1)
    listed = estimate(WAN, family("wan2.1-14b"), methods=[radial]).tiles
    both = estimate(WAN, family("wan2.1-14b"), methods=[sol, radial])
    assert both.tiles.total == listed.total == 591**2
    routed = dataclasses.replace(sol, block_size=128).filled().density(WAN_720P) * listed.total
    in_list = 3 * 591 - 2 + share * (listed.kept - (3 * 591 - 2))
    assert both.tiles.kept == pytest.approx((2 * routed + 38 * in_list) / 40, rel=1e-3)
    assert alone.dense_share == both.dense_share == pytest.approx(1 - 0.8 * 39 / 40)


def test_a_falling_beta_keeps_a_mean():
    first, last, both = (
        SolAttention(**options).filled().density(WAN_720P)
        for options in ({"beta": 1.3}, {"beta": 0.8}, {"beta": 1.3, "beta_last": 0.8})
    )
    assert first < both < last


SOL = SolAttention(block_size=16, dense_steps=1, dense_layers=1, beta=0.5)


@pytest.mark.slow
@pytest.mark.skipif(flex_requirement("cpu") is not None, reason="FlexAttention cannot compile here")
def test_compiled_flexattention_runs_as_planned():
    transformer, densities = tiny_transformer(), []
    for others in ((), (dataclasses.replace(RADIAL, dense_steps=1, dense_layers=1),)):
        with dit_accel.attach(transformer, SOL, *others, backend="flex") as attachment:
            with recorded(attachment) as calls:
                denoise(transformer, 2)
            report = attachment.report()
        assert report.backend == "flex"
        densities.append(report.sparse_density)
        require_as_planned(calls)
    assert 0 < densities[1] < densities[0] < 1  # in Radial's list, in the same compiled function


def test_the_backward_follows_what_the_forward_routed():
    """It routes nothing itself: given other bits, it follows these."""
    gradients = []
    for everything in (False, True):
        transformer, noise = tiny_transformer(), torch.Generator().manual_seed(1)
        x, text = torch.randn(1, 12, 5, 8, 8, generator=noise), torch.randn(1, 6, 64, generator=noise)
        with dit_accel.attach(transformer, dataclasses.replace(SOL, **SPARSE)) as attachment:
            store = attachment.engine.backward
            out = transformer(x, torch.tensor([500.0]), text, return_dict=False)[0].square().sum()
            plans = [call.plan for _, call in store._plans.values()]
            assert len(plans) == len(store) == 3
            assert {plan.selection.routing for plan in plans} == {None}
            assert not any((plan.selection.routed == 0).all() for plan in plans)
            for plan in plans if everything else ():
                plan.selection.routed.fill_(-1)
            out.backward()
            del out
            assert len(store) == 0  # autograd is done with them
        gradients.append(transformer.blocks[0].attn1.to_q.weight.grad)
    assert not torch.equal(*gradients)
