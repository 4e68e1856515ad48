"""Triton's forward and backward, interpreted: strides, directions, masks, what was routed, and the tiles of selections.

What calls give over all features is in test_calls.py, test_fuzz.py and test_grid.py.
"""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, FrameDecay, Routing, Selection, TileLists, Vote, count_bits
from dit_accel_kernels.bits import pack_bits, unpack_bits
from dit_accel_kernels import states as states_module
from dit_accel_kernels.backends.triton import attend as triton_attend
from dit_accel_kernels.backends.triton import backward as triton_backward
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.features import tile_means
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.selection import LOG2_E
from dit_accel_kernels.states import routing_scores, selected_states
from kernel_cases import WIDE, assert_within_rounding, attend, check_against_reference, frame_decay, full
from kernel_cases import lists_of, problem_from, qkv, random_lists, with_masks
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("unwritten_is_nan"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),  # log of a pooled tile without a key
]
ROUTINGS = [Routing(beta=0.3), Routing(beta=0.3, threshold="exact")]
VOTES = [Vote(threshold=-1.5), Vote(criterion="mass", threshold=0.1), Vote(criterion="budget", threshold=0.2)]
OFF = 100 * torch.finfo(torch.float32).eps  # how near a threshold, relatively, what is found may lie on either side


def test_the_layout_of_the_output():
    q, tiles = torch.randn(2, 40, 3, 2, 16)[:, :, 1], random_lists(1, 40, 40, 16, 16)  # of a fused projection
    for strided in (q.transpose(1, 2), q.transpose(1, 2).contiguous()):
        for heads_first in (False, True):
            problem = replace(problem_from(tiles, strided, strided, strided), heads_first=heads_first)
            out, *_ = triton_attend.attend(problem)
            assert (out.stride(1) > out.stride(2)) == heads_first


def test_direction_changes_the_order_only():
    given, tiles = qkv(1, 1, 1, 70, 70, 16, torch.float32), full(70, 70, 32, 16)
    for features in ({}, dict(frame_decay=frame_decay(70)), dict(key_length=torch.tensor([50]))):
        (out, lse), (back, back_lse) = (
            attend(*given, tiles, backend="triton", return_lse=True, selection=Selection(reverse=reverse), **features)
            for reverse in (False, True)
        )
        torch.testing.assert_close((out, lse), (back, back_lse))
        assert not torch.equal(out, back)


def test_masks_that_let_everything_through_are_none_and_those_written_to_count():
    """Bits are read in every call; numbers are in the plan, which follows their writes."""
    q, k, v = qkv(1, 2, 2, 48, 96, 32, torch.float32)
    tiles = random_lists(1, 48, 96, 16, 32)
    ones = torch.full((1, 16, 1), -1, dtype=torch.int32)
    open_masks = replace(tiles, mask_ids=torch.zeros(tiles.tiles_exact, dtype=torch.int32), mask_bits=ones)
    out, other = (attend(q, k, v, x, backend="triton") for x in (tiles, open_masks))
    torch.testing.assert_close(other, out, rtol=1e-6, atol=1e-6)
    masked = with_masks(tiles)
    attend(q, k, v, masked, backend="triton")
    for x in (masked.mask_bits, masked.mask_ids):
        x.copy_(x.flip(0))
        check_against_reference(q, k, v, masked, "triton", layout="bhsd")


