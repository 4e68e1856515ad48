"""Tile lists: round trips between states and CSR, counts, and what creation and `validate` refuse."""

import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED, TileLists
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def cases(draw):
    sizes = [draw(st.integers(1, 40)) for _ in range(2)]
    blocks = [draw(st.integers(1, 9)) for _ in range(2)]
    shape = (draw(st.integers(1, 4)), -(-sizes[0] // blocks[0]), -(-sizes[1] // blocks[1]))
    seed = draw(st.integers(0, 2**31))
    high = draw(st.sampled_from([1, 2, 3]))
    states = torch.randint(0, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return states, dict(block_q=blocks[0], block_k=blocks[1], num_q=sizes[0], num_k=sizes[1])


@settings(deadline=None, max_examples=60)
@given(cases())
def test_states_survive_the_round_trip(case):
    states, sizes = case
    tiles = TileLists.from_states(states, **sizes).validate()
    assert torch.equal(tiles.states(), states)
    assert tiles.groups == states.shape[0]
    assert tiles.tiles_total == states.numel()
    assert tiles.tiles_exact == int((states == EXACT).sum())
    assert tiles.tiles_pooled == int((states == POOLED).sum())
    assert tiles.density == tiles.tiles_exact / tiles.tiles_total
    assert (tiles.pooled_indices is None) == (tiles.tiles_pooled == 0)
    again = TileLists.from_states(tiles.states(), **sizes)
    assert torch.equal(again.exact_offsets, tiles.exact_offsets)
    assert torch.equal(again.exact_indices, tiles.exact_indices)


def test_offsets_are_absolute_and_int32():
    states = torch.tensor([[[2, 2], [0, 2]], [[1, 0], [2, 1]]], dtype=torch.uint8)
    tiles = TileLists.from_states(states, block_q=4, block_k=4, num_q=8, num_k=7)
    assert tiles.exact_offsets.tolist() == [[0, 2, 3], [3, 3, 4]]
    assert tiles.exact_indices.tolist() == [0, 1, 1, 0]
    assert tiles.pooled_offsets.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert tiles.pooled_indices.tolist() == [0, 1]
    assert {t.dtype for t in (tiles.exact_offsets, tiles.exact_indices, tiles.pooled_indices)} == {torch.int32}


def test_full_lists_are_dense_and_made_once():
    tiles = TileLists.full(100, 63, block_q=32, block_k=16)
    assert tiles.density == 1.0
    assert tuple(tiles.states().shape) == (1, 4, 4)
    assert TileLists.full(100, 63, block_q=32, block_k=16) is tiles
    with pytest.raises(ValueError, match=r"num_q.*1, found 0"):
        TileLists.full(0, 63, block_q=32, block_k=16)


def test_two_dimensional_states_are_one_shared_list():
    tiles = TileLists.from_states(torch.zeros(2, 2, dtype=torch.uint8), block_q=4, block_k=4, num_q=8, num_k=8)
    assert tiles.groups == 1
    assert tiles.density == 0.0
    assert int(tiles.states().max()) == SKIPPED


def test_to_the_same_device_is_the_same_object():
    tiles = TileLists.full(8, 8, block_q=4, block_k=4)
    assert tiles.to("cpu") is tiles
    moved = TileLists.from_states(torch.ones(2, 2, dtype=torch.uint8), block_q=4, block_k=4, num_q=8, num_k=8).to(
        "meta"
    )
    assert moved.device.type == "meta"
    assert moved.pooled_indices is not None
    assert moved.tiles_pooled == 4


def _lists(**changes):
    values = dict(
        block_q=4,
        block_k=4,
        num_q=8,
        num_k=12,
        exact_offsets=torch.tensor([[0, 2, 3]], dtype=torch.int32),
        exact_indices=torch.tensor([0, 2, 1], dtype=torch.int32),
    )
    return TileLists(**{**values, **changes})


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (dict(block_q=0), ValueError, r"block_q.*1, found 0"),
        (dict(num_k=-3), ValueError, r"num_k.*1, found -3"),
        (
            dict(exact_offsets=torch.tensor([[0, 2, 3]])),
            TypeError,
            r"exact_offsets.*torch\.int32, found torch\.int64",
        ),
        (
            dict(exact_offsets=_int32([0, 3])),
            ValueError,
            r"exact_offsets.*\[G, 3\].*2.*found \[1, 2\]",
        ),
        (dict(exact_indices=_int32([0, 2, 1])), ValueError, r"exact_indices.*found \[1, 3\]"),
        (dict(exact_indices=torch.zeros(3)), TypeError, r"exact_indices.*torch\.int32, found torch\.float32"),
        (dict(exact_indices=_int32(0, 2, 1).to("meta")), ValueError, "device, found cpu.*meta"),
        (
            dict(pooled_indices=_int32(1)),
            ValueError,
            r"pooled_offsets and pooled_indices.*both",
        ),
        (
            dict(pooled_offsets=_int32([0, 0, 0], [0, 0, 1]), pooled_indices=_int32(1)),
            ValueError,
            r"pooled_offsets.*exact_offsets, \(1, 3\).*found \(2, 3\)",
        ),
    ],
)
def test_creation_refuses(changes, error, text):
    with pytest.raises(error, match=text):
        _lists(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            dict(exact_indices=_int32(0, 3, 1)),
            r"0\.\.2 \(NK = 3 key tiles\), found 3 at position 1.*query tile 0",
        ),
        (
            dict(exact_indices=_int32(-1, 2, 1)),
            r"exact_indices.*0\.\.2.*found -1 at position 0",
        ),
        (
            dict(exact_indices=_int32(2, 0, 1)),
            r"found 0 after 2 at position 1.*query tile 0.*set 0",
        ),
        (dict(exact_indices=_int32(2, 2, 1)), r"exact_indices.*ascend"),
        (dict(exact_offsets=_int32([0, 2, 2])), r"exact_offsets.*0 to 3, found \[0, 2, 2\]"),
        (dict(exact_offsets=_int32([0, 4, 3])), r"exact_offsets.*0 to 3, found \[0, 4, 3\]"),
        (
            dict(exact_offsets=_int32([0, 1, 2], [0, 2, 3])),
            r"exact_offsets.*list set.*found \[0\] after \[2\]",
        ),
        (
            dict(pooled_offsets=_int32([0, 0, 1]), pooled_indices=_int32(1)),
            r"exact .*pooled.*tile 1 twice.*query tile 1",
        ),
    ],
)
def test_validate_refuses(changes, text):
    with pytest.raises(ValueError, match=text):
        _lists(**changes).validate()


def test_validate_accepts_empty_lists():
    empty = _lists(exact_offsets=_int32([0, 0, 0]), exact_indices=_int32())
    assert empty.validate() is empty


@pytest.mark.parametrize(
    ("states", "error", "text"),
    [
        (torch.zeros(2, 3), TypeError, r"states.*torch\.uint8, found torch\.float32"),
        (
            torch.zeros(3, 3, dtype=torch.uint8),
            ValueError,
            r"states.*\[G, 2, 3\].*8 x 12 tokens.*4 x 4",
        ),
        (torch.full((2, 3), 7, dtype=torch.uint8), ValueError, r"states.*0.*found 7"),
    ],
)
def test_from_states_refuses(states, error, text):
    with pytest.raises(error, match=text):
        TileLists.from_states(states, block_q=4, block_k=4, num_q=8, num_k=12)
