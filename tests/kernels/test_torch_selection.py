"""Selections on the torch backend: votes beside the attention against the specification, gradients, op and compile."""

import json
import math
import subprocess
import sys
from pathlib import Path

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
    problem,
    unpack_bits,
    values,
)
from dit_accel_kernels.backends.torch import attend as torch_attend
from dit_accel_kernels.backends.torch import chunks
from dit_accel_kernels.cache import StorageCache
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.packing import flatten
from kernel_cases import assert_within_rounding, qkv, random_lists
from torch import Tensor

WIDE = torch.float64
VOTES = [
    Vote(threshold=-3.0),
    Vote(criterion="mass", threshold=0.03),
    Vote(criterion="budget", threshold=0.06),
]
NAMES = [vote.criterion for vote in VOTES]


def drifting(
    batch: int, heads: int, key_heads: int, num_q: int, num_k: int, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries about one direction and keys whose length along it depends on the tile: some tiles are voted down."""
    q, k, v = qkv(batch, heads, key_heads, num_q, num_k, 16, WIDE)
    length = (1.5 * torch.randn(batch, key_heads, -(-num_k // block))).repeat_interleave(block, 2)[:, :, :num_k, None]
    return (1 + 0.1 * q).to(dtype), (length + 0.1 * k).to(dtype), v.to(dtype)


def everything(batch: int, num_q: int, num_k: int, features: int) -> dict:
    """Arguments of a call by bits: 1 key mask with an absent tile, 2 decay, 4 head scale and scale."""
    arguments: dict = dict(layout="bhsd")
    if features & 1:
        mask = torch.rand(batch, num_k) > 0.2
        mask[0, 32:48] = False
        arguments |= dict(key_mask=mask, key_length=torch.full((batch,), num_k - 9))
    if features & 2:
        q_frames, k_frames = (torch.arange(n, dtype=torch.int32) // 20 - 1 for n in (num_q, num_k))
        table = torch.tensor([1.0, 0.9, 0.6])
        arguments |= dict(frame_decay=FrameDecay(table=table, q_frames=q_frames, k_frames=k_frames))
    if features & 4:
        arguments |= dict(head_scale=torch.rand(4) + 0.5, scale=0.3)
    return arguments


def votes_of(q, k, v, tiles, backend, **arguments):
    found = block_sparse_attention(q, k, v, tiles, backend=backend, return_lse=True, return_tiles=True, **arguments)
    return found[0], found[1], *(unpack_bits(bits, tiles.key_tiles) for bits in found[2:])


@pytest.mark.sample
@pytest.mark.parametrize("vote", VOTES, ids=NAMES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("features", range(8))
@pytest.mark.parametrize(("block", "part"), [(16, 1 << 20), (24, 1 << 20), (16, 1)])
def test_votes_equal_the_specification_in_float64(monkeypatch, vote, reverse, features, block, part):
    """Both paths, whole and split rows, key heads shared, lists per head, pinned and pooled tiles, ragged tiles."""
    monkeypatch.setattr(torch_attend, "CHUNK_BYTES", part)
    q, k, v = drifting(2, 4, 2, 100, 110, block, WIDE)
    for groups in (1, 4, 8):
        tiles = random_lists(groups, 100, 110, 16, block)
        count = tiles.key_tiles
        selection = Selection(
            keep=None if groups == 4 else pack_bits(torch.rand(2, 4, 7, count) < 0.8),
            rest="pooled" if features % 3 else "skip",
            pinned=pack_bits(torch.rand(7, count) < 0.1),
            vote=vote,
            reverse=reverse,
        )
        arguments = everything(2, 100, 110, features)
        expected = votes_of(q, k, v, tiles, "reference", selection=selection, **arguments)
        found = votes_of(q, k, v, tiles, "torch", selection=selection, **arguments)
        assert torch.equal(found[2], expected[2])
        assert torch.equal(found[3], expected[3])
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-6, atol=1e-6)  # mean decay is a float32 sum
        kept = tiles.states()[None] == EXACT if selection.keep is None else unpack_bits(selection.keep, count)
        assert (expected[3].sum() < kept.expand_as(expected[3]).sum()) or vote.criterion == "budget"


def window(vote: Vote, q: Tensor, k: Tensor, scale: float) -> tuple[Vote, Vote]:
    """The vote with its threshold lowered and raised by what rounding of logits can do, by the rule of two."""
    exact = q.to(WIDE) @ k.to(WIDE).mT * scale
    own = ((q @ k.mT).to(WIDE) * scale - exact).abs().max()
    margin = float(2 * (2 * own + torch.finfo(q.dtype).eps * exact.abs().max()))  # of a difference of two logits
    if vote.criterion == "maxgap":
        return tuple(Vote(threshold=vote.threshold + sign * margin * math.log2(math.e)) for sign in (-1, 1))
    return tuple(Vote(criterion="mass", threshold=vote.threshold * math.exp(sign * 2 * margin)) for sign in (-1, 1))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vote", VOTES[:2], ids=NAMES[:2])
@pytest.mark.parametrize("features", [0, 1])
def test_low_dtypes_vote_alike_but_at_the_threshold(dtype, vote, features):
    q, k, v = drifting(1, 4, 4, 100, 400, 16, dtype)
    tiles = TileLists.full(100, 400, block_q=16, block_k=16)
    arguments = everything(1, 100, 400, features) | dict(scale=0.25)
    wide = [x.to(WIDE) for x in (q, k, v)]
    options = dict(selection=Selection(vote=vote), **arguments)
    truth, yardstick = votes_of(*wide, tiles, "reference", **options), votes_of(q, k, v, tiles, "reference", **options)
    found = votes_of(q, k, v, tiles, "torch", **options)
    for a, b, c in zip(found[:2], yardstick[:2], truth[:2], strict=True):
        assert_within_rounding(a, b, c, dtype)
    low, high = (
        votes_of(*wide, tiles, "reference", **arguments, selection=Selection(vote=limit))[3]
        for limit in window(vote, q, k, 0.25)
    )
    unsure = low & ~high
    assert torch.equal(found[3] & ~unsure, truth[3] & ~unsure)
    assert unsure.float().mean() < 0.1
    assert not truth[3].all()


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [1 << 20, 9000])
@pytest.mark.parametrize("vote", [None, *VOTES], ids=["none", *NAMES])
def test_outputs_beside_votes_stay_within_rounding(monkeypatch, dtype, part, vote):
    monkeypatch.setattr(torch_attend, "CHUNK_BYTES", part)
    q, k, v = qkv(1, 4, 2, 100, 210, 16, dtype)
    tiles = random_lists(4, 100, 210, 16, 16)
    options = dict(layout="bhsd", return_lse=True, selection=Selection(vote=vote, reverse=True))
    truth = block_sparse_attention(*(x.to(WIDE) for x in (q, k, v)), tiles, backend="reference", **options)
    yardstick = block_sparse_attention(q, k, v, tiles, backend="reference", **options)
    found = block_sparse_attention(q, k, v, tiles, backend="torch", **options)
    for a, b, c in zip(found[:2], yardstick, truth[:2], strict=False):
        assert_within_rounding(a, b, c, dtype)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("flops", [0, 1e12])
def test_several_threads_vote_alike(monkeypatch, flops):
    """As workers, or within operations."""
    monkeypatch.setattr(torch_attend, "WORKERS_FLOPS", flops)
    q, k, v = drifting(2, 4, 2, 100, 110, 16, torch.float32)
    tiles = TileLists.full(100, 110, block_q=16, block_k=16)
    options = dict(layout="bhsd", selection=Selection(vote=VOTES[0]), backend="torch")
    alone = block_sparse_attention(q, k, v, tiles, **options)
    torch.set_num_threads(2)
    try:
        together = block_sparse_attention(q, k, v, tiles, **options)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_empty_and_full_bits(kept):
    """Nothing exact gives 0 and leaves the bits; all bits give the static lists' own output."""
    q, k, v = qkv(1, 2, 2, 70, 90, 8, torch.float32)
    keep = torch.full((1, 2, 5, 6), kept) > 0.5
    selection = Selection(keep=pack_bits(keep), vote=Vote(threshold=-math.inf))
    tiles = TileLists.full(70, 90, block_q=16, block_k=16)
    out, lse, _, bits = votes_of(q, k, v, tiles, "torch", layout="bhsd", selection=selection)
    assert torch.equal(bits, keep)
    if not kept:
        assert not out.any()
        assert (lse == -torch.inf).all()
        return
    yardstick, truth = (
        block_sparse_attention(*inputs, tiles, layout="bhsd", backend="reference")
        for inputs in ((q, k, v), [x.to(WIDE) for x in (q, k, v)])
    )
    assert_within_rounding(out, yardstick, truth, torch.float32)


@pytest.mark.usefixtures("by_operations")
def test_lists_of_one_call_are_not_remembered(monkeypatch):
    q, k, v = qkv(1, 2, 2, 40, 40, 8, torch.float32)
    mask = torch.rand(1, 40) > 0.2
    tiles, asked = random_lists(1, 40, 40, 8, 8), []
    real = StorageCache.get
    monkeypatch.setattr(
        StorageCache, "get", lambda self, *args, **more: asked.append(self) or real(self, *args, **more)
    )
    for options in (dict(), dict(key_mask=mask)):
        selection = Selection(keep=pack_bits(torch.rand(1, 2, 5, 5) > 0.5))
        block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=selection, backend="torch", **options)
    assert set(asked) == {values._CHECKED, problem._VALID}  # valid keys are kept with their mask
    block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="torch")
    assert set(asked) == {values._CHECKED, problem._VALID, chunks._CHUNKS}