@pytest.mark.sample(2)
@pytest.mark.parametrize("mix", [False, True], ids=["plain", "mixed"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_backward_follows_what_the_forward_routed(backend, mix, monkeypatch):
    """Routing runs once; its tiles are those of the specification's gradient."""
    calls = []
    for module, name in ((triton_attend, "route"), (states_module, "routing_scores")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real: calls.append(0) or real(*args))
    leaves = [x.requires_grad_() for x in qkv(1, 2, 1, 70, 70, 16, torch.float32)]
    tiles, grad_out = random_lists(1, 70, 70, 16, 16), torch.randn(1, 2, 70, 16)
    selection = Selection(keep=pack_bits(torch.rand(1, 2, 5, 5) < 0.8), routing=Routing(beta=0.0), vote=Vote())
    arguments: dict = dict(token_order=torch.randperm(70), identity_mix=torch.tensor([0.2, 0.7]) if mix else None)
    found = attend(*leaves, tiles, selection=selection, return_tiles=True, backend=backend, **arguments)
    grads = torch.autograd.grad(found[0], leaves, grad_out)
    assert len(calls) == 1
    arguments |= dict(selection=replace(selection, routing=None, vote=None, routed=found[1]), backend="reference")
    expected = []
    for dtype in (torch.float32, WIDE):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        expected.append(torch.autograd.grad(attend(*inputs, tiles, **arguments), inputs, grad_out.to(dtype)))
    assert count_bits(found[1]).sum() < count_bits(selection.keep).sum()
    for x, a, b in zip(grads, *expected, strict=True):
        assert_within_rounding(x, a, b, torch.float32)


def test_an_inexact_lse_has_no_part_in_float32():
    """A tenth more or less in every row: the weights are divided by their own sum."""
    q, k, v = qkv(1, 2, 1, 40, 40, 16, torch.float32)
    for pooled in (False, True):
        problem = problem_from(random_lists(1, 40, 40, 16, 16, pooled=pooled), q, k, v)
        out, lse, *_ = triton_attend.attend(replace(problem, return_lse=True))
        inexact, grad = lse + torch.rand_like(lse) / 5, torch.randn_like(q)
        exact, moved = (triton_backward.attend_backward(problem, out, x, grad, None) for x in (lse, inexact))
        torch.testing.assert_close(exact, moved)


def bits(*shape: int, share: float = 0.6) -> Tensor:
    """Random bits."""
    return pack_bits(torch.rand(shape) < share)


def problem(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, selection: Selection) -> Problem:
    """The call as backends see it."""
    return problem_of(q, k, v, tiles, layout="bhsd", selection=selection)


def routed_within_rounding(call: Problem, found: Tensor) -> None:
    """Exact bits of a call are the specification's, except where a score is within rounding of its threshold."""
    wide = replace(call, q=call.q.to(WIDE)).tiled()  # mean keys are rounded to k's dtype, queries are not
    expected = selected_states(wide).expand(*call.q.shape[:2], -1, -1) == EXACT
    if call.selection.routing is None:
        assert torch.equal(found, expected)
        return
    scores, threshold = routing_scores(wide, call.selection.routing, None)
    q_mean, k_mean = tile_means(wide.q, call.block_q, None)[0].abs(), call.k.to(WIDE).abs().amax((1, 2))
    close = (scores - threshold).abs() <= OFF * call.scale * LOG2_E * (q_mean @ k_mean[:, None, :, None])
    assert close.double().mean() < 0.02
    assert torch.equal(found | close, expected | close)


def check(q, k, v, tiles, selection) -> None:
    """A call's exact tiles, output and LSE against the specification."""
    call, arguments = problem(q, k, v, tiles, selection), dict(return_lse=True)
    found = attend(q, k, v, tiles, selection=selection, return_tiles=True, backend="triton", **arguments)
    exact = unpack_bits(found[2], call.key_tiles)
    routed_within_rounding(call, exact)
    states = selected_states(replace(call, selection=replace(selection, routing=None)).tiled()).expand(exact.shape)
    states = torch.where((states == EXACT) & ~exact, POOLED, states)  # with the routing that was found
    lists = lists_of(states.flatten(0, 1), tiles.block_q, tiles.block_k, tiles.num_q, tiles.num_k)
    truth = attend(*(x.to(WIDE) for x in (q, k, v)), lists, backend="reference", **arguments)
    yardstick = attend(q, k, v, lists, backend="reference", **arguments)
    for a, b, c in zip(found, yardstick, truth, strict=False):
        assert_within_rounding(a, b, c, q.dtype)
    if selection.rest == "skip" and selection.routing is None:
        order = Selection(reverse=selection.reverse)
        assert all(map(torch.equal, found, attend(q, k, v, lists, selection=order, backend="triton", **arguments)))


@pytest.mark.sample
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda x: x.threshold)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [16, 24, 64, 128])
def test_routing_of_head_dims(routing, dtype, dim):
    check(*qkv(1, 2, 1, 40, 300, dim, dtype), random_lists(1, 40, 300, 16, 16), Selection(routing=routing))


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
    pinned[:, 3] = pinned[0, 5] = True
    k[:, :, 48:64] *= 100
    k[:, :, 80:96] *= 20  # pinned in one row alone, it counts

    def exact(selection: Selection, backend: str) -> Tensor:
        return attend(q, k, v, full(32, 100), return_tiles=True, selection=selection, backend=backend)[1]

    for routing in ROUTINGS:
        selection = Selection(routing=routing, pinned=pack_bits(pinned))
        found = exact(selection, "triton")
        assert torch.equal(found, exact(selection, "auto"))
        assert not torch.equal(found, exact(Selection(routing=routing), "triton"))


