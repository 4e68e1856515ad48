"""SparseD: the masses that it chooses by, what it chooses, how much, how it meets the other methods, and its state."""

import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import EXACT, Selection, TileLists, count_bits, pack_bits, unpack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import MODEL, context_of, layout_of, random_call
from wan_tiny import RADIAL, denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, SparseD
from dit_accel.methods.attention.sparsed import SparseDHandler, heaviest
from dit_accel.methods.compose import make_handlers
from dit_accel.plan import tile_masses as masses
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.tiling import full_tiles, visual_first
from dit_accel.testing.recording import recorded

LAYOUT = TokenLayout(frames=5, height=4, width=6, text_before=3, text_after=20)
SPARSED = SparseD(density=0.4, block_size=16, dense_steps=1, dense_layers=0)


def context(layout: TokenLayout = LAYOUT, **changes) -> CallContext:
    return context_of(layout, **{"step_index": 2, **changes})


def call_of(layout: TokenLayout = LAYOUT, form: str = "bshd", **changes) -> Call:
    return random_call(layout, form, sharp=3.0, dtype=torch.float32, **changes)


def handler(config: SparseD = SPARSED) -> SparseDHandler:
    (made,) = make_handlers([config], MODEL)
    return made


def planned(made: SparseDHandler, call: Call, plan: AttentionPlan | None = None, **changes) -> AttentionPlan:
    return made.plan(plan or AttentionPlan(), call, context(**changes))


def chosen_of(plan: AttentionPlan) -> torch.Tensor:
    """The tiles that the plan's bits keep, bool [B, H, NQ, NK]."""
    return unpack_bits(plan.selection.keep, plan.tiles.key_tiles)


def probabilities(call: Call, layout: TokenLayout = LAYOUT) -> torch.Tensor:
    """Softmax over the visual keys alone in the tiles' order, [B, H, S, S] in float64."""
    order = visual_first(layout, None)
    q, k = call.q.double(), call.k.double()
    if order is not None:
        q, k = q[:, :, order], k[:, :, order]
    x = q @ k.mT * (8**-0.5 if call.scale is None else call.scale)
    x[..., layout.visual_tokens :] = -torch.inf
    if call.mask is not None:
        mask = call.key_mask() if order is None else call.key_mask()[:, order]
        x = x.masked_fill(~mask[:, None, None], -torch.inf)
    return x.softmax(-1)


def tile_sums(p: torch.Tensor, block: int = 16) -> torch.Tensor:
    p = F.pad(p, (0, -p.shape[-1] % block, 0, -p.shape[-2] % block))
    return p.unflatten(-1, (-1, block)).sum(-1).unflatten(2, (-1, block)).sum(3)


@pytest.mark.parametrize("form", ["bshd", "bhsd"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_head_and_block_row_keeps_its_heaviest_visual_tiles(form, masked):
    mask = torch.ones(2, LAYOUT.tokens, dtype=torch.bool)
    mask[1, -9:] = False
    call = call_of(form=form, mask=mask if masked else None, scale=0.4)
    plan = planned(handler(), call)
    visual = LAYOUT.visual_tokens // 16
    masses, kept = tile_sums(probabilities(call))[..., :visual], chosen_of(plan)
    count = 3  # 0.4 of 7 whole visual tiles, rounded up
    expected = torch.zeros_like(kept).scatter_(-1, masses.topk(count).indices, True)
    assert torch.equal(kept[:, :, :visual], expected[:, :, :visual])
    assert (kept.sum(-1) == count).all()
    pinned = unpack_bits(plan.selection.pinned, plan.tiles.key_tiles)
    assert pinned[:, visual:].all()
    assert pinned[visual:].all()
    assert not pinned[:visual, :visual].any()


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4), st.integers(1, 9)),
    kept=st.integers(1, 9),
    mass=st.none() | st.floats(0.05, 0.99),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_choice_is_of_candidates_heaviest_first_as_many_as_asked_or_as_reach_the_mass(shape, kept, mass, seed):
    generator = torch.Generator().manual_seed(seed)
    masses = torch.rand(shape, generator=generator).double().round(decimals=1)  # ties
    candidates = torch.rand(shape, generator=generator) < 0.7
    chosen = heaviest(masses, candidates, None if mass else kept, mass)
    assert not (chosen & ~candidates).any()
    counts, possible = chosen.sum(-1), candidates.sum(-1)
    lightest = torch.where(chosen, masses, torch.inf).amin(-1, keepdim=True)
    assert (torch.where(candidates & ~chosen, masses, -1.0) <= lightest).all()
    if mass is None:
        assert torch.equal(counts, possible.clamp(max=kept))
    else:
        reached, asked = (masses * chosen).sum(-1), mass * (masses * candidates).sum(-1)
        assert (reached >= asked - 1e-9).all()
        assert ((counts <= 1) | (reached - lightest[..., 0] < asked + 1e-9)).all()  # and no tile more
        assert torch.equal(counts > 0, possible > 0)


