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


def votes_of(q, k, v, tiles, backend, **arguments):
    found = block_sparse_attention(q, k, v, tiles, backend=backend, return_lse=True, return_tiles=True, **arguments)
    return found[0], found[1], *(unpack_bits(bits, tiles.key_tiles) for bits in found[2:])


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [1 << 20, 9000])
@pytest.mark.parametrize("vote", VOTES[:2], ids=NAMES[:2])
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