def check_votes(q, k, v, tiles, selection, **arguments) -> Tensor:
    """Kept bits against the specification in float64, but for tiles that a nearby threshold decides otherwise."""

    def votes(inputs, selection: Selection, backend: str) -> Tensor:
        kept = attend(*inputs, tiles, selection=selection, backend=backend, **arguments)[-1]
        return unpack_bits(kept, tiles.key_tiles)

    vote, wide = selection.vote, [x.to(WIDE) for x in (q, k, v)]
    bars = [vote.threshold + OFF * sign * max(1.0, abs(vote.threshold)) for sign in (-1, 0, 1)]
    beside = [replace(selection, vote=replace(vote, threshold=bar)) for bar in bars]
    low, expected, high = (votes(wide, x, "reference") for x in beside)
    found, certain = votes((q, k, v), selection, "triton"), (low == expected) & (expected == high)
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
    tiles = random_lists(1 + features, 100, tokens, block, block) if features < 2 else full(100, tokens, block)
    selection, rows = Selection(vote=vote, reverse=reverse), tiles.query_tiles
    if features & 1:
        selection = replace(selection, keep=bits(2, 2, rows, 5, share=0.8), pinned=bits(rows, 5, share=0.2))
    arguments: dict = dict(scale=0.5)
    if features & 2:
        decay = frame_decay(tokens, frame=block, first=0)
        arguments["frame_decay"] = replace(decay, q_frames=decay.q_frames[:100] // 2)
        arguments |= dict(key_length=torch.tensor([tokens, 3 * block + 8]), key_mask=torch.rand(2, tokens) > 0.003)
    found = check_votes(q, k, v, tiles, selection, **arguments)
    before = (tiles.states() == EXACT).expand_as(found) if selection.keep is None else unpack_bits(selection.keep, 5)
    assert 0 < found.sum() < before.sum()


@pytest.mark.sample
@pytest.mark.parametrize(("block_k", "count"), [(16, 65), (24, 40), (48, 34)])
@pytest.mark.parametrize("vote", VOTES, ids=lambda x: x.criterion)
def test_votes_fill_several_words(vote, block_k, count):
    """Many tiles and a ragged one: in one chunk, in a chunk that is longer, in three; thresholds above 0 included.

    Those in three are plain ones, then those of one decay, then masked ones, of which no section fills its last word.
    """
    tokens = count * block_k + 7
    strict = Vote(threshold=0.3) if vote.criterion == "maxgap" else replace(vote, threshold=0.03)
    inputs, tiles = uneven(1, 2, 2, 20, tokens, block_k, torch.float32), full(20, tokens, 20, block_k)
    options, keys = dict(scale=0.5), torch.arange(tokens, dtype=torch.int32)
    if block_k == 48:
        frames, none = torch.where(keys < 12 * 48, -1, keys // 480), torch.zeros(20, dtype=torch.int32)
        options["frame_decay"] = FrameDecay(table=torch.tensor([1.0, 0.95, 0.9]), q_frames=none, k_frames=frames)
        options["key_mask"] = (keys % 240 != 7)[None]
    found = check_votes(*inputs, tiles, Selection(vote=strict, reverse=block_k == 48), **options)
    assert 2 < found.sum() < found.numel() / 2
