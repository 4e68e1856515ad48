"""Selections on Triton, interpreted: routing, expanded lists and votes against the float64 specification."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from dit_accel_kernels import (
    EXACT,
    POOLED,
    SKIPPED,
    FrameDecay,
    Routing,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    pack_bits,
    unpack_bits,
)
from dit_accel_kernels.backends.triton import expand as triton_expand
from dit_accel_kernels.backends.triton import plan as triton_plan
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.features import tile_means
from dit_accel_kernels.selection import LOG2_E
from dit_accel_kernels.states import routing_scores, selected_states
from kernel_cases import WIDE, assert_within_rounding, qkv, random_lists
from torch import Tensor

ORDER = torch.randperm(70, generator=torch.Generator().manual_seed(0))
ROUTINGS = [Routing(beta=0.3), Routing(beta=0.3, threshold="exact")]
VOTES = [Vote(threshold=-1.5), Vote(criterion="mass", threshold=0.1), Vote(criterion="budget", threshold=0.2)]
OFF = 100 * torch.finfo(torch.float32).eps  # how near a threshold, relatively, what is found may lie on either side


pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def bits(*shape: int, share: float = 0.6) -> Tensor:
    """Random bits."""
    return pack_bits(torch.rand(shape) < share)


def decay(tokens: int, frame: int) -> FrameDecay:
    """Frames of `frame` tokens after a first one outside the video."""
    frames = torch.arange(tokens, dtype=torch.int32) // frame - 1
    return FrameDecay(table=torch.tensor([1.0, 0.9, 0.6]), q_frames=frames, k_frames=frames)


def problem(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, selection: Selection, **arguments) -> Problem:
    """The call as backends see it."""
    return problem_of(q, k, v, tiles, layout="bhsd", selection=selection, **arguments)


def routed_within_rounding(call: Problem, found: Tensor) -> None:
    """Exact bits of a call are the specification's, except where a score is within rounding of its threshold."""
    wide = replace(call, q=call.q.to(WIDE)).tiled()  # mean keys are rounded to k's dtype, queries are not
    expected = selected_states(wide).expand(*call.q.shape[:2], -1, -1) == EXACT
    if call.selection.routing is None:
        assert torch.equal(found, expected)
        return
    pinned = None if call.selection.pinned is None else unpack_bits(call.selection.pinned, call.key_tiles)
    scores, threshold = routing_scores(wide, call.selection.routing, pinned)
    q_mean, k_mean = tile_means(wide.q, call.block_q, None)[0].abs(), call.k.to(WIDE).abs().amax((1, 2))
    head_scale = 1.0 if call.head_scale is None else call.head_scale[..., None, None]
    terms = call.scale * LOG2_E * head_scale * (q_mean @ k_mean[:, None, :, None])
    close = (scores - threshold).abs() <= OFF * terms
    assert close.double().mean() < 0.02
    assert torch.equal(found | close, expected | close)


def check(q, k, v, tiles, selection, **arguments) -> Tensor:
    """A call's exact tiles, output and LSE against the specification; returns its output."""
    call = problem(q, k, v, tiles, selection, **arguments)
    arguments = {"layout": "bhsd", "return_lse": True, **arguments}
    found = block_sparse_attention(
        q, k, v, tiles, selection=selection, return_tiles=True, backend="triton", **arguments
    )
    exact = unpack_bits(found[2], call.key_tiles)
    routed_within_rounding(call, exact)
    kept = replace(call, selection=replace(selection, routing=None)).tiled()
    states = selected_states(kept).expand(exact.shape)
    states = torch.where((states == EXACT) & ~exact, POOLED, states).to(torch.uint8)  # with the routing that was found
    sizes = dict(block_q=tiles.block_q, block_k=tiles.block_k, num_q=tiles.num_q, num_k=tiles.num_k)
    lists = TileLists.from_states(states.flatten(0, 1), **sizes)
    wide = {name: x.to(WIDE) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}
    truth = block_sparse_attention(*(x.to(WIDE) for x in (q, k, v)), lists, backend="reference", **wide)
    yardstick = block_sparse_attention(q, k, v, lists, backend="reference", **arguments)
    for a, b, c in zip(found, yardstick, truth, strict=False):
        assert_within_rounding(a, b, c, q.dtype)
    if selection.rest == "skip" and selection.routing is None:
        order = Selection(reverse=selection.reverse)
        same = block_sparse_attention(q, k, v, lists, selection=order, backend="triton", **arguments)
        assert torch.equal(found[0], same[0])
        assert torch.equal(found[1], same[1])
    return found[0]


@pytest.mark.sample
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda x: x.threshold)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [16, 24, 64, 128])
def test_routing_of_head_dims(routing, dtype, dim):
    tiles = random_lists(1, 70, 300, 16, 16)  # more than one word of tiles would be 33; two chunks of rows
    check(*qkv(1, 2, 1, 70, 300, dim, dtype), tiles, Selection(routing=routing))