SELECTIONS = {
    "skip": lambda: Selection(keep=pack_bits(torch.rand(2, 4, 4, 5) > 0.4)),
    "pooled": lambda: Selection(
        keep=pack_bits(torch.rand(2, 4, 4, 5) > 0.4), rest="pooled", pinned=pack_bits(torch.rand(4, 5) > 0.8)
    ),
    "routed": lambda: Selection(routing=Routing(beta=0.3), vote=Vote(threshold=-2.0)),
    "all": lambda: Selection(
        keep=pack_bits(torch.rand(2, 4, 4, 5) > 0.4), routing=Routing(beta=0.0, threshold="exact"), vote=VOTES[1]
    ),
}
ORDER = torch.randperm(30, generator=torch.Generator().manual_seed(0))
SOME = dict(key_length=torch.tensor([30, 17]), token_order=ORDER, head_scale=torch.tensor([0.5, 1.0, 1.5, 2.0]))


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("arguments", [dict(), SOME], ids=["plain", "masked"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_gradients_equal_those_of_the_specification(kind, arguments, key_heads):
    """Through what was chosen, as if it were a static list: none flows through the choice."""
    leaves = [x.requires_grad_() for x in qkv(2, 4, key_heads, 30, 30, 8, WIDE)]
    tiles, selection = random_lists(1, 30, 30, 8, 7, pooled=kind != "skip"), SELECTIONS[kind]()
    seeds = [torch.randn(2, 4, 30, 8, dtype=WIDE), torch.randn(2, 4, 30, dtype=WIDE)]
    grads, bits = [], []
    for backend in ("torch", "reference"):
        out, lse, *rest = block_sparse_attention(
            *leaves, tiles, layout="bhsd", selection=selection, return_lse=True, return_tiles=True, backend=backend,
            **arguments,
        )  # fmt: skip
        grads.append(torch.autograd.grad([out, lse.masked_fill(lse.isinf(), 0.0)], leaves, seeds))
        assert not any(x.requires_grad for x in rest)
        bits.append(rest)
    for a, b in zip(bits[0], bits[1], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    if arguments:
        return
    states = torch.where(unpack_bits(bits[0][0], 5), EXACT, SKIPPED)
    lists = tiles.states()[None]
    states = torch.where(lists == POOLED, POOLED, states)
    dropped = (lists == EXACT) & (states == SKIPPED)
    if kind in ("pooled", "routed"):
        states = torch.where(dropped, POOLED, states)
    elif kind == "all":
        assert selection.keep is not None
        states = torch.where(dropped & unpack_bits(selection.keep, 5), POOLED, states)
    static = TileLists.from_states(states.flatten(0, 1).to(torch.uint8), block_q=8, block_k=7, num_q=30, num_k=30)
    out, lse = block_sparse_attention(*leaves, static, layout="bhsd", return_lse=True, backend="torch")
    expected = torch.autograd.grad([out, lse.masked_fill(lse.isinf(), 0.0)], leaves, seeds)
    for a, b in zip(grads[0], expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_opcheck(kind):
    leaves = [x.requires_grad_() for x in qkv(2, 4, 2, 30, 30, 8, torch.float32)]
    arguments = dict(layout="bhsd", selection=SELECTIONS[kind](), return_tiles=True, backend="torch")
    problem = problem_of(*leaves, random_lists(1, 30, 30, 8, 7), **arguments)
    torch.library.opcheck(torch.ops.dit_accel_kernels.block_sparse_attention.default, flatten(problem))


def test_compiles_to_one_full_graph_for_bits_that_change():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    tiles = random_lists(1, 30, 30, 8, 7)

    def call(q, k, v, bits):
        selection = Selection(keep=bits, rest="pooled", vote=Vote(threshold=-2.0))
        return block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=selection, backend="torch")

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for _ in range(4):
        leaves = [x.requires_grad_() for x in qkv(2, 4, 4, 30, 30, 8, torch.float32)]
        bits = pack_bits(torch.rand(2, 4, 4, 5) > 0.4)
        found, expected = compiled(*leaves, bits), call(*leaves, bits)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        grads = (torch.autograd.grad(x[0].square().sum(), leaves) for x in (found, expected))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_bench_compares_selections_with_static_lists_of_the_same_tiles(tmp_path):
    bench, out = Path(__file__).parents[2] / "kernels" / "bench" / "selection.py", tmp_path / "results.jsonl"
    command = [sys.executable, str(bench), "--shapes", "1,2,256,16,32", "--density", "0.3", "--rounds", "1"]
    found = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    records = {record["call"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert records["keep"]["base"] == "lists"
    assert records["keep, maxgap"]["base"] == "keep"
    assert records["routed"]["base"] == "lists, pooled"
    assert records["routed"]["density"] == records["lists, pooled"]["density"]
    assert records["keep"]["density"] == records["lists"]["density"]
    assert all(name in found.stdout for name in records)
