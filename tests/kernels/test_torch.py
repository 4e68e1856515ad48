"""The torch backend: in which dtype it computes, its chunks of lists, what it keeps in memory, and votes beside it."""

import math
from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import FrameDecay, Selection, Vote, pack_bits, unpack_bits
from dit_accel_kernels.backends.torch import attend as torch_attend
from dit_accel_kernels.backends.torch import chunks, memory
from dit_accel_kernels.backends.torch.chunks import chunks_of
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.features import product_dtype
from kernel_cases import assert_within_rounding, attend, check_against_reference, full, lists_of, qkv, random_lists

WIDE = torch.float64
VOTES = [Vote(threshold=-3.0), Vote(criterion="mass", threshold=0.03)]
EITHER_VOTE = pytest.mark.parametrize("vote", VOTES, ids=lambda vote: vote.criterion)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_processor_without_narrow_products_computes_in_float32(dtype, native, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native)
    product_dtype.cache_clear()
    inputs, tiles = qkv(1, 2, 2, 200, 200, 64, dtype), random_lists(1, 200, 200, 32, 32)
    check_against_reference(*inputs, tiles, layout="bhsd")
    wide, narrow = [x.float().requires_grad_() for x in inputs], [x.clone().requires_grad_() for x in inputs]
    exact, out = (attend(*x, tiles, backend="torch") for x in (wide, narrow))
    exact.sum().backward()
    out.sum().backward()
    for one, other in ((exact, out), *zip((x.grad for x in wide), (x.grad for x in narrow), strict=True)):
        assert other.dtype == dtype
        assert torch.equal(other, one.to(dtype)) is not native  # nothing but the result is rounded
    monkeypatch.undo()
    product_dtype.cache_clear()


@pytest.mark.usefixtures("cpu_path")
def test_memory_is_not_quadratic():
    """A call of many tokens must not hold all pairs of them: peak of what the profiler sees allocated."""
    tokens = 4096
    tiles = lists_of(torch.ones(32, 32).fill_diagonal_(2), 128, 128, tokens, tokens)
    frames, mask = torch.arange(tokens, dtype=torch.int32) // 512, torch.ones(1, tokens, dtype=torch.bool)
    decay = FrameDecay(table=torch.full((8,), 0.5), q_frames=frames, k_frames=frames)
    inputs = qkv(1, 1, 1, tokens, tokens, 8, torch.float32)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*inputs, tiles, frame_decay=decay, key_mask=mask, return_lse=True)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < tokens * tokens // 2


def lists_problem(tiles):
    """Three query heads of one key head, 100 tokens in seven tiles of 16, the last with 4."""
    return problem_of(*qkv(1, 3, 1, 100, 100, 8, torch.float32), tiles, layout="bhsd")


def test_chunks_are_made_once_for_a_list_and_leave_a_processor_its_cache():
    call = lists_problem(random_lists(1, 100, 100, 16, 16))
    found = chunks_of(call, 40, 1, remember=True)
    alias = replace(call, exact_offsets=call.exact_offsets.view(1, -1), exact_indices=call.exact_indices.detach())
    for same in (call, alias):
        assert chunks_of(same, 40, 1, remember=True) is found
    call.exact_indices[-1] = call.exact_indices[-1]
    assert chunks_of(call, 40, 1, remember=True) is not found


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
        assert 8 * (width * rows - used) <= width * rows
        odd += rows > 2 and rows % 2
    assert torch.equal(seen, tiles.states())
    assert multiple == 1 or odd <= 1  # the last one takes what is left
    alike = chunks_of(lists_problem(full(100)), columns, multiple, remember=False)
    assert len(alike) == {1: 21, 150: 21, 10_000: 1}[columns]  # rows of one length are as many as fit


@pytest.mark.usefixtures("by_operations")
@pytest.mark.parametrize("rest", ["skip", "pooled"])
def test_padding_lets_nothing_in_from_tiles_that_a_row_drops(monkeypatch, rest):
    monkeypatch.setattr(chunks, "WASTE", 1.0)
    q, k, v = qkv(1, 2, 2, 96, 90, 16, torch.float32)
    keep = torch.rand(1, 2, 6, 6) < 0.5
    keep[:, 0, :, 2] = keep[:, 0, 3] = False
    options = dict(selection=Selection(keep=pack_bits(keep), rest=rest), backend="torch")
    expected = attend(q, k, v, full(96, 90), **options)
    k[:, 0, 32:48], v[:, 0, 32:48] = torch.nan, torch.inf
    found = attend(q, k, v, full(96, 90), **options)
    assert torch.equal(found[:, 1], expected[:, 1])
    assert torch.equal(found[:, 0], expected[:, 0]) is (rest == "skip")


