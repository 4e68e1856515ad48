"""The torch backend against the specification over sizes, dtypes, lists and features, by the one rule of tolerance."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

import math

from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import (
    EXACT,
    POOLED,
    FrameDecay,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    block_sparse_attention_eager,
    pack_bits,
)
from dit_accel_kernels.backends.torch import chunks as chunks_module
from dit_accel_kernels.backends.torch.chunks import WASTE, chunks_of
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.features import product_dtype
from kernel_cases import check_against_reference, qkv, random_lists

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_processor_without_narrow_products_computes_in_float32(dtype, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: native)
    product_dtype.cache_clear()
    q, k, v = qkv(1, 2, 2, 200, 200, 64, dtype)
    tiles = random_lists(1, 200, 200, 32, 32, pooled=True)
    check_against_reference(q, k, v, tiles, layout="bhsd")
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    narrow = [x.clone().requires_grad_() for x in (q, k, v)]
    exact, out = (block_sparse_attention(*x, tiles, layout="bhsd", backend="torch") for x in (wide, narrow))
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype)) is not native  # nothing but the output is rounded
    exact.sum().backward()
    out.sum().backward()
    for one, other in zip(wide, narrow, strict=True):
        assert other.grad.dtype == dtype
        assert torch.equal(other.grad, one.grad.to(dtype)) is not native
    monkeypatch.undo()
    product_dtype.cache_clear()


@pytest.mark.usefixtures("cpu_path")
def test_memory_is_not_quadratic():
    """A call at S = 8192 must not hold S x S anything: peak of what the profiler sees allocated."""
    q, k, v = qkv(1, 1, 1, 8192, 8192, 8, torch.float32)
    states = torch.ones(64, 64, dtype=torch.uint8)
    states.fill_diagonal_(2)
    tiles = TileLists.from_states(states, block_q=128, block_k=128, num_q=8192, num_k=8192)
    frames = torch.arange(8192, dtype=torch.int32) // 1024
    decay = FrameDecay(table=torch.full((8,), 0.5), q_frames=frames, k_frames=frames)
    mask = torch.ones(1, 8192, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        block_sparse_attention(q, k, v, tiles, layout="bhsd", frame_decay=decay, key_mask=mask, return_lse=True)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 8192 * 8192 // 4


def lists_problem(tiles):
    """Three query heads of one key head, 100 tokens in seven tiles of 16, the last with 4."""
    q, k, v = qkv(1, 3, 1, 100, 100, 8, torch.float32)
    return problem_of(q, k, v, tiles, layout="bhsd")


def test_chunks_are_made_once_for_a_list():
    problem = lists_problem(random_lists(1, 100, 100, 16, 16))
    found = chunks_of(problem, 40, 1, remember=True)
    assert chunks_of(problem, 40, 1, remember=True) is found
    alias = replace(problem, exact_offsets=problem.exact_offsets.view(1, -1))
    assert chunks_of(replace(alias, exact_indices=problem.exact_indices.detach()), 40, 1, remember=True) is found
    wider = replace(problem, q=torch.randn(1, 3, 100, 16), k=torch.randn(1, 1, 100, 16))
    assert chunks_of(wider, 40, 1, remember=True) is found
    problem.exact_indices[-1] = problem.exact_indices[-1]
    assert chunks_of(problem, 40, 1, remember=True) is not found


@pytest.mark.parametrize("columns", [1, 150, 10_000])
@pytest.mark.parametrize("multiple", [1, 2])
def test_chunks_cover_every_query_tile_once_with_little_padding(columns, multiple):
    tiles = random_lists(3, 100, 100, 16, 16)
    seen, odd = torch.zeros(3, 7, 7, dtype=torch.uint8), 0
    for chunk in chunks_of(lists_problem(tiles), columns, multiple, remember=False):
        (rows, exact_tiles), pooled_tiles = chunk.exact.shape, chunk.pooled.shape[1]
        width, used = exact_tiles * 16 + pooled_tiles, 0
        assert width * rows <= columns or rows == 1
        for i in range(rows):
            near, far = int(chunk.exact_counts[i]), int(chunk.pooled_counts[i])
            head, q_tile = divmod(int(chunk.q_tiles[i]), 7)
            exact, pooled = chunk.exact[i], chunk.pooled[i]
            assert (near > 0, far > 0) == (exact_tiles > 0, pooled_tiles > 0)
            if near:
                assert exact[near:].eq(exact[near - 1]).all()
            assert chunk.tokens[i] == 16 * near - 12 * bool(near and exact[near - 1] == 6)
            assert chunk.least <= chunk.tokens[i] <= chunk.most <= 16 * exact_tiles
            seen[head, q_tile, exact[:near]] += 2
            seen[head, q_tile, pooled[:far]] += 1
            used += near * 16 + far
        assert width * rows - used <= WASTE * width * rows
        odd += rows > 2 and rows % 2
    assert torch.equal(seen, tiles.states())
    assert multiple == 1 or odd <= 1  # the last one takes what is left


FULL = TileLists.full(100, 100, block_q=16, block_k=16)


@pytest.mark.usefixtures("by_operations")
@pytest.mark.parametrize("rest", ["skip", "pooled"])
def test_padding_lets_nothing_in_from_tiles_that_a_row_drops(monkeypatch, rest):
    monkeypatch.setattr(chunks_module, "WASTE", 1.0)
    q, k, v = qkv(1, 2, 2, 96, 90, 16, torch.float32)
    keep = torch.rand(1, 2, 6, 6) < 0.5
    keep[:, 0, :, 2] = False
    keep[:, 0, 3] = False
    selection = Selection(keep=pack_bits(keep), rest=rest)
    tiles = TileLists.full(96, 90, block_q=16, block_k=16)
    options = dict(layout="bhsd", selection=selection, backend="torch")
    expected = block_sparse_attention(q, k, v, tiles, **options)
    k[:, 0, 32:48], v[:, 0, 32:48] = torch.nan, torch.inf
    found = block_sparse_attention(q, k, v, tiles, **options)
    assert torch.equal(found[:, 1], expected[:, 1])
    assert torch.equal(found[:, 0], expected[:, 0]) is (rest == "skip")


def test_eager_entry_gives_the_same_bits_without_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 2, 40, 40, 8, torch.float32))
    tiles = random_lists(1, 40, 40, 8, 8)
    out, lse = block_sparse_attention(q, k, v, tiles, layout="bhsd", return_lse=True)
    eager, eager_lse = block_sparse_attention_eager(q, k, v, tiles, layout="bhsd", return_lse=True)
    assert torch.equal(out, eager)
    assert torch.equal(lse, eager_lse)
    assert out.requires_grad
    assert not eager.requires_grad
    with pytest.raises(TypeError, match="densty"):
        block_sparse_attention_eager(q, k, v, tiles, layout="bhsd", densty=1)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_batch_of_none_gives_nothing(backend):
    leaves = [x.requires_grad_() for x in qkv(0, 2, 1, 40, 40, 16, torch.float32)]
    selection = Selection(keep=pack_bits(torch.rand(0, 2, 3, 3) < 0.5), vote=Vote())
    found = block_sparse_attention(
        *leaves, random_lists(1, 40, 40, 16, 16), layout="bhsd", return_lse=True, return_tiles=True,
        selection=selection, key_mask=torch.ones(0, 40, dtype=torch.bool), backend=backend,
    )  # fmt: skip
    assert [x.shape for x in found] == [(0, 2, 40, 16), (0, 2, 40), (0, 2, 3, 1), (0, 2, 3, 1)]
    assert [x.shape for x in torch.autograd.grad(found[0].sum(), leaves)] == [x.shape for x in leaves]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_has_no_part_in_it(backend, masked):
    leaves = [x.requires_grad_() for x in qkv(2, 2, 2, 40, 40, 16, torch.float32)]
    tiles, mask = random_lists(1, 40, 40, 16, 16), torch.rand(2, 40) > 0.3

    def call(function) -> torch.Tensor:
        return function(*leaves, tiles, layout="bhsd", backend=backend, key_mask=mask if masked else None)

    expected = call(block_sparse_attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, eager = call(block_sparse_attention), call(block_sparse_attention_eager)
    assert torch.equal(found, expected)
    assert torch.equal(eager, expected)
    grads = [torch.autograd.grad(x.sum(), leaves) for x in (found, expected)]
    if backend != "reference":  # whose gradient is autograd's, which autocast does reach
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads += [torch.autograd.grad(call(block_sparse_attention).sum(), leaves)]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(other, grads[0], strict=True))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("vote", [Vote(), Vote(criterion="mass", threshold=0.1)], ids=lambda vote: vote.criterion)
def test_a_pooled_tile_far_above_every_exact_one_while_tiles_vote(vote):
    """Its logits, 200 log2 units above all others, must enter the softmax's peak, or its weight is infinite."""
    q, k, v = qkv(1, 2, 2, 40, 64, 16, torch.float32)
    q, k = q.abs() + 1, 0.1 * k
    k[:, :, 48:] = 30.0
    states = torch.full((3, 4), EXACT, dtype=torch.uint8)
    states[:, 3] = POOLED
    tiles = TileLists.from_states(states, block_q=16, block_k=16, num_q=40, num_k=64)
    logits = (q @ k.mT) * 16**-0.5 * math.log2(math.e)
    assert (logits[..., 48:].amax(-1) - logits[..., :48].amax(-1)).min() > 150
    check_against_reference(q, k, v, tiles, layout="bhsd")
    out = block_sparse_attention(q, k, v, tiles, layout="bhsd", selection=Selection(vote=vote), backend="torch")[0]
    assert out.isfinite().all()
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="reference"))


@pytest.mark.usefixtures("by_operations")
@pytest.mark.parametrize("masked", [False, True])
def test_lists_are_scheduled_once_for_all_calls_and_gradients(monkeypatch, masked):
    calls, real = [], chunks_module._build
    monkeypatch.setattr(chunks_module, "_build", lambda *args: calls.append(0) or real(*args))
    leaves = [x.requires_grad_() for x in qkv(1, 2, 2, 40, 40, 16, torch.float32)]
    tiles = random_lists(1, 40, 40, 16, 16)
    for _ in range(3):
        mask = torch.rand(1, 40) > 0.2 if masked else None
        block_sparse_attention(*leaves, tiles, layout="bhsd", key_mask=mask, backend="torch").sum().backward()
    assert len(calls) == 2  # in smaller chunks for gradients