@pytest.mark.sample(2)
@pytest.mark.parametrize("sizes", [(40, 24, 24, 24), (17, 40, 9, 11), (130, 130, 64, 128), (20, 1100, 16, 16)])
def test_any_tile_size_and_more_than_a_word_of_tiles(sizes):
    num_q, num_k, block_q, block_k = sizes
    tiles = random_lists(1, num_q, num_k, block_q, block_k)
    q, k, v = qkv(1, 2, 2, num_q, num_k, 16, torch.float32)
    keep = bits(1, 2, tiles.query_tiles, tiles.key_tiles)
    check(q, k, v, tiles, Selection(keep=keep, routing=ROUTINGS[0], rest="pooled"))
    check(q, k, v, tiles, Selection(keep=keep, reverse=True))


def test_a_column_pinned_everywhere_leaves_the_threshold_alone():
    q, k, v = qkv(1, 1, 1, 32, 100, 16, torch.float32)
    pinned = torch.zeros(2, 7, dtype=torch.bool)
    pinned[:, 3] = True
    k[:, :, 48:64] *= 100
    tiles, options = TileLists.full(32, 100, block_q=16, block_k=16), dict(layout="bhsd", return_tiles=True)
    for routing in ROUTINGS:
        selection = Selection(routing=routing, pinned=pack_bits(pinned))
        found = block_sparse_attention(q, k, v, tiles, selection=selection, backend="triton", **options)[1]
        assert torch.equal(found, block_sparse_attention(q, k, v, tiles, selection=selection, **options)[1])
        loose = block_sparse_attention(
            q, k, v, tiles, selection=Selection(routing=routing), backend="triton", **options
        )
        assert not torch.equal(found, loose[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_expanded_lists_are_the_plan_filtered(groups, masked):
    """Entries, sections, decays and places of every batch and head; pooled bits hold static and demoted tiles."""
    q, k, v = qkv(2, 2, 2, 70, 70, 16, torch.float32)
    keep, pinned = bits(2, 2, 5, 5), bits(5, 5, share=0.2)
    arguments: dict = dict(frame_decay=decay(70, 16)) | (dict(key_length=torch.tensor([70, 20])) if masked else {})
    tiles = random_lists(groups, 70, 70, 16, 16)
    call = problem(q, k, v, tiles, Selection(keep=keep, rest="pooled", pinned=pinned), **arguments)
    plan = triton_plan.row_plan(call)
    lists, _ = triton_expand.expand(call, plan, None)
    states = selected_states(call.tiled()).expand(2, 2, -1, -1)
    places = set()
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(5)).tolist():
        place = b * lists.entry_strides[0] + h * lists.entry_strides[1]
        begin, *ends, pooled_start, pooled_end = lists.bounds[2 * b + h, i].tolist()
        start, *plan_ends = plan.bounds[b * plan.strides[0] + h * plan.strides[1], i, :4].tolist()
        assert begin == start
        for end, plan_end in zip(ends, plan_ends, strict=True):
            expected = [n for n in range(start, plan_end) if states[b, h, i, plan.indices[n]] == EXACT]
            assert lists.indices[place + begin : place + end].tolist() == plan.indices[expected].tolist()
            assert lists.entry_t[place + begin : place + end].tolist() == plan.entry_t[expected].tolist()
            assert places.isdisjoint(range(place + begin, place + end))
            places |= set(range(place + begin, place + end))
            start, begin = plan_end, end
        set_of_bits = b * lists.pooled_strides[0] + h * lists.pooled_strides[1]
        pooled = unpack_bits(lists.pooled_bits.flatten(0, 1)[set_of_bits, i], 5)
        assert torch.equal(pooled, states[b, h, i] == POOLED)
        assert not pooled.any() or (pooled_start, pooled_end) == (0, 32)  # whole words
        assert pooled.any() or pooled_start == pooled_end
    assert min(places) > 0
    assert max(places) < lists.indices.numel() - 1


@pytest.mark.slow
def test_pooled_tiles_are_walked_from_the_first_to_the_last():
    """Chunks of 32 tiles: rows that pool none, few, those in the middle and all; then bits of many words."""
    states = torch.full((5, 131), SKIPPED, dtype=torch.uint8)
    states[:, ::20] = EXACT
    states[1, 100] = states[2, 3] = states[2, 5] = states[3, 40:90] = states[4] = POOLED
    tiles = TileLists.from_states(states, block_q=16, block_k=16, num_q=70, num_k=2090)
    q, k, v = qkv(1, 1, 1, 70, 2090, 16, torch.float32)
    plan = triton_plan.row_plan(problem(q, k, v, tiles, Selection()))
    assert plan.bounds[0, :, 4:].tolist() == [[0, 0], [100, 101], [3, 6], [40, 90], [0, 131]]
    check(q, k, v, tiles, Selection())
    keep = torch.ones(1, 1, 5, 131, dtype=torch.bool)
    keep[..., 70:] = False
    check(q, k, v, tiles, Selection(keep=pack_bits(keep), rest="pooled"))
    call = problem(q, k, v, tiles, Selection(keep=pack_bits(keep), rest="pooled"))
    lists, _ = triton_expand.expand(call, plan, None)
    assert lists.bounds[0, :, 4:].tolist() == [[64, 128], [64, 128], [0, 128], [32, 128], [0, 160]]


def votes(q, k, v, tiles, selection, backend="triton", **arguments) -> Tensor:
    """The kept bits, bool."""
    found = block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=selection, backend=backend, **arguments)
    return unpack_bits(found[-1], tiles.key_tiles)


