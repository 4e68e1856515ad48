"""The torch backend's work on units, for calls without masks and decay; all buffers stay in a core's cache.

Rows with many columns are taken one by one (torch_rows.py), short ones in batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel_kernels.features import Problem
from dit_accel_kernels.schedule import Unit, entries_of, runs
from dit_accel_kernels.tiled import Tiled, key_heads, wide_dtype
from dit_accel_kernels.torch_rows import Row, RowLoop, buffer, far_lengths, tiles_of_part

GPU_LANES = 256  # batches of a GPU are this many times larger
SCORES_BYTES = 512 << 10  # logits of one batch, a thread
SHORT_BYTES = 64 << 10  # rows with fewer bytes of logits save time in batches
RUNS = 4  # pieces of a worker, so that all end together


def plain_pieces(tiled: Tiled, units: list[Unit], workers: int) -> Iterator[tuple[Unit, slice]]:
    """Units cut into a few pieces for each worker: lanes in batches, block rows in even runs."""
    lanes = tiled.q.shape[0]
    for unit in units:
        lane_step, _ = steps(tiled, _parts(tiled, unit)[0], 1)
        starts = range(0, lanes, lane_step)
        runs = min(unit.rows.numel(), -(-workers * RUNS // (len(starts) * len(units))))
        for start in starts:
            for rows, exact, pooled in zip(
                *(x.tensor_split(runs) for x in (unit.rows, unit.exact, unit.pooled)), strict=True
            ):
                yield Unit(rows, exact, pooled, unit.tail), slice(start, min(lanes, start + lane_step))


def has_long_rows(problem: Problem, tiled: Tiled, *, voting: bool) -> bool:
    """Whether block rows of one lane are better taken one by one than in units; votes are counted only that way."""
    lanes, rows, block_q, _ = tiled.q.shape
    if lanes > 1 or tiled.q.device.type != "cpu":
        return False
    far = problem.pooled_indices
    tokens = problem.exact_indices.numel() * problem.block_k + (0 if far is None else far.numel())
    size = tokens * len(key_heads(problem)) // problem.exact_offsets.shape[0] * block_q * tiled.q.element_size()
    return voting or size >= rows * SHORT_BYTES


def row_pieces(problem: Problem, tiled: Tiled, workers: int) -> list[list[Row]]:
    """The block rows of lists of every batch and head, B * H list sets in one lane, a few pieces for each worker."""
    heads, block = key_heads(problem), tiled.k.shape[2]
    exact = entries_of(problem.exact_offsets, problem.exact_indices, tiled.key_tiles, heads)
    columns = [block * count for count in exact.counts]
    pooled, lengths = None, exact.tiles
    if problem.pooled_offsets is not None and problem.pooled_indices is not None:
        pooled = entries_of(problem.pooled_offsets, problem.pooled_indices, tiled.key_tiles, heads)
        lengths = far_lengths(tiled, pooled.tiles)
        columns = [near + far for near, far in zip(columns, pooled.counts, strict=True)]
    tails = [False] * len(columns)
    if tiled.tail and exact.tiles.numel():
        ends = torch.tensor(exact.starts[1:]).sub_(1).clamp_(min=0)
        last = (exact.tiles[ends] % tiled.key_tiles == tiled.key_tiles - 1).tolist()
        tails = [is_last and count > 0 for is_last, count in zip(last, exact.counts, strict=True)]
    pieces = []
    for run in runs(columns, workers * RUNS if workers > 1 else 1):
        numbers, near = range(run.start, run.stop), exact.split(exact.tiles, run)
        if pooled is None:
            far = weights = (None,) * len(numbers)
        else:
            far, weights = pooled.split(pooled.tiles, run), pooled.split(lengths, run)
        rows = zip(numbers, near, far, weights, tails[run], columns[run], strict=True)
        pieces.append([Row(*row[:-1]) for row in rows if row[-1]])
    return [piece for piece in pieces if piece]


def steps(tiled: Tiled, unit: Unit, threads: int) -> tuple[int, int]:
    """Lanes and block rows of one batch: logits within SCORES_BYTES a thread, and one block row of a lane at least."""
    lanes, _, block_q, _ = tiled.q.shape
    columns = unit.exact.shape[1] * tiled.k.shape[2] + unit.pooled.shape[1]
    threads = threads if tiled.q.device.type == "cpu" else GPU_LANES
    room = threads * max(1, SCORES_BYTES // (tiled.q.element_size() * block_q * columns))
    lane_step = min(lanes, room)
    return lane_step, max(1, room // lane_step)


def attend_plain(
    tiled: Tiled, unit: Unit, lanes: slice, buffers: dict[str, Tensor], out: Tensor, lse: Tensor | None
) -> None:
    """One piece without masks and decay, in batches or row by row; `out` and `lse` are the lanes' own part."""
    if steps(tiled, _parts(tiled, unit)[0], torch.get_num_threads()) == (1, 1) and out.shape[0] == 1:
        loop = RowLoop(tiled, lanes.start, buffers, out[0], None if lse is None else lse[0])
        loop.run(_rows(tiled, unit))
    else:
        _batches(tiled, unit, lanes, buffers, out, lse)