@pytest.mark.usefixtures("cpu_path")
@EITHER_VOTE
def test_a_pooled_tile_far_above_every_exact_one_while_tiles_vote(vote):
    """Its logits, 200 log2 units above all others, must enter the softmax's peak, or its weight is infinite."""
    q, k, v = qkv(1, 2, 2, 40, 64, 16, torch.float32)
    q, k = q.abs() + 1, 0.1 * k
    k[:, :, 48:] = 30.0
    tiles = lists_of([[2, 2, 2, 1]] * 3, num_k=64)
    logits = (q @ k.mT) * 16**-0.5 * math.log2(math.e)
    assert (logits[..., 48:].amax(-1) - logits[..., :48].amax(-1)).min() > 150
    check_against_reference(q, k, v, tiles, layout="bhsd")
    out = attend(q, k, v, tiles, selection=Selection(vote=vote), backend="torch")[0]
    torch.testing.assert_close(out, attend(q, k, v, tiles, backend="reference"))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [1 << 20, 9000])
@EITHER_VOTE
def test_outputs_beside_votes_stay_within_rounding(monkeypatch, dtype, part, vote):
    monkeypatch.setattr(torch_attend, "CHUNK_BYTES", part)
    inputs, tiles = qkv(1, 4, 2, 100, 210, 16, dtype), random_lists(4, 100, 210, 16, 16)
    options = dict(return_lse=True, selection=Selection(vote=vote, reverse=True))
    truth = attend(*(x.to(WIDE) for x in inputs), tiles, backend="reference", **options)
    found, yardstick = (attend(*inputs, tiles, backend=name, **options) for name in ("torch", "reference"))
    for a, b, c in zip(found[:2], yardstick, truth, strict=False):
        assert_within_rounding(a, b, c, dtype)


@pytest.mark.usefixtures("cpu_path")
def test_several_threads_vote_alike():
    """Keys are long or short tile by tile, so that some are voted down."""
    q, k, v = qkv(2, 4, 2, 100, 110, 16, torch.float32)
    length = (1.5 * torch.randn(2, 2, 7)).repeat_interleave(16, 2)[:, :, :110, None]
    call = (1 + 0.1 * q, length + 0.1 * k, v, full(100, 110))
    alone = attend(*call, selection=Selection(vote=VOTES[0]), backend="torch")
    torch.set_num_threads(2)
    try:
        together = attend(*call, selection=Selection(vote=VOTES[0]), backend="torch")
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(alone, together)


@pytest.mark.usefixtures("cpu_path")
def test_empty_and_full_bits():
    """Nothing exact gives 0 and leaves the bits; all bits give the static lists' own output."""
    inputs, tiles, outs = qkv(1, 2, 2, 70, 90, 8, torch.float32), full(70, 90), []
    for kept in (False, True):
        keep = torch.full((1, 2, 5, 6), kept)
        selection = Selection(keep=pack_bits(keep), vote=Vote(threshold=-math.inf))
        out, lse, bits = attend(*inputs, tiles, backend="torch", return_lse=True, selection=selection)
        assert torch.equal(unpack_bits(bits, 6), keep)
        outs.append(out)
        assert lse.isinf().all() if not kept else lse.isfinite().all()
    assert not outs[0].any()
    truth = attend(*(x.to(WIDE) for x in inputs), tiles, backend="reference")
    assert_within_rounding(outs[1], attend(*inputs, tiles, backend="reference"), truth, torch.float32)


@pytest.mark.usefixtures("cpu_path")
def test_a_pooled_tile_weighs_in_bfloat16_what_its_tokens_do():
    """Its logit is 4 + ln 64, which bfloat16 rounds by .03."""
    q, k = (torch.full((1, 1, count, 16), size, dtype=torch.bfloat16) for count, size in ((64, 1.0), (192, 0.25)))
    v = (torch.arange(192) >= 64).to(torch.bfloat16)[:, None].expand(1, 1, -1, 16)
    tiles = lists_of([[2, 1, 1]], 64, 64, 64, 192)
    out = attend(q, k, v, tiles, scale=1.0, backend="torch")
    assert (out.double() - 2 / 3).abs().max() < 0.003


def test_buffers_serve_later_calls_unless_they_are_large(monkeypatch):
    like = torch.zeros(1)
    with torch.inference_mode():
        first = memory.buffer("x", like, (8,))
    first.fill_(3.0)  # though it was made in inference mode
    assert memory.buffer("x", like, (5,)).tolist() == [3.0] * 5
    assert memory.buffer("x", like, (8,), torch.int32).data_ptr() != first.data_ptr()
    monkeypatch.setattr(memory, "KEPT_BYTES", 4)
    assert memory.buffer("x", like, (8,)).data_ptr() != first.data_ptr()
