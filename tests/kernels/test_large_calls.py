"""Sizes of long videos, on small calls: list positions beyond 32 bits, and lists that are made a part at a time."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import Routing, Selection, TileLists, Vote, block_sparse_attention, pack_bits
from dit_accel_kernels.backends.triton import attend as triton_backend
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.backends.triton import backward as triton_backward
from dit_accel_kernels.backends.triton import expand as triton_expand
from dit_accel_kernels.backends.triton import slices as triton_slices
from kernel_cases import qkv, random_lists

TILE = 1024  # 16 chunks or more
FAR = 1 << 27  # entries before a row's own: times 16 they leave 32 bits


def far_away(plan):
    """The same plan behind FAR other entries, which cost address space only."""
    indices = torch.zeros(FAR + plan.indices.numel(), dtype=torch.int32)
    indices[FAR:] = plan.indices
    bounds = plan.bounds.clone()
    bounds[..., :4] += FAR
    return replace(plan, indices=indices, bounds=bounds)


def columns_far_away(plan):
    rows = torch.zeros(FAR + plan.q_tiles.numel(), dtype=torch.int32)
    rows[FAR:] = plan.q_tiles
    return replace(plan, q_tiles=rows, bounds=plan.bounds + FAR)


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("far", ["rows", "columns"])
def test_positions_times_chunks_stay_in_range(monkeypatch, far):
    """268 million entries and more, as 460k tokens have with lists of 40 heads: by block row, and by key tile."""
    sizes = (16, TILE + 30) if far == "rows" else (TILE + 30, 16)
    leaves, blocks = [x.requires_grad_() for x in qkv(1, 1, 1, *sizes, 16, torch.float32)], {16: 16, TILE + 30: TILE}
    tiles = TileLists.full(*sizes, block_q=blocks[sizes[0]], block_k=blocks[sizes[1]])
    grad, selection = torch.randn(1, 1, sizes[0], 16), Selection(vote=Vote()) if far == "rows" else None

    def all_of() -> list[torch.Tensor]:
        found = block_sparse_attention(*leaves, tiles, layout="bhsd", backend="triton", selection=selection)
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        return [*found, *torch.autograd.grad(found[0], leaves, grad)]

    expected = all_of()
    real_rows, real_columns = triton_backend.row_plan, triton_backward.column_plan
    if far == "rows":
        for module in (triton_backend, triton_backward):
            monkeypatch.setattr(module, "row_plan", lambda *args, **kw: far_away(real_rows(*args, **kw)))
    else:
        monkeypatch.setattr(
            triton_backward, "column_plan", lambda *args, **kw: columns_far_away(real_columns(*args, **kw))
        )
    assert all(map(torch.equal, all_of(), expected))


def chosen(*shape: int, share: float = 0.6) -> torch.Tensor:
    return pack_bits(torch.rand(*shape) < share)


def a_call(groups: int, pooled: bool) -> tuple[list[torch.Tensor], TileLists, int]:
    """Tensors of 2 batches and 4 heads on 2 key heads, lists, and bytes of one copy of what a selection leaves."""
    leaves = [x.requires_grad_() for x in qkv(2, 4, 2, 40, 40, 16, torch.float32)]
    tiles = random_lists(groups, 40, 40, 16, 16, pooled=pooled)
    return leaves, tiles, 4 * tiles.tiles_exact


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 5, 7, 8, 100])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_parts_are_disjoint_and_no_larger_than_the_scratch(monkeypatch, groups, copies):
    leaves, tiles, one = a_call(groups, True)
    selection = Selection(keep=chosen(2, 4, 3, 3), rest="pooled")
    problem = problem_of(*leaves, tiles, layout="bhsd", selection=selection)
    monkeypatch.setattr(triton_slices, "SCRATCH_BYTES", copies * one)
    seen, lanes = torch.zeros(2, 4, dtype=torch.int32), {1: 1, 4: 4, 8: 8}[groups]  # that one copy serves
    for part in triton_slices.slices(problem):
        seen[part] += 1
        found = triton_slices.slice_of(problem, part)
        batch, heads = found.q.shape[:2]
        assert heads == 2 * found.k.shape[1]
        assert batch * heads <= max(copies * lanes, 2 if groups == 1 else lanes)
    assert bool((seen == 1).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "routes", "copies"), [(1, False, 1), (1, True, 5), (4, True, 1)], ids=["heads", "batches", "lists"]
)
def test_lists_of_a_part_of_the_heads_give_the_same(monkeypatch, groups, routes, copies):
    """Scratch for so many copies of the lists at a time: output, LSE, tiles, votes and gradients stay as they are."""
    leaves, tiles, one = a_call(groups, routes)
    selection = Selection(
        keep=chosen(2, 4, 3, 3, share=0.8), vote=Vote(), routing=Routing(beta=0.0) if routes else None
    )
    features = dict(key_length=torch.tensor([40, 21]), head_scale=torch.rand(2, 4) + 0.5)
    scratch, real = [], triton_expand.expand

    def expand(problem, plan, routed):
        lists, exact = real(problem, plan, routed)
        scratch.append(4 * lists.indices.numel())
        return lists, exact

    monkeypatch.setattr(triton_backend, "expand", expand)
    found = []
    for limit in (1 << 30, copies * one):
        monkeypatch.setattr(triton_slices, "SCRATCH_BYTES", limit)
        scratch.clear()
        result = block_sparse_attention(
            *leaves, tiles, layout="bhsd", backend="triton", selection=selection, return_lse=True, return_tiles=True,
            **features,
        )  # fmt: skip
        found.append([*result, *torch.autograd.grad(result[0].sum(), leaves)])
    assert all(map(torch.equal, *found))
    assert len(scratch) > 1
    assert max(scratch) <= max(copies, 2 if groups == 1 else 1) * one + 8  # heads of one key head stay together


def test_gradients_of_output_and_lse_a_part_at_a_time_are_those_of_the_whole(monkeypatch):
    leaves, tiles, one = a_call(4, False)
    selection, found = Selection(keep=chosen(2, 4, 3, 3, share=0.8)), []
    for limit in (1 << 30, one):
        monkeypatch.setattr(triton_slices, "SCRATCH_BYTES", limit)
        out, lse = block_sparse_attention(
            *leaves, tiles, layout="bhsd", backend="triton", selection=selection, return_lse=True
        )
        found.append(torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), leaves))
    assert all(map(torch.equal, *found))