def _rows(tiled: Tiled, unit: Unit) -> list[Row]:
    """The unit's block rows one by one."""
    numbers, exact, pooled = unit.rows.tolist(), unit.exact.unbind(0), unit.pooled.unbind(0)
    if not unit.pooled.shape[1]:
        return [Row(number, near, None, None, unit.tail) for number, near in zip(numbers, exact, strict=True)]
    lengths = far_lengths(tiled, unit.pooled).unbind(0)
    return [Row(*row, unit.tail) for row in zip(numbers, exact, pooled, lengths, strict=True)]


def _batches(
    tiled: Tiled, unit: Unit, lanes: slice, buffers: dict[str, Tensor], out: Tensor, lse: Tensor | None
) -> None:
    """As many block rows and lanes at a time as fit; makes no view and no buffer it made before."""
    parts = _parts(tiled, unit)
    _, row_step = steps(tiled, parts[0], torch.get_num_threads())
    rooms: dict[tuple[int, int], _Room] = {}
    for row in range(0, unit.rows.numel(), row_step):
        rows = slice(row, row + row_step)
        picked = unit.rows[rows]
        found, merged = None, None
        for number, part in enumerate(parts):
            key = (number, picked.numel())
            if key not in rooms:
                rooms[key] = _Room(tiled, part, buffers, lanes, key[1])
            room = rooms[key]
            found = _batch(tiled, part, rows, room, need_lse=lse is not None or len(parts) > 1)
            if len(parts) > 1 and found is not None:
                merged = _merge(merged, room.out_batch, found)
                found = merged[1]
        result = room.out if merged is None else merged[0].view_as(room.out).to(out.dtype)
        out.index_copy_(1, picked, result)
        if lse is not None and found is not None:
            lse.index_copy_(1, picked, found.view(room.q.shape[:-1]))