def test_the_number_of_tiles_is_the_share_rounded_up():
    for density, tiles, kept in ((0.3, 10, 3), (0.1, 30, 3), (0.31, 10, 4), (1, 7, 7), (1e-9, 7, 1)):
        assert SparseD(density=density).filled().kept_tiles(tiles) == kept
        layout, made = TokenLayout(frames=tiles, height=4, width=4), handler(SparseD(density=density, block_size=16))
        saving = made.estimate(layout, 8).tiles
        assert saving.tiles == tiles
        assert saving.keep(np.ones((tiles, tiles)), slice(None)).sum() == pytest.approx(kept * tiles)
        plan = planned(made, call_of(layout), layout=layout)
        assert torch.equal(count_bits(plan.selection.keep), torch.full((2, 2, tiles), kept))


def test_it_chooses_among_the_tiles_that_a_list_keeps():
    layout = TokenLayout(frames=6, height=4, width=8)
    call = call_of(layout)
    listed = AttentionPlan().with_tiles(RADIAL.filled().tiles(layout), RADIAL.filled().token_order(layout))
    plan = planned(handler(dataclasses.replace(SPARSED, density=0.25)), call, listed, layout=layout)
    exact = listed.tiles.states()[0] == EXACT
    assert plan.tiles is listed.tiles
    masses = tile_sums(probabilities(call, layout)).masked_fill(~exact, -1)
    best = torch.zeros_like(chosen_of(plan)).scatter_(-1, masses.topk(3).indices, True) & exact
    assert torch.equal(chosen_of(plan), best)
    states = torch.full((2, 12, 12), EXACT, dtype=torch.uint8)
    states[1, :, ::2] = 0
    tiles = TileLists.from_states(states, block_q=16, block_k=16, num_q=192, num_k=192)
    kept = chosen_of(planned(handler(), call, AttentionPlan(tiles=tiles), layout=layout))
    assert (kept.sum(-1) == 5).all()
    assert kept[:, 0, :, ::2].any()
    assert not kept[:, 1, :, ::2].any()


def test_bits_and_pins_of_others_are_kept():
    tiles = full_tiles(LAYOUT.tokens, LAYOUT.tokens, 16, "cpu")
    theirs = pack_bits(torch.rand(2, 2, 9, 9) < 0.5)
    pins = pack_bits(torch.eye(9, dtype=torch.bool))
    before = AttentionPlan(
        tiles=tiles, token_order=visual_first(LAYOUT, None), selection=Selection(keep=theirs, pinned=pins, reverse=True)
    )
    made, call = handler(), call_of()
    alone = planned(made, call)
    both = planned(made, call, before)
    assert torch.equal(both.selection.keep, alone.selection.keep & theirs)
    assert torch.equal(both.selection.pinned, alone.selection.pinned | pins)
    assert both.selection.reverse


@pytest.mark.parametrize("rest", ["skip", "pooled"])
def test_the_density_is_the_one_asked_for_and_the_first_steps_are_dense(rest):
    transformer = tiny_transformer()
    plain = denoise(transformer)
    with dit_accel.attach(transformer, dataclasses.replace(SPARSED, rest=rest)) as attachment:
        sparse = denoise(transformer)
        report = attachment.report()
    assert not torch.equal(sparse, plain)
    assert [step.density for step in report.steps] == [1.0] * 2 + [pytest.approx(2 / 5)] * 6
    assert [step.pooled for step in report.steps] == [0.0] * 2 + [pytest.approx(3 / 5 if rest == "pooled" else 0)] * 6
    assert torch.equal(denoise(transformer), plain)


def test_the_pattern_is_chosen_once_by_layer_and_branch_and_freed():
    transformer, patterns = tiny_transformer(), {}
    with dit_accel.attach(transformer, SPARSED) as attachment, recorded(attachment) as calls:
        denoise(transformer)
        (made,) = attachment.engine.handlers
        expected = {("transformer", layer, branch, 0, 1) for layer in range(3) for branch in ("cond", "uncond")}
        assert set(made.bits) == expected
    for call in calls:
        patterns.setdefault((call.context.layer, call.context.branch), []).append(call.plan.selection.keep)
    assert [len(kept) for kept in patterns.values()] == [3] * 6
    assert all(torch.equal(kept[0], other) for kept in patterns.values() for other in kept)
    assert not torch.equal(patterns[0, "cond"][0], patterns[2, "cond"][0])
    assert not made.bits


