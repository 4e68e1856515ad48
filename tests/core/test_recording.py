"""The witness of planned calls: its own computation against the reference, and what it does not let pass."""

import dataclasses

import pytest
import torch
from dit_accel_kernels import Selection, TileLists, block_sparse_attention, pack_bits
from kernel_cases import WIDE, qkv, random_lists
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel import RadialAttention, SolAttention
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.plan import AttentionPlan
from dit_accel.testing.recording import recorded, require_as_planned, require_same, require_text_exact
from dit_accel.testing.reference import attention, tile_states


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_what_is_written_out_is_the_reference(groups):
    """Exact, pooled and skipped tiles, a ragged tail, an order, grouped heads, masked keys."""
    q, k, v = qkv(2, 2, 1, 90, 90, 8, WIDE)
    states = random_lists(groups, 90, 90, 16, 16).states()
    states[:, :, 1] = 2  # no row without a key
    tiles, order = TileLists.from_states(states, block_q=16, block_k=16, num_q=90, num_k=90), torch.randperm(90)
    plan = AttentionPlan(tiles=tiles, token_order=order)
    for valid in (None, torch.rand(2, 90) > 0.2):
        expected = block_sparse_attention(
            q, k, v, tiles, layout="bhsd", scale=0.3, key_mask=valid, token_order=order, backend="reference"
        )
        out = attention(plan, tile_states(plan, 2, 90, None), q, k, v, valid, 0.3)
        require_same(out, expected, "written out and reference")


@pytest.mark.parametrize("rest", ["skip", "pooled"])
def test_bits_are_written_out_as_the_reference_keeps_them(rest):
    q, k, v = qkv(2, 2, 2, 90, 90, 8, WIDE)
    pinned, keep = torch.eye(6, dtype=torch.bool), torch.rand(2, 2, 6, 6) > 0.5
    selection = Selection(keep=pack_bits(keep), rest=rest, pinned=pack_bits(pinned))
    plan = AttentionPlan(tiles=TileLists.full(90, 90, block_q=16, block_k=16), selection=selection)
    expected, exact = block_sparse_attention(
        q, k, v, plan.tiles, layout="bhsd", selection=selection, return_tiles=True, backend="reference"
    )
    found = attention(plan, tile_states(plan, 2, 90, exact), q, k, v, None, None)
    require_same(found, expected, "written out and reference")


@pytest.fixture(scope="module")
def calls():
    """The calls of one forward, which are as planned."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 12, 5, 8, 8), torch.tensor([500.0]), torch.randn(1, 6, 64)
    radial = RadialAttention(block_size=16, rest="pooled", dense_steps=0, dense_layers=0)
    methods, transformer = (radial, SolAttention(dense_steps=0, dense_layers=0)), tiny_transformer()
    attachment = dit_accel.attach(transformer, *methods, preset="none")
    with attachment, recorded(attachment) as calls, torch.no_grad():
        transformer(*inputs)
    assert len(calls) == 3
    require_as_planned(calls)
    return calls


def test_what_is_not_as_planned_is_noticed(calls):
    """An output of other tiles, a tile selected otherwise, text that is thinned out."""
    first = calls[0]
    assert (first.states()[0, 0] == 1).any()
    dense = attention(AttentionPlan(), torch.full((1, 1, 1, 1), 2), first.q, first.k, first.v, None, None)
    with pytest.raises(AssertionError, match=r"planned call.*error"):
        require_as_planned([dataclasses.replace(first, out=dense), *calls[1:]])
    exact = first.exact.clone()
    exact[0, 0, 0, 0] ^= 1 << 4
    with pytest.raises(AssertionError, match="1 of 50 tiles"):
        require_as_planned([dataclasses.replace(first, exact=exact)])
    require_text_exact(first)
    other = dataclasses.replace(first.context, layout=TokenLayout(frames=4, height=4, width=4, text_after=16))
    with pytest.raises(AssertionError, match=r"text tokens.*exact"):
        require_text_exact(dataclasses.replace(first, context=other))
