"""What Triton's kernels are handed: plans by rows and columns, expanded lists, parts of a call, descriptors."""

import triton_interpreter  # noqa: F401, I001 (before everything that may import triton)

from dataclasses import replace

import pytest
import torch
from dit_accel_kernels import EXACT, POOLED, Routing, Selection, TileLists, Vote, pack_bits, unpack_bits
from dit_accel_kernels.backends import rows
from dit_accel_kernels.backends.torch.chunks import chunks_of
from dit_accel_kernels.backends.triton import attend as triton_attend
from dit_accel_kernels.backends.triton import backward as triton_backward
from dit_accel_kernels.backends.triton import expand as triton_expand
from dit_accel_kernels.backends import slices as triton_slices
from dit_accel_kernels.backends.triton.plan import bits_of, column_plan, grouped, row_plan
from dit_accel_kernels.cache import nested_tensors
from dit_accel_kernels.checks import problem_of
from dit_accel_kernels.features import decay_by_frame
from dit_accel_kernels.states import selected_states
from kernel_cases import attend, frame_decay, full, lists_of, problem_from, qkv, random_lists

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def test_sections_hold_what_they_promise():
    """Every entry of a plan lies in the section that its keys and decays ask for, and the entries stay complete."""
    q, k, v = qkv(2, 2, 2, 100, 100, 16, torch.float32)
    tiles, frames = random_lists(2, 100, 100, 16, 16), frame_decay(100, frame=24, table=(1.0, 0.9, 0.9, 0.4))
    parts, length = (frames.table, frames.q_frames, frames.k_frames), torch.tensor([100, 70])
    plan = row_plan(problem_from(tiles, q, k, v, decay=parts, key_length=length))
    table, frame_rows = decay_by_frame(*parts)
    t, seen = table[frame_rows], set()
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, 2, 7))).tolist():
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


def test_longest_rows_come_first_and_plans_are_made_once_for_a_list_and_in_every_call_with_a_mask():
    tiles = random_lists(2, 100, 100, 16, 16)
    plan = row_plan(problem_from(tiles, *qkv(1, 2, 2, 100, 100, 16, torch.float32)))
    work = (tiles.states() == EXACT).sum(-1) * 16 + (tiles.states() == POOLED).sum(-1)
    assert (work.gather(1, plan.q_order.long()).diff(dim=1) <= 0).all()
    assert torch.equal(plan.q_order.sort(-1).values, torch.arange(7, dtype=torch.int32).expand(2, 7))
    tiles, length = random_lists(1, 100, 100, 16, 16), torch.tensor([90])
    inputs = qkv(1, 2, 2, 100, 100, 16, torch.float32)
    plain = problem_from(tiles, *inputs)
    assert row_plan(plain) is row_plan(plain)
    states = lists_of([[[2, 2, 0], [1, 0, 1], [0, 1, 0]], [[0, 1, 0], [2, 2, 2], [0, 2, 0]]])
    ends = row_plan(problem_from(states, *qkv(1, 2, 2, 40, 40, 16, torch.float32))).bounds[:, :, 4:]
    assert ends.tolist() == [[[0, 0], [0, 3], [1, 2]], [[1, 2], [0, 0], [0, 0]]]  # of pooled tiles
    masked = problem_from(tiles, *inputs, key_length=length)
    assert int(row_plan(masked).valid.sum()) == 90
    length.fill_(80)
    assert int(row_plan(masked).valid.sum()) == 80
    columns = column_plan(plain, whole_chunks=True)
    assert column_plan(replace(plain, q=plain.q + 1), whole_chunks=True) is columns
    assert column_plan(plain, whole_chunks=False) is not columns
    tiles = random_lists(2, 100, 100, 16, 16)
    for key_heads in (1, 2):  # which have an order each
        call = problem_from(tiles, *qkv(1, 2, key_heads, 100, 100, 16, torch.float32))
        assert column_plan(call, whole_chunks=True).order.shape == (key_heads, 7)