def test_a_training_forward_finds_its_own_pattern_and_keeps_none():
    made, calls = handler(), [call_of(), call_of()]
    assert made.is_active(context(training=True, step_index=0), 0)  # no warm-up: no step is told
    first, second = (chosen_of(planned(made, call, training=True)) for call in calls)
    assert not made.bits
    assert not torch.equal(first, second)
    assert torch.equal(chosen_of(planned(handler(), calls[1])), second)


def test_unset_options_take_the_recipe_then_the_method_s_value_but_density_gives_way_to_mass():
    recipe = {"density": 0.5, "block_size": 64}
    assert SparseD().filled().to_dict().items() >= dict(SparseD.defaults).items()
    assert SparseD().filled(recipe).density == 0.5
    by_mass = SparseD(mass=0.9).filled(recipe)
    assert (by_mass.density, by_mass.mass, by_mass.block_size) == (None, 0.9, 64)
    with pytest.raises(ConfigError, match=r"recipe.*sparsed.*'mass'"):
        SparseD().filled({"mass": 0.9})


def test_advice_names_what_does_not_fit():
    for options, size, text in (({"density": 1}, (9, 16, 16), "18 tiles"), ({}, (9, 16, 16), "20000.*2304")):
        assert re.search(text, SparseD(**options).filled().advice(layout_of(size)))
        assert SparseD().filled().advice(layout_of((21, 45, 80))) is None


def test_what_the_data_decide_is_not_counted_and_the_plan_says_so():
    by_mass, counted = (
        handler(SparseD(**{name: 0.9}, block_size=16)).estimate(LAYOUT, 8) for name in ("mass", "density")
    )
    assert counted.counted
    assert (by_mass.counted, by_mass.tiles) == (False, None)
    assert any("sparsed.mass = 0.9" in note for note in by_mass.notes)
    assert (by_mass.carried_bytes, by_mass.list_bytes) == (counted.carried_bytes, counted.list_bytes)


def test_the_pattern_is_chosen_by_scaled_logits():
    made, call = handler(), call_of()
    plain, turned = (
        chosen_of(made.plan(AttentionPlan().scale(scale), call, context(layer=layer)))
        for layer, scale in enumerate((torch.ones(2), torch.tensor([-1.0, 1.0])))
    )
    assert not torch.equal(turned[:, 0], plain[:, 0])
    assert torch.equal(turned[:, 1], plain[:, 1])


@pytest.mark.parametrize("chunk", [1 << 24, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_masses_are_those_of_dense_attention(monkeypatch, chunk, masked):
    monkeypatch.setattr(masses, "CHUNK", chunk)
    q, k = torch.randn(2, 4, 70, 8, dtype=torch.float64), torch.randn(2, 2, 70, 8, dtype=torch.float64)
    mask, order = (torch.rand(2, 70) > 0.3, torch.randperm(70)) if masked else (None, torch.arange(70))
    x = q @ k.repeat_interleave(2, 1).mT * 0.7
    if masked:
        mask[0, order[24:48]] = False  # a whole tile
        mask[1] = False  # queries without a key have no mass
        x = x.masked_fill(~mask[:, None, None], -torch.inf)
    p = x.softmax(-1).nan_to_num(0.0)[:, :, order][..., order]
    expected = [[p[:, :, i : i + 16, j : j + 24].sum(-1).mean(-1) for j in range(0, 70, 24)] for i in range(0, 70, 16)]
    expected = torch.stack([torch.stack(row, -1) for row in expected], 2)
    options = dict(scale=0.7, key_mask=mask, token_order=order if masked else None, block_q=16, block_k=24)
    torch.testing.assert_close(masses.tile_masses(q, k, **options), expected)
    low = masses.tile_masses(q.bfloat16(), k.bfloat16(), **options)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.01)


def test_no_gradient_and_linear_memory():
    q, k = torch.randn(2, 1, 1, 8192, 8)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        shares = masses.tile_masses(q.requires_grad_(), k, block_q=128, block_k=128)
    assert not shares.requires_grad
    assert max(event.cpu_memory_usage for event in profile.events()) <= 4 * masses.CHUNK < 8192 * 8192 * 4
