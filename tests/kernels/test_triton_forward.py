"""The Triton forward: its plans and launches, what it refuses, and decays that tables hold."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import (
    EXACT,
    Selection,
    POOLED,
    BackendUnavailableError,
    FrameDecay,
    TileLists,
    block_sparse_attention,
    resolve_backend,
)
from dit_accel_kernels.backends.triton import attend as triton_backend
from dit_accel_kernels.backends.triton import launch as triton_launch
from dit_accel_kernels.backends.triton import plan as triton_plan
from dit_accel_kernels.backends.triton import pool as triton_pool
from dit_accel_kernels.backends.triton import support as triton_support
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.features import decay_by_frame
from kernel_cases import check_against_reference, problem_from, qkv, random_lists, with_masks


ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def check(q, k, v, tiles, **arguments):
    check_against_reference(q, k, v, tiles, "triton", **{"layout": "bhsd", **arguments})


def decay(tokens: int, frame: int, table=(1.0, 0.9, 0.6)) -> FrameDecay:
    """Frames of `frame` tokens after a first one outside the video."""
    frames = torch.arange(tokens, dtype=torch.int32) // frame - 1
    return FrameDecay(table=torch.tensor(table), q_frames=frames, k_frames=frames)


@pytest.mark.sample
@pytest.mark.parametrize("frame", [4, 16, 17, 50])
@pytest.mark.parametrize("table", [(1.0,), (0.7,), (1.0, 1.0, 0.8, 0.8, 0.5), (0.9, 0.5, 1.0)])
def test_decay_tables(frame, table):
    check(
        *qkv(1, 1, 1, 70, 70, 16, torch.float32), random_lists(1, 70, 70, 16, 16), frame_decay=decay(70, frame, table)
    )


def test_strided_inputs_and_layout_of_the_output():
    q, k, v = torch.randn(2, 40, 3, 2, 16).unbind(2)  # [B, S, H, D] of a fused projection
    tiles = random_lists(1, 40, 40, 16, 16)
    check(q, k, v, tiles, layout="bshd")
    check(*(x.mT.contiguous().mT for x in qkv(1, 2, 2, 40, 40, 16, torch.float32)), tiles)
    for strided in (q.transpose(1, 2), q.transpose(1, 2).contiguous()):
        for heads_first in (False, True):
            problem = replace(problem_from(tiles, strided, strided, strided), heads_first=heads_first)
            out, *_ = triton_backend.attend(problem, need_lse=False)
            assert (out.stride(1) > out.stride(2)) == heads_first


@pytest.mark.parametrize("features", [{}, dict(frame_decay=decay(70, 16)), dict(key_length=torch.tensor([50]))])
def test_direction_changes_the_order_only(features):
    q, k, v = qkv(1, 1, 1, 70, 70, 16, torch.float32)
    tiles = TileLists.full(70, 70, block_q=32, block_k=16)
    frame = features.get("frame_decay")
    problem = problem_from(
        tiles, q, k, v, key_length=features.get("key_length"),
        decay=None if frame is None else (frame.table, frame.q_frames, frame.k_frames),
    )  # fmt: skip
    out, lse, *_ = triton_backend.attend(problem, need_lse=True)
    backwards = replace(problem, selection=Selection(reverse=True))
    back, back_lse, *_ = triton_backend.attend(backwards, need_lse=True)
    torch.testing.assert_close(out, back)
    torch.testing.assert_close(lse, back_lse)
    assert not torch.equal(out, back)


def test_sections_hold_what_they_promise():
    """Every entry of a plan lies in the section that its keys and decays ask for, and the entries stay complete."""
    q, k, v = qkv(2, 2, 2, 100, 100, 16, torch.float32)
    tiles, frames = random_lists(2, 100, 100, 16, 16), decay(100, 24, (1.0, 0.9, 0.9, 0.4))
    parts = (frames.table, frames.q_frames, frames.k_frames)
    length = torch.tensor([100, 70])
    plan = triton_plan.row_plan(problem_from(tiles, q, k, v, decay=parts, key_length=length))
    table, frame_rows = decay_by_frame(*parts)
    t = table[frame_rows]
    seen = set()
    for b in range(2):
        for h in range(2):
            for i in range(7):
                start, *ends = plan.bounds[b * plan.strides[0] + h * plan.strides[1], i, :4].tolist()
                listed = tiles.exact_indices[tiles.exact_offsets[h, i] : tiles.exact_offsets[h, i + 1]].tolist()
                assert sorted(plan.indices[start : ends[2]].tolist()) == [j for j in listed if j * 16 < length[b]]
                for place in range(start, ends[2]):
                    j = int(plan.indices[place])
                    tile = t[16 * i : 16 * (i + 1), 16 * j : 16 * (j + 1)]
                    section = sum(place >= end for end in ends)
                    whole = 16 * (j + 1) <= length[b]
                    assert (section == 2) == (not whole or bool((tile != tile[0, 0]).any()))
                    assert section == 2 or plan.entry_t[place] == tile[0, 0]
                    assert section != 0 or tile[0, 0] == 1
                    seen.add(section)
    assert seen == {0, 1, 2}


def test_longest_rows_come_first():
    tiles = random_lists(2, 100, 100, 16, 16)
    q, k, v = qkv(1, 2, 2, 100, 100, 16, torch.float32)
    plan = triton_plan.row_plan(problem_from(tiles, q, k, v))
    exact = (tiles.states() == EXACT).sum(-1)
    work = exact * 16 + (tiles.states() == POOLED).sum(-1)
    assert (work.gather(1, plan.q_order.long()).diff(dim=1) <= 0).all()
    assert torch.equal(plan.q_order.sort(-1).values, torch.arange(7, dtype=torch.int32).expand(2, 7))


def test_a_plan_is_made_once_and_in_every_call_with_a_mask():
    tiles, length = random_lists(1, 100, 100, 16, 16), torch.tensor([90])
    inputs = qkv(1, 2, 2, 100, 100, 16, torch.float32)
    plain = problem_from(tiles, *inputs)
    assert triton_plan.row_plan(plain) is triton_plan.row_plan(plain)
    masked = problem_from(tiles, *inputs, key_length=length)
    assert int(triton_plan.row_plan(masked).valid.sum()) == 90
    length.fill_(80)
    assert int(triton_plan.row_plan(masked).valid.sum()) == 80


def test_pool_of_valid_tokens():
    _, k, v = qkv(2, 2, 2, 40, 40, 24, torch.float32)
    valid = torch.rand(2, 40) > 0.3
    valid[0, 16:32] = False
    k_mean, v_mean, length = triton_pool.pool(k, v, block_k=16, token_order=ORDER, valid=valid.to(torch.uint8))
    for b in range(2):
        for tile, chosen in enumerate(ORDER.split(16)):
            kept = chosen[valid[b].split(16)[tile]]
            assert length[b, tile] == kept.numel()
            for mean, x in ((k_mean, k), (v_mean, v)):
                expected = x[b][:, kept].sum(1) / max(kept.numel(), 1)
                torch.testing.assert_close(mean[b, :, tile], expected)


@pytest.mark.parametrize(
    ("dtype", "dim", "text"),
    [
        (torch.float64, 16, r"'triton'.*bfloat16, float16.*float32 \(found torch\.float64\).*'torch'"),
        (torch.float32, 12, r"'triton'.*8.*256 \(found 12\)"),
        (torch.float32, 264, r"'triton'.*8.*256 \(found 264\)"),
        (torch.float32, (16, 12), r"multiple of 8 up to 256 \(found 12\)"),
    ],
)
def test_refuses_dtypes_and_head_dims(dtype, dim, text):
    dim, value_dim = dim if isinstance(dim, tuple) else (dim, dim)
    q, k, v = qkv(1, 1, 1, 20, 20, max(dim, value_dim), dtype)
    call = (q[..., :dim], k[..., :dim], v[..., :value_dim], random_lists(1, 20, 20, 16, 16))
    with pytest.raises(BackendUnavailableError, match=text):
        block_sparse_attention(*call, layout="bhsd", backend="triton")


def test_says_what_the_machine_lacks(monkeypatch):
    call = (*qkv(1, 1, 1, 20, 20, 16, torch.float32), random_lists(1, 20, 20, 16, 16))
    monkeypatch.delenv("TRITON_INTERPRET")
    text = r"'triton'.*CUDA, ROCm.*XPU.*found cpu.*TRITON_INTERPRET=1.*CPU\)"
    with pytest.raises(BackendUnavailableError, match=text):
        block_sparse_attention(*call, layout="bhsd", backend="triton")
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*triton package \(found none\)"):
        block_sparse_attention(*call, layout="bhsd", backend="triton")


def test_auto_is_triton_where_it_runs(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_backend("auto", cuda) == "triton"
    assert resolve_backend("auto", cuda, torch.bfloat16, 128) == "triton"
    assert resolve_backend("auto", cuda, torch.float64, 128) == "torch"
    assert resolve_backend("auto", cuda, torch.bfloat16, 264) == "torch"
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
    assert resolve_backend("auto", torch.device("mps")) == "torch"
    assert resolve_backend("auto", torch.device("xpu")) == "triton"
    assert resolve_backend("flex", cuda) == "flex"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert resolve_backend("auto", cuda) == "torch"
    assert "compute capability 8.0 or newer (found 7.5)" in triton_support.missing_requirement(cuda)
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: None)
    assert resolve_backend("auto", torch.device("xpu")) == "torch"


@pytest.mark.parametrize(
    ("dim", "parts"), [(8, (16, 0)), (32, (32, 0)), (72, (64, 16)), (96, (64, 32)), (256, (256, 0))]
)
def test_column_parts(dim, parts):
    assert triton_launch.column_parts(dim) == parts


def test_chunks_of_a_tile():
    found = [triton_launch.key_block(tile, 64) for tile in (128, 64, 48, 24, 8)]
    assert found == [(64, True), (64, True), (16, True), (32, False), (16, False)]
    assert [triton_launch.query_block(tile, 128) for tile in (5, 40, 128, 300)] == [16, 64, 128, 128]


def test_half_the_rows_take_half_the_warps():
    launch = triton_launch.launch_of("", torch.bfloat16, 128)
    assert [triton_launch.warps(launch, rows) for rows in (128, 64, 16)] == [8, 4, 4]


def test_launches_fall_back_to_generic_sizes():
    assert triton_launch.launch_of("sm_90", torch.bfloat16, 128) != triton_launch.launch_of("", torch.bfloat16, 128)
    assert triton_launch.launch_of("sm_999", torch.float16, 80) == triton_launch.launch_of("", torch.bfloat16, 128)
    assert triton_launch.launch_of("sm_80", torch.float16, 24).block_k == 32
    assert triton_launch.launch_of("sm_90", torch.float16, 24) == triton_launch.launch_of("sm_90", torch.float16, 64)


def test_a_token_order_takes_smaller_launches():
    launch = triton_launch.Launch(block_q=128, block_k=64, block_s=32, num_warps=8, num_stages=2)
    assert triton_launch.with_order(launch, decay=False) == replace(launch, block_s=16)
    assert triton_launch.with_order(launch, decay=True) == replace(launch, block_q=64, block_s=16)
    small = replace(launch, block_q=64, num_warps=4)
    assert triton_launch.with_order(small, decay=False) == replace(small, block_k=32, block_s=16)


def test_lists_that_batches_or_heads_share_are_copied_once_for_each_of_them():
    from dit_accel_kernels.backends.triton.expand import _room

    # 3 batches of 4 heads; a stride of 0 says that all of them share the list, here of one entry
    assert _room((8, 2), 1, 3, 4) == ((0, 0), 1)
    assert _room((8, 0), 1, 3, 4) == ((0, 1), 4)
    assert _room((0, 2), 1, 3, 4) == ((1, 0), 3)
    assert _room((0, 0), 1, 3, 4) == ((4, 1), 12)
    assert _room((0, 0), 5, 3, 4) == ((20, 5), 60)


@pytest.mark.parametrize("decays", [True, False])
def test_calls_with_decay_take_the_launch_rows_of_decay(monkeypatch, decays):
    asked, real = [], triton_backend.launch_of
    monkeypatch.setattr(
        triton_backend, "launch_of", lambda *given, **named: asked.append(named["features"]) or real(*given, **named)
    )
    q, k, v = (torch.randn(1, 1, 32, 16) for _ in range(3))
    frames = torch.arange(32, dtype=torch.int32) // 16
    decay = FrameDecay(table=torch.tensor([1.0, 0.5]), q_frames=frames, k_frames=frames) if decays else None
    tiles = TileLists.full(32, 32, block_q=16, block_k=16)
    block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="triton", frame_decay=decay)
    assert asked == [("decay",) if decays else ()]


def test_a_mask_that_lets_everything_through_is_none():
    """What is masked must leave what isn't alone: bit for bit the output of the same lists without masks."""
    q, k, v = qkv(1, 2, 2, 48, 96, 32, torch.float32)
    tiles = random_lists(1, 48, 96, 16, 32)
    ones = torch.full((1, 16, 1), -1, dtype=torch.int32)
    masked = replace(tiles, mask_ids=torch.zeros(tiles.tiles_exact, dtype=torch.int32), mask_bits=ones)
    out, other = (block_sparse_attention(q, k, v, x, layout="bhsd", backend="triton") for x in (tiles, masked))
    torch.testing.assert_close(other, out, rtol=1e-6, atol=1e-6)