def test_plans_hold_nothing_of_what_they_are_remembered_with():
    """It would keep lists and frames alive for good."""
    tiles, frames = random_lists(1, 100, 100, 16, 16), frame_decay(100)
    parts = (frames.table, frames.q_frames, frames.k_frames, torch.rand(1, 100) > 0.3)
    call = problem_from(tiles, *qkv(1, 2, 2, 100, 100, 16, torch.float32), decay=parts[:3], key_valid=parts[3])
    plans = [row_plan(call), column_plan(call, whole_chunks=True), chunks_of(call, 300, 1, remember=True)]
    held = {x.untyped_storage().data_ptr() for x in nested_tensors(plans)}
    assert held.isdisjoint(x.untyped_storage().data_ptr() for x in (*parts, *tiles.parts.values()) if x is not None)


def test_hidden_tokens_take_no_part_in_the_plan_of_others():
    """Partial tiles are slow ones, whole tiles stay where they were."""
    tiles = TileLists.from_mask(torch.ones(64, 64, dtype=torch.bool).tril(), block_q=16, block_k=16)
    problem = problem_of(*qkv(1, 1, 1, 64, 64, 16, torch.float32), tiles, layout="bhsd")
    bounds = row_plan(problem).bounds[0]
    assert (bounds[:, 1] - bounds[:, 0]).tolist() == [0, 1, 2, 3]  # plain
    assert (bounds[:, 3] - bounds[:, 2]).tolist() == [1, 1, 1, 1]  # slow
    rest = row_plan(problem, without_whole=True).bounds[0]
    assert (rest[:, 1:4] - rest[:, :3]).tolist() == [[0, 0, 1]] * 4


def test_lists_are_transposed():
    tiles = random_lists(3, 100, 80, 16, 16)
    plan = column_plan(problem_from(tiles, *qkv(1, 3, 3, 100, 80, 8, torch.float32)), whole_chunks=True)
    states = torch.zeros(3, 7, 5, dtype=torch.uint8)
    for group, tile in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        start, middle, end = plan.bounds[group, tile].tolist()
        rows = plan.q_tiles[start:end].tolist()
        assert rows == sorted(rows)
        assert rows[middle - start :] == [row for row in rows if row == 6]  # the ragged last row needs a mask
        states[group, rows, tile] = 2
    assert torch.equal(states, tiles.states() // 2 * 2)
    counts = (plan.bounds[..., 2] - plan.bounds[..., 0]).gather(1, plan.order.long())
    assert bool((counts[:, 1:] <= counts[:, :-1]).all())
    words = bits_of(tiles.pooled_offsets, tiles.pooled_indices, 5)[..., 0] >> torch.arange(5)[:, None, None] & 1
    assert torch.equal(words, (tiles.states() == 1).int().permute(2, 0, 1))
    order, edges = grouped(torch.tensor([2, 0, 2, 2]), torch.tensor([True, False, False, False]), 3, 2)
    assert order.tolist() == [1, 2, 3, 0]  # entries of an owner keep their order within a section
    assert edges.tolist() == [0, 1, 1, 1, 1, 3, 4]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_expanded_lists_are_the_plan_filtered(groups, masked):
    """Entries, sections, decays and places of every batch and head; pooled bits hold static and demoted tiles."""
    keep, pinned = pack_bits(torch.rand(2, 2, 5, 5) < 0.6), pack_bits(torch.rand(5, 5) < 0.2)
    features: dict = dict(frame_decay=frame_decay(70), selection=Selection(keep=keep, rest="pooled", pinned=pinned))
    features |= dict(key_length=torch.tensor([70, 20])) if masked else {}
    tiles = random_lists(groups, 70, 70, 16, 16)
    call = problem_of(*qkv(2, 2, 2, 70, 70, 16, torch.float32), tiles, layout="bhsd", **features)
    plan = row_plan(call)
    lists, _ = triton_expand.expand(call, plan, None)
    states, places = selected_states(call.tiled()).expand(2, 2, -1, -1), set()
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, 2, 5))).tolist():
        place = b * lists.entry_strides[0] + h * lists.entry_strides[1]
        begin, *ends, pooled_start, pooled_end = lists.bounds[2 * b + h, i].tolist()
        start, *plan_ends = plan.bounds[b * plan.strides[0] + h * plan.strides[1], i, :4].tolist()
        assert begin == start
        for end, plan_end in zip(ends, plan_ends, strict=True):
            expected = [n for n in range(start, plan_end) if states[b, h, i, plan.indices[n]] == EXACT]
            assert lists.indices[place + begin : place + end].tolist() == plan.indices[expected].tolist()
            torch.testing.assert_close(
                lists.entry_t[place + begin : place + end], plan.entry_t[expected], rtol=0, atol=0, equal_nan=True
            )
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