def check_votes(q, k, v, tiles, selection, **arguments) -> Tensor:
    """Kept bits against the specification in float64, but for tiles that a nearby threshold decides otherwise."""
    found = votes(q, k, v, tiles, selection, **arguments)
    vote, wide = selection.vote, [x.to(WIDE) for x in (q, k, v)]
    bars = [vote.threshold + OFF * sign * max(1.0, abs(vote.threshold)) for sign in (-1, 0, 1)]
    low, expected, high = (
        votes(*wide, tiles, replace(selection, vote=replace(vote, threshold=bar)), "reference", **arguments)
        for bar in bars
    )
    certain = (low == expected) & (expected == high)
    assert (~certain).double().mean() < 0.05
    assert torch.equal(found & certain, expected & certain)
    return found


def uneven(batch, heads, key_heads, num_q, num_k, block, dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose tiles of keys differ in how much all queries like them."""
    q, k, v = qkv(batch, heads, key_heads, num_q, num_k, 16, torch.float32)
    liking = torch.randn(batch, key_heads, -(-num_k // block), 1).repeat_interleave(block, 2)[:, :, :num_k]
    return (0.3 * q + 1).to(dtype), (0.3 * k + liking).to(dtype), v.to(dtype)


@pytest.mark.sample(5)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("vote", VOTES, ids=lambda x: x.criterion)
@pytest.mark.parametrize("features", range(4))
def test_votes(vote, reverse, features):
    """Tiles of several chunks and rows of several parts, where lists, masks, decay and keep bits differ."""
    dtype, block = [(torch.float32, 64), (torch.bfloat16, 128)][features % 2]
    tokens = 5 * block - 30
    q, k, v = uneven(2, 2, 1, 100, tokens, block, dtype)
    tiles = TileLists.full(100, tokens, block_q=block, block_k=block)
    if features < 2:
        tiles = random_lists(1 + features, 100, tokens, block, block)
    selection, rows = Selection(vote=vote, reverse=reverse), tiles.query_tiles
    if features & 1:
        selection = replace(selection, keep=bits(2, 2, rows, 5, share=0.8), pinned=bits(rows, 5, share=0.2))
    arguments: dict = dict(scale=0.5)
    if features & 2:
        frames = torch.arange(tokens, dtype=torch.int32) // block
        table = FrameDecay(table=torch.tensor([1.0, 0.9, 0.6]), q_frames=frames[:100] // 2, k_frames=frames)
        arguments |= dict(key_length=torch.tensor([tokens, 3 * block + 8]), frame_decay=table)
        arguments |= dict(key_mask=torch.rand(2, tokens) > 0.003)
    found = check_votes(q, k, v, tiles, selection, **arguments)
    before = (tiles.states() == EXACT).expand_as(found) if selection.keep is None else unpack_bits(selection.keep, 5)
    assert 0 < found.sum() < before.sum()


@pytest.mark.sample
@pytest.mark.parametrize(("block_k", "count"), [(16, 65), (24, 40), (48, 34)])
@pytest.mark.parametrize("vote", VOTES, ids=lambda x: x.criterion)
def test_votes_fill_several_words(vote, block_k, count):
    """Many tiles and a ragged one: in one chunk, in a chunk that is longer, in three; thresholds above 0 included."""
    q, k, v = uneven(1, 2, 2, 20, count * block_k + 7, block_k, torch.float32)
    tiles = TileLists.full(20, count * block_k + 7, block_q=20, block_k=block_k)
    strict = Vote(threshold=0.3) if vote.criterion == "maxgap" else replace(vote, threshold=0.03)
    found = check_votes(q, k, v, tiles, Selection(vote=strict, reverse=block_k == 48), scale=0.5)
    assert 2 < found.sum() < found.numel() / 2


@pytest.mark.slow
@pytest.mark.parametrize("vote", VOTES, ids=lambda x: x.criterion)
def test_votes_of_all_sections_share_words(vote):
    """Plain tiles, then those of one decay, then masked ones, all in several chunks; no section fills its last word."""
    keys = torch.arange(70 * 48, dtype=torch.int32)
    q, k, v = uneven(1, 2, 1, 20, keys.numel(), 48, torch.float32)
    tiles = TileLists.full(20, keys.numel(), block_q=20, block_k=48)
    frames = torch.where(keys < 25 * 48, -1, keys // 480)
    table = FrameDecay(
        table=torch.tensor([1.0, 0.95, 0.9]), q_frames=torch.zeros(20, dtype=torch.int32), k_frames=frames
    )
    mask = (keys % 240 != 7)[None]
    found = check_votes(q, k, v, tiles, Selection(vote=vote), scale=0.5, frame_decay=table, key_mask=mask)
    assert 2 < found.sum() < found.numel() - 2
