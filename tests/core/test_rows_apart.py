"""Rows of a batch that follow a plan of their own: each row is what it is under its plan alone, and what is refused."""

import pytest
import torch
from dit_accel_kernels import EXACT, Selection, TileLists, Vote, pack_bits
from one_layer import Fixed, OneLayer, random_call

from dit_accel import ConfigError
from dit_accel.methods.guidance.targets import OtherOutput
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.plan.rows_apart import with_rows_apart
from dit_accel.testing.recording import require_same

LAYOUT = TokenLayout(frames=4, height=4, width=6)
ROWS = torch.tensor([False, True])


def tiles(*, heads: int = 1) -> TileLists:
    states = torch.randint(0, 3, (heads, 6, 6), dtype=torch.uint8)
    states[:, range(6), range(6)] = EXACT
    return TileLists.from_states(states, block_q=16, block_k=16, num_q=96, num_k=96)


def full() -> AttentionPlan:
    return AttentionPlan(tiles=TileLists.from_states(torch.full((1, 6, 6), EXACT, dtype=torch.uint8), **tiles().sizes))


def kept(seed: int) -> torch.Tensor:
    return pack_bits(torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) < 0.6)


CHANGES = {
    "tiles": lambda plan, call: plan.with_tiles(tiles()),
    "tiles of each head": lambda plan, call: plan.with_tiles(tiles(heads=2)),
    "bits": lambda plan, call: (full() if plan.tiles is None else plan).narrow(keep=kept(1)),
    "a scale": lambda plan, call: plan.scale(torch.tensor([0.3, 1.0])),
    "a mix": lambda plan, call: plan.mix(torch.tensor([0.4, 0.0]).double()),
    "values alone": lambda plan, call: plan.mix(torch.ones(2).double(), only_values=True),
    "other queries": lambda plan, call: plan.query(call.q.flip(2)),
    "another output": lambda plan, call: plan.guide(OtherOutput(other=call.v, share=torch.tensor([0.5, 0.0]))),
}
BEFORE = {
    "nothing": AttentionPlan,
    "tiles": lambda: AttentionPlan(tiles=tiles()),
    "bits and a scale": lambda: full().narrow(keep=kept(2)).scale(torch.tensor([1.5, 0.5])),
}


def ran(plan, call):
    return OneLayer(Fixed(plan)).call(call.q, call.k, call.v, LAYOUT)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("change", CHANGES)
def test_each_row_follows_its_own_plan(before, change):
    call, plan = random_call(LAYOUT, "bhsd"), BEFORE[before]()
    other = CHANGES[change](plan, call)
    out, ours, theirs = (ran(one, call) for one in (with_rows_apart(plan, other, ROWS, call), plan, other))
    require_same(out[:1], ours[:1], "the row that is not perturbed")
    require_same(out[1:], theirs[1:], "the row that is")
    assert not torch.equal(out[1], ours[1])


def test_all_rows_or_none_take_a_plan_whole():
    call, plan = random_call(LAYOUT, "bhsd"), AttentionPlan()
    other = plan.scale(torch.ones(2))
    assert with_rows_apart(plan, other, ROWS | True, call) is other
    assert with_rows_apart(plan, other, ROWS & False, call) is plan
    assert with_rows_apart(plan, plan, ROWS, call) is plan


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda plan: plan.centre_keys(torch.zeros(2, 2, 1, 8)), "key mean"),
        (lambda plan: plan.vote(Vote(criterion="maxgap", threshold=-3.0)), "vote"),
        (lambda plan: plan.narrow(keep=kept(1), rest="pooled"), "rest"),
        (lambda plan: plan.narrow(pinned=torch.zeros(6, 1, dtype=torch.int32)), "pinned"),
    ],
)
def test_what_all_rows_of_a_call_share_is_refused(change, part):
    plan = AttentionPlan(tiles=full().tiles, selection=Selection(keep=kept(2)))
    with pytest.raises(ConfigError, match=rf"one {part} for"):
        with_rows_apart(plan, change(plan), ROWS, random_call(LAYOUT, "bhsd"))