TILE = 1024  # 16 chunks or more
FAR = 1 << 27  # entries before a row's own: times 16 they leave 32 bits


def rows_far_away(plan):
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
    tiles = full(*sizes, blocks[sizes[0]], blocks[sizes[1]])
    grad, selection = torch.randn(1, 1, sizes[0], 16), Selection(vote=Vote()) if far == "rows" else None

    def all_of() -> list[torch.Tensor]:
        found = attend(*leaves, tiles, backend="triton", selection=selection)
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        return [*found, *torch.autograd.grad(found[0], leaves, grad)]

    expected = all_of()
    if far == "rows":
        for module in (triton_attend, triton_backward):
            monkeypatch.setattr(module, "row_plan", lambda *args, **kw: rows_far_away(row_plan(*args, **kw)))
    else:
        far_plan = lambda *args, **kw: columns_far_away(column_plan(*args, **kw))  # noqa: E731
        monkeypatch.setattr(triton_backward, "column_plan", far_plan)
    assert all(map(torch.equal, all_of(), expected))


def a_call(groups: int, pooled: bool) -> tuple[list[torch.Tensor], TileLists, int]:
    """Tensors of 2 batches and 4 heads on 2 key heads, lists, and bytes of one copy of the lists."""
    leaves = [x.requires_grad_() for x in qkv(2, 4, 2, 40, 40, 16, torch.float32)]
    tiles = random_lists(groups, 40, 40, 16, 16, pooled=pooled)
    return leaves, tiles, 4 * (tiles.tiles_exact + 2)


@pytest.mark.parametrize(
    ("groups", "counts"), [(1, [4, 4, 4, 4, 2, 2, 2, 1]), (4, [2, 2, 1, 1, 1, 1, 1, 1]), (8, [1] * 8)]
)
def test_parts_are_disjoint_and_no_larger_than_the_scratch(monkeypatch, groups, counts):
    leaves, tiles, one = a_call(groups, True)
    selection = Selection(keep=pack_bits(torch.rand(2, 4, 3, 3) < 0.6), rest="pooled")
    problem = problem_of(*leaves, tiles, layout="bhsd", selection=selection)
    assert triton_slices.SCRATCH_BYTES <= 1 << 30
    room = (0, one, 3 * one - 1, 3 * one, 4 * one, 6 * one - 1, 8 * one - 1, 8 * one)
    for copies, scratch, count in zip((0, 1, 2, 3, 4, 5, 7, 8), room, counts, strict=True):
        monkeypatch.setattr(triton_slices, "SCRATCH_BYTES", scratch)
        seen, parts = torch.zeros(2, 4, dtype=torch.int32), triton_slices.slices(problem)
        assert len(parts) == count
        for part in parts:
            seen[part] += 1
            cut = triton_slices.slice_of(problem, part)
            batch, heads = cut.q.shape[:2]
            assert heads == 2 * cut.k.shape[1]
            assert batch * heads <= max(copies * groups, 2 if groups == 1 else groups)  # a copy serves so many heads
        assert bool((seen == 1).all())


