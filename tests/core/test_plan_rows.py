"""Rows of a batch with plans of their own: reused rows by each prompt's list, and rows that follow another plan."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dit_accel_kernels import EXACT, Selection, TileLists, Vote, pack_bits
from one_layer import Fixed, OneLayer, random_call

from dit_accel import ConfigError
from dit_accel.methods.guidance.targets import OtherOutput
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan, ReusedRows, RowOverride
from dit_accel.plan.rows_apart import with_rows_apart
from dit_accel.plan.tiling import full_tiles
from dit_accel.testing.recording import require_same

LAYOUT = TokenLayout(frames=4, height=4, width=6)
TOKENS, BLOCK, SIDE, HEADS = 96, 16, 6, 2
FULL = full_tiles(TOKENS, TOKENS, BLOCK, "cpu")
ROWS = RowOverride(rows=torch.arange(4), keys=torch.ones(TOKENS, dtype=torch.bool))
SECOND = torch.tensor([False, True])
"""The row of two that follows a plan of its own."""


def lists(states: torch.Tensor) -> TileLists:
    return TileLists.from_states(states.to(torch.uint8), block_q=BLOCK, block_k=BLOCK, num_q=TOKENS, num_k=TOKENS)


def random_lists(heads: int = 1) -> TileLists:
    return lists(torch.randint(0, 3, (heads, SIDE, SIDE)).masked_fill(torch.eye(SIDE, dtype=torch.bool), EXACT))


def kept(seed: int) -> torch.Tensor:
    return pack_bits(torch.rand(2, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) < 0.6)


def run(plan: AttentionPlan, *qkv: torch.Tensor, backend: str = "reference", **options) -> torch.Tensor:
    return OneLayer(Fixed(plan), backend=backend).call(*qkv, LAYOUT, **options)


def full() -> AttentionPlan:
    return AttentionPlan().with_tiles(FULL)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_reused_rows_follow_a_list_for_each_prompt(prompts, tiled, backend):
    """Lists by row and head, bits, scales, key means by row: row b computes list b % N, and the rest is kept."""
    generator, batch = torch.Generator().manual_seed(5), 4
    q, k, v, held = torch.randn(4, batch, HEADS, TOKENS, 8, dtype=torch.float64, generator=generator)
    plan = AttentionPlan().centre_keys(k.mean(2, keepdim=True))
    plan = plan.scale(torch.rand(batch, HEADS, dtype=torch.float64, generator=generator) + 0.5)
    if tiled:
        states = torch.randint(1, 3, (batch * HEADS, SIDE, SIDE), generator=generator)
        keep = torch.rand(batch, HEADS, SIDE, SIDE, generator=generator) < 0.5
        plan = plan.with_tiles(lists(states)).narrow(keep=pack_bits(keep), rest="pooled")
    rows = tuple(torch.tensor(one) for one in ([3, 50], [], [88], [20, 21, 35])[:prompts])
    reused, size = plan.reuse_rows(ReusedRows(rows=rows, out=held)), BLOCK if tiled else 1
    whole, out = (run(one, q, k, v, backend=backend) for one in (plan, reused))
    for row in range(batch):
        computed = {int(token) // size for token in rows[row % prompts]}
        mine = torch.tensor([token // size in computed for token in range(TOKENS)])
        torch.testing.assert_close(out[row, :, mine], whole[row, :, mine])
        assert torch.equal(out[row, :, ~mine], held[row, :, ~mine])
    assert torch.equal(held, reused.reused.out)


def test_rows_of_a_batch_see_keys_of_their_own():
    """Keys of each prompt, as a plan gives them, or of each row, as a call's mask does."""
    for plan, where in (
        (AttentionPlan(), "keys"),
        (full(), "keys"),
        (full(), "mask"),
        (full(), "wide mask"),
        (AttentionPlan(), "wide mask"),
    ):
        q, k, v = torch.randn(3, 4, HEADS, TOKENS, 8, dtype=torch.float64)
        keys, rows = torch.rand(2 if where == "keys" else 4, TOKENS) < 0.5, (torch.tensor([1, 4]), torch.tensor([7]))
        mask = {"keys": None, "mask": keys, "wide mask": keys[:, None, None]}[where]
        reused = ReusedRows(rows=rows, out=torch.zeros_like(q), keys=keys if where == "keys" else None)
        out = run(plan.reuse_rows(reused), q, k, v, mask=mask)
        expected = F.scaled_dot_product_attention(q, k, v, keys.repeat(4 // len(keys), 1)[:, None, None])
        for row in range(4):
            listed = rows[row % 2]
            torch.testing.assert_close(out[row, :, listed], expected[row, :, listed])


def test_rows_are_reused_once_and_not_where_all_are_asked_for():
    reused = ReusedRows(rows=(torch.arange(3),), out=torch.zeros(1, HEADS, TOKENS, 8))
    with pytest.raises(ConfigError, match=r"plan.*reused rows"):
        AttentionPlan().reuse_rows(reused).reuse_rows(reused)
    for plan, what in (
        (full().vote(Vote(threshold=-3.0)), "votes"),
        (AttentionPlan().override_rows(ROWS), "their own"),
        (AttentionPlan().mix(torch.ones(HEADS)), "a mix of V"),
    ):
        with pytest.raises(ConfigError, match=rf"plan.*{what}.*all rows"):
            plan.reuse_rows(reused)


def test_the_plan_of_some_rows_reuses_and_leads_none():
    states = torch.randint(0, 3, (4 * HEADS, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    plan = AttentionPlan().with_tiles(lists(states)).scale(torch.rand(4, HEADS)).guide(object())
    plan = plan.reuse_rows(ReusedRows(rows=(torch.arange(3),), out=torch.zeros(4, HEADS, TOKENS, 8)))
    some = plan.of_rows(slice(1, None, 2), 4, HEADS)
    assert some.reused is some.guidance is None
    assert torch.equal(some.head_scale, plan.head_scale[[1, 3]])
    assert torch.equal(some.tiles.states(), states.to(torch.uint8)[[2, 3, 6, 7]])
    for shared in (full(), AttentionPlan().with_tiles(lists(states[:HEADS]))):
        one = shared.scale(torch.ones(HEADS)).of_rows(slice(0, 1), HEADS, HEADS)  # as many rows as heads
        assert (one.tiles is shared.tiles, len(one.head_scale)) == (True, HEADS)


CHANGES = {
    "tiles": lambda plan, call: plan.with_tiles(random_lists()),
    "tiles of each head": lambda plan, call: plan.with_tiles(random_lists(HEADS)),
    "bits": lambda plan, call: (full() if plan.tiles is None else plan).narrow(keep=kept(1)),
    "a scale": lambda plan, call: plan.scale(torch.tensor([0.3, 1.0])),
    "a mix": lambda plan, call: plan.mix(torch.tensor([0.4, 0.0]).double()),
    "values alone": lambda plan, call: plan.mix(torch.ones(2).double(), only_values=True),
    "other queries": lambda plan, call: plan.query(call.q.flip(2)),
    "another output": lambda plan, call: plan.guide(OtherOutput(other=call.v, share=torch.tensor([0.5, 0.0]))),
}
BEFORE = {
    "nothing": AttentionPlan,
    "tiles": lambda: AttentionPlan().with_tiles(random_lists()),
    "bits and a scale": lambda: full().narrow(keep=kept(2)).scale(torch.tensor([1.5, 0.5])),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("change", CHANGES)
def test_each_row_follows_its_own_plan(before, change):
    call, plan = random_call(LAYOUT, "bhsd"), BEFORE[before]()
    other = CHANGES[change](plan, call)
    plans = with_rows_apart(plan, other, SECOND, call), plan, other
    out, ours, theirs = (run(one, call.q, call.k, call.v) for one in plans)
    require_same(out[:1], ours[:1], "the row that is not perturbed")
    require_same(out[1:], theirs[1:], "the row that is")
    assert not torch.equal(out[1], ours[1])


def test_all_rows_or_none_take_a_plan_whole():
    call, plan = random_call(LAYOUT, "bhsd"), AttentionPlan()
    other = plan.scale(torch.ones(2))
    assert with_rows_apart(plan, other, SECOND | True, call) is other
    assert with_rows_apart(plan, other, SECOND & False, call) is plan
    assert with_rows_apart(plan, plan, SECOND, call) is plan
    assert plan.is_plain
    assert not any(change(plan, call).is_plain for change in CHANGES.values())
    assert not plan.reuse_rows(ReusedRows(rows=(torch.arange(3),), out=call.q)).is_plain


def test_what_all_rows_of_a_call_share_is_refused():
    ids, bits = torch.zeros(SIDE**2, dtype=torch.int32), torch.ones(1, BLOCK, 1, dtype=torch.int32)
    masked = replace(FULL, mask_ids=ids, mask_bits=bits)
    for change, part in (
        (lambda plan: plan.centre_keys(torch.zeros(2, 2, 1, 8)), "key mean"),
        (lambda plan: plan.vote(Vote(criterion="maxgap", threshold=-3.0)), "vote"),
        (lambda plan: plan.narrow(keep=kept(1), rest="pooled"), "rest"),
        (lambda plan: plan.narrow(pinned=torch.zeros(6, 1, dtype=torch.int32)), "pinned"),
    ):
        plan = AttentionPlan(tiles=FULL, selection=Selection(keep=kept(2)))
        with pytest.raises(ConfigError, match=rf"one {part} for"):
            with_rows_apart(plan, change(plan), SECOND, random_call(LAYOUT, "bhsd"))
    for pair in itertools.permutations((AttentionPlan(tiles=masked), AttentionPlan(tiles=random_lists()))):
        with pytest.raises(ConfigError, match=r"masks.*for"):
            with_rows_apart(*pair, SECOND, random_call(LAYOUT, "bhsd"))
