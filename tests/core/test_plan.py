"""The attention plan's verbs: what merges, what is refused, and what a plan that needs no kernel computes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import EXACT, POOLED, SKIPPED, FrameDecay, Routing, TileLists, Vote, pack_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import Fixed, OneLayer

from dit_accel import ConfigError
from dit_accel.plan.call import Call
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan, RowOverride, is_full
from dit_accel.plan.tiling import Tiling, exact_bits, full_tiles, pinned_bits, visual_first, visual_lists

TOKENS, BLOCK, SIDE = 90, 16, 6
FULL = full_tiles(TOKENS, TOKENS, BLOCK, "cpu")
HEADS = 2
FRAMES = torch.zeros(TOKENS).int()
DECAY = FrameDecay(table=torch.tensor([1.0, 0.5]), q_frames=FRAMES, k_frames=FRAMES)
ROWS = RowOverride(rows=torch.arange(4), keys=torch.ones(TOKENS, dtype=torch.bool))


def lists(states: torch.Tensor, block: int = BLOCK, tokens: int = TOKENS) -> TileLists:
    return TileLists.from_states(states.to(torch.uint8), block_q=block, block_k=block, num_q=tokens, num_k=tokens)


def some_states(seed: int, groups: int = 1) -> torch.Tensor:
    return torch.randint(0, 3, (groups, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def bits(seed: int, *shape: int) -> torch.Tensor:
    return pack_bits(torch.rand(*shape, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) < 0.5)


def merged(one: int, other: int) -> int:
    """What becomes of a tile of two lists."""
    if one == other == EXACT:
        return EXACT
    return POOLED if POOLED in (one, other) else SKIPPED


@given(
    seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)), groups=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)])
)
@settings(max_examples=40, deadline=None)
def test_lists_meet_tile_by_tile(seeds, groups):
    """Exact where both are; else pooled where either pools; else skipped. Lists of each head are followed."""
    one, other = (some_states(seed, count) for seed, count in zip(seeds, groups, strict=True))
    found = AttentionPlan().with_tiles(lists(one)).with_tiles(lists(other)).tiles
    assert found.groups == max(groups)
    one, other = (states.expand(found.groups, -1, -1).tolist() for states in (one, other))
    expected = [
        [[merged(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(*heads, strict=True)]
        for heads in zip(one, other, strict=True)
    ]
    assert found.validate().states().tolist() == expected
    swapped = AttentionPlan().with_tiles(lists(torch.tensor(other))).with_tiles(lists(torch.tensor(one))).tiles
    assert torch.equal(swapped.states(), found.states())


def test_a_full_list_changes_nothing_and_merged_lists_are_kept_and_serve_training():
    one, other = lists(some_states(5)), lists(some_states(6))
    assert [is_full(tiles) for tiles in (one, FULL)] == [False, True]
    for first, second in ((FULL, one), (one, FULL), (one, full_tiles(TOKENS, TOKENS, BLOCK, "cpu"))):
        assert AttentionPlan().with_tiles(first).with_tiles(second).tiles is one
    assert AttentionPlan().with_tiles(FULL).with_tiles(FULL).tiles is FULL
    with torch.inference_mode():
        found = AttentionPlan().with_tiles(one).with_tiles(other).tiles
    assert AttentionPlan().with_tiles(one).with_tiles(other).tiles is found
    assert not found.exact_indices.is_inference()
    order = torch.randperm(TOKENS)
    assert AttentionPlan().with_tiles(one, order).with_tiles(other, order.clone()).token_order is order


def test_lists_of_other_tiles_or_another_order_are_refused():
    one, other = torch.arange(TOKENS), torch.arange(TOKENS).flip(0)
    for (tiles, order), (others, another), message in (
        ((FULL, None), (full_tiles(TOKENS, TOKENS, 32, "cpu"), None), r"32 x 32.*16 x 16"),
        ((FULL, None), (full_tiles(TOKENS, 80, BLOCK, "cpu"), None), r"90 x 80 tokens.*90 x 90"),
        ((FULL, None), (full_tiles(91, 91, BLOCK, "cpu"), None), r"91 x 91 tokens.*90 x 90"),
        ((lists(some_states(1, 2)), None), (lists(some_states(2, 3)), None), "2 and 3 groups"),
        ((FULL, None), (FULL, one), "token order"),
        ((FULL, one), (FULL, other), "token order"),
        ((FULL, one), (FULL, None), "token order"),
        ((FULL, one), (FULL, one[:-1]), "token order"),
    ):
        with pytest.raises(ConfigError, match=message):
            AttentionPlan().with_tiles(tiles, order).with_tiles(others, another)


def test_tiles_stay_where_every_method_keeps_them_or_any_pins_them():
    keeps, pins = [bits(seed, 1, HEADS) for seed in (1, 2, 3)], [bits(seed) for seed in (4, 5)]
    plan = AttentionPlan().with_tiles(FULL).narrow(keep=keeps[0], pinned=pins[0])
    assert (plan.selection.keep is keeps[0], plan.selection.pinned is pins[0]) == (True, True)
    plan = plan.narrow(keep=keeps[1]).narrow(pinned=pins[1]).narrow(keep=keeps[2])
    assert torch.equal(plan.selection.keep, keeps[0] & keeps[1] & keeps[2])
    assert torch.equal(plan.selection.pinned, pins[0] | pins[1])


def test_what_is_dropped_is_pooled_where_any_method_that_drops_asks_for_it():
    for pair in itertools.product(itertools.product(("skip", "pooled"), (True, False)), repeat=2):
        plan = AttentionPlan().with_tiles(FULL)
        for rest, drops in pair:
            plan = plan.narrow(keep=bits(1, 1, HEADS) if drops else None, pinned=bits(9), rest=rest)
        if asked := [rest for rest, drops in pair if drops]:
            assert plan.selection.rest == ("pooled" if "pooled" in asked else "skip")
        else:
            assert plan.selection.keep is None


def test_routing_and_votes_are_added_to_what_is_kept():
    keep, routing, vote = bits(1, 1, HEADS), Routing(beta=1.5), Vote(threshold=-3.0)
    full = AttentionPlan().with_tiles(FULL)
    for plan, votes in (
        (full.narrow(keep=keep).route(routing).vote(vote, reverse=True), vote),
        (full.vote(None, reverse=True).narrow(keep=keep).route(routing), None),
    ):
        one = plan.selection
        assert (one.keep is keep, one.routing, one.vote, one.reverse) == (True, routing, votes, True)


def test_what_selects_tiles_needs_them_and_what_a_call_takes_once_is_refused_twice():
    for verb, needing, twice in (
        (lambda plan: plan.narrow(keep=bits(1, 1, HEADS)), "narrowed", None),
        (lambda plan: plan.route(Routing(beta=1.0)), "routed", "routing"),
        (lambda plan: plan.vote(Vote(threshold=-3.0)), "voted on", "vote"),
        (lambda plan: plan.decay(DECAY), None, "frame decay"),
        (lambda plan: plan.centre_keys(torch.zeros(1, HEADS, 1, 8)), None, "keys"),
        (lambda plan: plan.override_rows(ROWS), None, "row override"),
        (lambda plan: plan.query(torch.zeros(1, HEADS, TOKENS, 8)), None, "other queries"),
        (lambda plan: plan.guide(object()), None, "guided rows"),
    ):
        if needing:
            with pytest.raises(ConfigError, match=rf"{needing}.*with_tiles"):
                verb(AttentionPlan())
        once = verb(AttentionPlan().with_tiles(FULL))
        if twice:
            with pytest.raises(ConfigError, match=rf"plan.*{twice} already"):
                verb(once)


def test_scales_multiply():
    one, other = torch.tensor([0.5, 2.0]), torch.tensor([[3.0, 1.0], [1.0, 0.25]])
    assert AttentionPlan().scale(one).head_scale is one
    assert torch.equal(AttentionPlan().scale(one).scale(other).head_scale, one * other)


@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=4))
@settings(deadline=None)
def test_each_mix_takes_its_share_of_what_is_left(shares):
    plan, left = AttentionPlan(), 1.0
    for share in shares:
        plan = plan.mix(torch.tensor([share, 0.0], dtype=torch.float64))
        left *= 1 - share
    torch.testing.assert_close(plan.identity_mix, torch.tensor([1 - left, 0.0], dtype=torch.float64))


def test_mixes_touch_the_same_tokens():
    rows, mix = torch.arange(TOKENS) < 40, torch.tensor([0.5, 0.5])
    plan = AttentionPlan().mix(mix, rows)
    assert plan.mix(mix, rows.clone()).identity_rows is plan.identity_rows is rows
    for mixed, other in ((plan, None), (plan, ~rows), (AttentionPlan().mix(mix), rows)):
        with pytest.raises(ConfigError, match="plan mixes V"):
            mixed.mix(mix, other)


def test_which_plans_need_a_kernel_and_which_leave_nothing_out():
    empty, full = AttentionPlan(), AttentionPlan().with_tiles(FULL)
    for plan, kernel, dense in (
        (empty, False, True),
        (empty.scale(torch.ones(HEADS)), False, True),
        (empty.mix(torch.ones(HEADS)), False, True),
        (empty.centre_keys(torch.zeros(1, HEADS, 1, 8)), False, True),
        (empty.decay(DECAY), True, True),
        (empty.override_rows(ROWS), True, True),
        (full, True, True),
        (full.narrow(pinned=bits(1)), True, True),
        (full.vote(Vote(threshold=-3.0)), True, True),
        (empty.with_tiles(lists(some_states(1))), True, False),
        (full.narrow(keep=bits(1, 1, HEADS)), True, False),
        (full.route(Routing(beta=1.0)), True, False),
    ):
        assert (plan.needs_kernel, plan.is_dense) == (kernel, dense), plan


@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_plan_that_needs_no_kernel_knows_grouped_heads(tokens_first):
    layout = TokenLayout(frames=2, height=3, width=4)
    q, k, v = (torch.randn(2, heads, layout.tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    mix = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    layer = OneLayer(Fixed(AttentionPlan().mix(mix)), tokens_first=tokens_first)
    out = layer.call(*((x.transpose(1, 2) if tokens_first else x) for x in (q, k, v)), layout, scale=0.3)
    out = out.transpose(1, 2) if tokens_first else out
    assert layer.attended == 1
    plain = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    expected = torch.lerp(plain, v.repeat_interleave(2, 1), mix[:, None, None].expand_as(plain))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    for one, other in zip(found, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_merged_plan_computes_what_its_states_say(backend):
    """Two lists, two bitmaps, a scale and a mix: one call equals masked attention written out."""
    layout = TokenLayout(frames=3, height=5, width=6)
    one, other = (torch.where(some_states(seed) == POOLED, EXACT, some_states(seed)) for seed in (11, 12))
    one[:, range(SIDE), range(SIDE)] = other[:, range(SIDE), range(SIDE)] = EXACT  # no row without a key
    keep, pinned = torch.rand(1, HEADS, SIDE, SIDE) < 0.5, torch.eye(SIDE, dtype=torch.bool)
    plan = AttentionPlan().with_tiles(lists(one)).with_tiles(lists(other))
    plan = plan.narrow(keep=pack_bits(keep), pinned=pack_bits(pinned)).narrow(keep=pack_bits(keep))
    plan = plan.scale(torch.tensor([0.5, 2.0])).scale(torch.tensor([2.0, 2.0])).mix(torch.tensor([0.5, 0.0]))
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, 8, dtype=torch.float64)
    out = OneLayer(Fixed(plan), backend=backend).call(q, k, v, layout)
    exact = (one == EXACT) & (other == EXACT) & (keep | pinned)
    mask = exact.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)[..., :TOKENS, :TOKENS]
    factor = torch.tensor([1.0, 4.0], dtype=torch.float64)[:, None, None]
    expected = F.scaled_dot_product_attention(factor * q, k, v, mask)
    expected[:, 0] = 0.5 * (expected[:, 0] + v[:, 0])
    torch.testing.assert_close(out, expected)


def test_what_is_kept_for_later_calls_serves_training():
    layout = TokenLayout(frames=3, height=5, width=7, text_before=2)
    with torch.inference_mode():
        tiles = full_tiles(layout.tokens, layout.tokens, BLOCK, "cpu")
        lists = visual_lists(torch.eye(7, dtype=torch.bool).numpy(), False, layout, BLOCK, "cpu")
        made = [tiles.exact_indices, lists.exact_indices, exact_bits(lists, HEADS), visual_first(layout, 8)]
        assert not any(x.is_inference() for x in (*made, pinned_bits(layout, BLOCK, 1, "text", "cpu")))


def test_tiles_of_an_attachment_are_the_same_objects_for_the_same_layout():
    layout = TokenLayout(frames=3, height=5, width=6, text_before=4)
    tiling = Tiling(BLOCK, "tiles")
    tiles, order = tiling.full(layout)
    assert all(one is other for one, other in zip(tiling.full(layout), (tiles, order), strict=True))
    assert is_full(tiles)
    assert order[-4:].tolist() == [0, 1, 2, 3]
    assert Tiling(BLOCK).full(TokenLayout(frames=3, height=5, width=6))[1] is None


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_keys_before_their_mean_is_taken_off(masked):
    """That of autograd through the mean over the valid keys; a row without any has no mean to go through."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(3, HEADS, 9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(3, HEADS, 9, 4, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, 9, generator=generator) < 0.6 if masked else torch.ones(3, 9, dtype=torch.bool)
    mask[2] = not masked
    if masked:
        mask[1] = torch.arange(9) == 4  # one key is its own mean
    weight = mask.double()[:, None, :, None]
    mean = (k * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
    plan = AttentionPlan().centre_keys(mean.detach())
    (expected,) = torch.autograd.grad(k - mean, k, grad)
    torch.testing.assert_close(plan.gradient_before_centring(grad, mask if masked else None), expected)
    torch.testing.assert_close(plan.centred(k.detach()), (k - mean).detach())
    assert AttentionPlan().gradient_before_centring(grad, mask) is grad
    assert AttentionPlan().centred(grad) is grad


def test_a_call_of_some_rows_is_planned_with_a_query_for_every_token():
    q, k = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 9, 8)
    whole = Call(q=q, k=k, v=k, rows=torch.arange(3)).for_planning()
    assert (whole.q.shape, whole.rows) == ((2, 4, 9, 8), None)