@pytest.mark.parametrize(
    ("groups", "routes", "copies"),
    [(4, False, 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, False, 1), (1, True, 5), (4, True, 1)))],
)
def test_parts_of_the_heads_give_the_same(monkeypatch, groups, routes, copies):
    """Scratch for so many copies of the lists at a time: output, LSE, tiles, votes and gradients stay as they are."""
    leaves, tiles, one = a_call(groups, routes)
    keep = pack_bits(torch.rand(2, 4, 3, 3) < 0.8)
    selection = Selection(keep=keep, vote=Vote(), routing=Routing(beta=0.0) if routes else None)
    features = dict(key_length=torch.tensor([40, 21]), head_scale=torch.rand(2, 4) + 0.5)
    features |= dict(return_lse=True, return_tiles=True)
    scratch, real, results = [], triton_expand.expand, []

    def expand(problem, plan, routed):
        lists, exact = real(problem, plan, routed)
        scratch.append(4 * lists.indices.numel())
        return lists, exact

    for module in (triton_attend, triton_backward):
        monkeypatch.setattr(module, "expand", expand)
    for limit in (1 << 30, copies * one):
        monkeypatch.setattr(triton_slices, "SCRATCH_BYTES", limit)
        scratch.clear()
        given = attend(*leaves, tiles, backend="triton", selection=selection, **features)
        total = given[0].sum() + given[1][given[1].isfinite()].sum()
        results.append([*given, *torch.autograd.grad(total, leaves)])
    assert all(map(torch.equal, *results))
    assert len(scratch) > 1
    assert max(scratch) <= max(copies, 2 if groups == 1 else 1) * one  # heads of one key head stay together


def test_chunks_come_by_descriptors_where_these_can_describe_them(monkeypatch):
    """Bit for bit what comes by pointers (bench/grid.py has all features); odd head dims, strides and orders do not."""
    made, descriptors = [], triton_attend._descriptors
    monkeypatch.setattr(triton_attend, "_descriptors", lambda *given: made.append(descriptors(*given)) or made[-1])
    q, k, v = qkv(2, 4, 2, 70, 70, 16, torch.float32, "bshd")
    tiles, outs = random_lists(1, 70, 70, 32, 32), []
    for bulk in (False, True):
        monkeypatch.setattr(triton_attend, "bulk_copies", lambda *_, bulk=bulk: bulk)
        outs.append(attend(q, k, v, tiles, layout="bshd", backend="triton", frame_decay=frame_decay(70)))
    assert torch.equal(*outs)
    assert [x is not None for pair in made for x in pair] == [False] * 4 + [True] * 4  # keys and values, their means
    made.clear()
    for dim, block, extra, order in ((24, 32, 0, False), (16, 24, 0, False), (16, 32, 1, False), (16, 32, 0, True)):
        q = torch.randn(1, 2, 40, dim + extra)[..., :dim]  # with one more column, rows are not 16 bytes apart
        arguments: dict = {"token_order": torch.randperm(40)} if order else {}
        attend(q, q, q, random_lists(1, 40, 40, block, block, pooled=False), backend="triton", **arguments)
    assert made == [(None, None)] * 4
    whole = torch.zeros(1, 2, 40, 16)
    for other, in_sequence, fits in (
        (whole, True, True), (whole, False, False), (torch.zeros(1, 2, 40, 8), True, True),
        (torch.zeros(1, 2, 40, 24), True, False), (torch.zeros(1, 2, 40, 8).half(), True, False),
        (torch.zeros(1, 1, 40, 16).expand(1, 2, -1, -1), True, False),
    ):  # fmt: skip
        for pair in ((whole, other), (other, whole)):
            found = [x and (x.base, x.block_shape) for x in descriptors(*pair, 4, in_sequence)]
            assert found == [(x, [1, 1, 4, x.shape[3]]) if fits else None for x in pair]


def test_rows_that_move_in_pieces_of_16_bytes():
    x, half = torch.zeros(4096), torch.zeros(4096, dtype=torch.float16)
    for memory, strides, start, whole, moves in (
        (x, (96, 32, 8, 1), 0, True, True), (x, (96, 32, 4, 1), 4, True, True), (half, (96, 32, 8, 1), 8, True, True),
        (x, (96, 32, 8, 2), 0, False, False), (x, (96, 32, 8, 1), 1, True, False), (x, (97, 32, 8, 1), 0, True, False),
        (x, (96, 33, 8, 1), 0, True, False), (x, (96, 32, 9, 1), 0, True, False),
        (half, (96, 32, 4, 1), 0, True, False),
    ):  # fmt: skip
        tensor = memory.as_strided((2, 3, 4, 4), strides, start)
        assert rows.moves_in_pieces(tensor) == moves
        assert (rows.with_whole_rows(tensor) is tensor) == whole
