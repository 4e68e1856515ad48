"""Plans that reuse rows: each prompt's own list of computed tokens, with all that a plan holds by row of the batch."""

import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import TileLists, Vote, pack_bits
from one_layer import Fixed, OneLayer

from dit_accel import ConfigError
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.normalized_guidance import NormalizedGuidance
from dit_accel.plan.plan import AttentionPlan, ReusedRows, RowOverride
from dit_accel.plan.tiling import full_tiles

TOKENS, BLOCK, SIDE, HEADS = 90, 16, 6, 2
FULL = full_tiles(TOKENS, TOKENS, BLOCK, "cpu")
ROWS = RowOverride(rows=torch.arange(4), keys=torch.ones(TOKENS, dtype=torch.bool))


def lists(states: torch.Tensor) -> TileLists:
    return TileLists.from_states(states.to(torch.uint8), block_q=BLOCK, block_k=BLOCK, num_q=TOKENS, num_k=TOKENS)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_reused_rows_follow_a_list_for_each_prompt(prompts, tiled, backend):
    """Lists by row and head, bits, scales, key means by row: row b computes list b % N, and the rest is kept."""
    generator, batch = torch.Generator().manual_seed(5), 4
    layout = TokenLayout(frames=3, height=5, width=6)
    q, k, v, held = torch.randn(4, batch, HEADS, TOKENS, 8, dtype=torch.float64, generator=generator)
    plan = AttentionPlan().centre_keys(k.mean(2, keepdim=True))
    plan = plan.scale(torch.rand(batch, HEADS, dtype=torch.float64, generator=generator) + 0.5)
    if tiled:
        states = torch.randint(1, 3, (batch * HEADS, SIDE, SIDE), generator=generator)
        keep = torch.rand(batch, HEADS, SIDE, SIDE, generator=generator) < 0.5
        plan = plan.with_tiles(lists(states)).narrow(keep=pack_bits(keep), rest="pooled")
    rows = tuple(torch.tensor(one) for one in ([3, 50], [], [88], [20, 21, 35])[:prompts])
    whole = OneLayer(Fixed(plan), backend=backend).call(q, k, v, layout)
    reused = plan.reuse_rows(ReusedRows(rows=rows, out=held))
    layer = OneLayer(Fixed(reused), backend=backend)
    found, size = layer.call(q, k, v, layout), BLOCK if tiled else 1
    for row in range(batch):
        computed = {int(token) // size for token in rows[row % prompts]}
        mine = torch.tensor([token // size in computed for token in range(TOKENS)])
        torch.testing.assert_close(found[row, :, mine], whole[row, :, mine])
        assert torch.equal(found[row, :, ~mine], held[row, :, ~mine])
    assert torch.equal(held, reused.reused.out)


def test_rows_of_a_batch_see_keys_of_their_own():
    batch, generator = 4, torch.Generator().manual_seed(6)
    layout = TokenLayout(frames=3, height=5, width=6)
    q, k, v = torch.randn(3, batch, HEADS, TOKENS, 8, dtype=torch.float64, generator=generator)
    keys = torch.rand(2, TOKENS, generator=generator) < 0.5
    rows = torch.tensor([1, 4]), torch.tensor([7])
    for plan in (AttentionPlan(), AttentionPlan().with_tiles(FULL)):
        reused = plan.reuse_rows(ReusedRows(rows=rows, out=torch.zeros_like(q), keys=keys))
        found = OneLayer(Fixed(reused)).call(q, k, v, layout)
        expected = F.scaled_dot_product_attention(q, k, v, keys.repeat(2, 1)[:, None, None])
        for row in range(batch):
            listed = rows[row % 2]
            torch.testing.assert_close(found[row, :, listed], expected[row, :, listed])


@pytest.mark.parametrize("ndim", [2, 4])
def test_rows_of_a_call_have_their_masks(ndim):
    layout, mask = TokenLayout(frames=3, height=5, width=6), torch.rand(2, TOKENS) < 0.5
    q, k, v = torch.randn(3, 2, HEADS, TOKENS, 8, dtype=torch.float64)
    given = mask if ndim == 2 else mask[:, None, None]
    rows = torch.tensor([1, 4]), torch.tensor([7])
    plan = AttentionPlan().with_tiles(FULL).reuse_rows(ReusedRows(rows=rows, out=torch.zeros_like(q)))
    found = OneLayer(Fixed(plan)).call(q, k, v, layout, mask=given)
    expected = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
    for row in range(2):
        torch.testing.assert_close(found[row, :, rows[row]], expected[row, :, rows[row]])


def test_rows_are_reused_once_and_not_where_all_are_asked_for():
    reused = ReusedRows(rows=(torch.arange(3),), out=torch.zeros(1, HEADS, TOKENS, 8))
    with pytest.raises(ConfigError, match=r"plan.*reused rows"):
        AttentionPlan().reuse_rows(reused).reuse_rows(reused)
    for plan, what in (
        (AttentionPlan().with_tiles(FULL).vote(Vote(threshold=-3.0)), "votes"),
        (AttentionPlan().override_rows(ROWS), "their own"),
        (AttentionPlan().mix(torch.ones(HEADS)), "a mix of V"),
    ):
        with pytest.raises(ConfigError, match=rf"plan.*{what}.*all rows"):
            plan.reuse_rows(reused)


def test_the_plan_of_some_rows_reuses_and_leads_none():
    states = torch.randint(0, 3, (4 * HEADS, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    guidance = NormalizedGuidance(
        positive=slice(0, 2), negative=slice(2, 4), tokens=slice(0, 9), scale=2.0, tau=2.0, alpha=0.5
    )
    plan = AttentionPlan().with_tiles(lists(states)).scale(torch.rand(4, HEADS)).guide(guidance)
    plan = plan.reuse_rows(ReusedRows(rows=(torch.arange(3),), out=torch.zeros(4, HEADS, TOKENS, 8)))
    some = plan.of_rows(slice(1, None, 2), 4, HEADS)
    assert some.reused is None
    assert some.guidance is None
    assert torch.equal(some.head_scale, plan.head_scale[[1, 3]])
    assert torch.equal(some.tiles.states(), states.to(torch.uint8)[[2, 3, 6, 7]])
    for shared in (AttentionPlan().with_tiles(FULL), AttentionPlan().with_tiles(lists(states[:HEADS]))):
        assert shared.scale(torch.ones(HEADS)).of_rows(slice(0, 1), 4, HEADS).tiles is shared.tiles