def _parts(tiled: Tiled, unit: Unit) -> list[Unit]:
    """The columns in even parts whose logits stay within PART_BYTES a block row; pooled tiles come with the last."""
    count = unit.exact.shape[1]
    room = tiles_of_part(tiled)
    parts = max(1, -(-count // room))
    bounds = [count * i // parts for i in range(parts + 1)]
    return [
        Unit(
            unit.rows,
            unit.exact[:, a:b],
            unit.pooled if b == count else unit.pooled[:, :0],
            unit.tail and b == count,
        )
        for a, b in pairwise(bounds)
    ]


def _batch(tiled: Tiled, part: Unit, rows: slice, room: _Room, *, need_lse: bool) -> Tensor | None:
    """Attention of some block rows over one part, left in `room.out`; returns its LSE [L * R, block_q] if needed."""
    exact, pooled = part.exact[rows].flatten(), part.pooled[rows]
    torch.index_select(room.from_q, 1, part.rows[rows], out=room.q)
    torch.index_select(room.from_k, 1, exact, out=room.k)
    torch.index_select(room.from_v, 1, exact, out=room.v)
    if pooled.shape[1]:
        _append_means(tiled, pooled, room)
    torch.baddbmm(room.logits, room.q_batch, room.k_columns.mT, beta=0, alpha=tiled.scale, out=room.logits)
    torch.softmax(room.logits, -1, out=room.p)
    lse = _lse_of(room.logits, room.p) if need_lse else None
    total = _weigh(tiled, pooled, room) if pooled.shape[1] else None
    torch.bmm(room.p, room.v_columns, out=room.out_batch)
    if total is None:
        return lse
    room.out_batch.copy_(room.out_batch / total[..., None])
    return None if lse is None else lse + total.log()


def _lse_of(logits: Tensor, p: Tensor) -> Tensor:
    """log sum e^x = max x - log max p: two cheap passes where a logsumexp would repeat the softmax."""
    wide = wide_dtype(p.dtype)
    return logits.amax(-1).to(wide) - p.amax(-1).to(wide).log()


def _merge(merged: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two disjoint parts by their LSE, in the wide dtype."""
    if merged is None:
        return out.to(lse.dtype, copy=True), lse
    total = torch.logaddexp(merged[1], lse)
    before = merged[0].mul_((merged[1] - total).exp()[..., None])
    return before.addcmul_(out.to(lse.dtype), (lse - total).exp()[..., None]), total


class _Room:
    """Views of reused buffers for batches of one shape, made once for all batches of a unit: L lanes x R block rows.

    `q`, `out` are [L, R, block_q, D], `k`, `v` [L, R * n, block_k, D]; `*_batch` the same with one batch dimension, and
    `*_columns` the exact tokens with the pooled tiles behind them, [L * R, C, D].
    """

    def __init__(self, tiled: Tiled, unit: Unit, buffers: dict[str, Tensor], which: slice, rows: int) -> None:
        self.lanes = which
        self.from_q, self.from_k, self.from_v = tiled.q[which], tiled.k[which], tiled.v[which]
        lanes = self.from_q.shape[0]
        exact, pooled = unit.exact.shape[1], unit.pooled.shape[1]
        block, dim = tiled.k.shape[2:]
        batch, block_q = lanes * rows, tiled.q.shape[2]

        def take(name: str, *shape: int) -> Tensor:
            return buffer(buffers, name, tiled.q, shape)

        self.rows = rows
        self.tokens = exact * block - (tiled.tail if unit.tail else 0)
        self.q, self.out = (take(name, lanes, rows, block_q, dim) for name in ("q", "out"))
        self.k, self.v = (take(name, lanes, rows * exact, block, dim) for name in ("k", "v"))
        self.logits, self.p = (take(name, batch, block_q, self.tokens + pooled) for name in ("logits", "p"))
        self.q_batch, self.out_batch = (x.view(batch, block_q, dim) for x in (self.q, self.out))
        self.k_exact, self.v_exact = (x.view(batch, exact * block, dim)[:, : self.tokens] for x in (self.k, self.v))
        self.k_columns, self.v_columns = self.k_exact, self.v_exact
        if pooled:
            self.k_columns, self.v_columns = (take(n, batch, self.tokens + pooled, dim) for n in ("k_all", "v_all"))


def _append_means(tiled: Tiled, pooled: Tensor, room: _Room) -> None:
    """Put the means of the pooled tiles [R, p] behind the exact tokens."""
    assert tiled.k_mean is not None
    assert tiled.v_mean is not None
    for exact, mean, columns in (
        (room.k_exact, tiled.k_mean, room.k_columns),
        (room.v_exact, tiled.v_mean, room.v_columns),
    ):
        means = mean[room.lanes].index_select(1, pooled.flatten()).view(columns.shape[0], pooled.shape[1], -1)
        torch.cat([exact, means], 1, out=columns)


def _weigh(tiled: Tiled, pooled: Tensor, room: _Room) -> Tensor:
    """Weigh the pooled columns by their tiles' lengths, in place; returns the rows' new sums [L * R, block_q]."""
    assert tiled.length is not None
    weight = tiled.length[pooled % tiled.key_tiles].to(room.p.dtype)[None, :, None]
    room.p.unflatten(0, (-1, room.rows))[..., room.tokens :].mul_(weight)
    return room.p.sum(-1, dtype=wide_dtype(room.p.dtype))