def test_masks_written_to_count():
    """Bits are read in every call; numbers are in the plan, which follows their writes."""
    q, k, v = qkv(1, 1, 1, 48, 48, 16, torch.float32)
    tiles = with_masks(random_lists(1, 48, 48, 16, 16))
    assert tiles.mask_bits is not None
    assert tiles.mask_ids is not None
    block_sparse_attention(q, k, v, tiles, layout="bhsd", backend="triton")
    for x in (tiles.mask_bits, tiles.mask_ids):
        x.copy_(x.flip(0))
        check_against_reference(q, k, v, tiles, "triton", layout="bhsd")


def test_hidden_tokens_take_no_part_in_the_plan_of_others():
    """Partial tiles are slow ones, whole tiles stay where they were."""
    q, k, v = qkv(1, 1, 1, 64, 64, 16, torch.float32)
    tiles = TileLists.from_mask(torch.ones(64, 64, dtype=torch.bool).tril(), block_q=16, block_k=16)
    problem = problem_of(q, k, v, tiles, layout="bhsd")
    bounds = triton_plan.row_plan(problem).bounds[0]
    assert (bounds[:, 1] - bounds[:, 0]).tolist() == [0, 1, 2, 3]  # plain
    assert (bounds[:, 3] - bounds[:, 2]).tolist() == [1, 1, 1, 1]  # slow
    rest = triton_plan.row_plan(problem, without_whole=True).bounds[0]
    assert (rest[:, 1:4] - rest[:, :3]).tolist() == [[0, 0, 1]] * 4
