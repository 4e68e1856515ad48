"""The torch backend's hot loops, for calls without masks and decay; all buffers stay in a core's cache.

Rows with many columns are taken one by one and in parts, short ones in batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel_kernels.schedule import Unit
from dit_accel_kernels.tiled import Tiled, wide_dtype

GPU_LANES = 256  # batches of a GPU are this many times larger
PART_BYTES = 1 << 20  # logits of one block row of a lane; longer rows are cut into parts
SCORES_BYTES = 512 << 10  # logits of one batch, a thread
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
    by_row = steps(tiled, _parts(tiled, unit)[0], torch.get_num_threads()) == (1, 1) and out.shape[0] == 1
    simple = len(_parts(tiled, unit)) == 1 and not unit.pooled.shape[1]
    if by_row and (simple or out.dtype == wide_dtype(out.dtype)):
        _long_rows(tiled, unit, lanes.start, buffers, out[0], None if lse is None else lse[0])
    else:
        _batches(tiled, unit, lanes, buffers, out, lse)


def _long_rows(
    tiled: Tiled, unit: Unit, lane: int, buffers: dict[str, Tensor], out: Tensor, lse: Tensor | None
) -> None:
    """Block rows of one lane one by one, with as few operations as can be: workers queue for Python at each of them."""
    q_rows, out_rows = tiled.q[lane].unbind(0), out.unbind(0)
    lse_rows = None if lse is None else lse.unbind(0)
    count, pooled = unit.exact.shape[1], unit.pooled.shape[1]
    cuts = len(_parts(tiled, unit))
    cuts = 1 if cuts == 1 else min(count, 2 * cuts)  # halves fit the cache beside their keys
    parts = [
        _Columns(tiled, lane, picks, unit.tail and number == cuts - 1, buffers)
        for number, picks in enumerate(unit.exact.tensor_split(cuts, 1) if count else ())
    ]
    if pooled:
        parts.append(_Columns(tiled, lane, unit.pooled, False, buffers, pooled=True))
    for number, row in enumerate(unit.rows.tolist()):
        q, result = q_rows[row], out_rows[row]
        if len(parts) == 1 and not pooled:
            found = parts[0].attend(number, q, result, need_lse=lse is not None)
        else:
            found = _add_up(parts, number, q, result)
        if lse_rows is not None and found is not None:
            lse_rows[row].copy_(found)


def _add_up(parts: list[_Columns], number: int, q: Tensor, result: Tensor) -> Tensor:
    """Attention of one block row over all its parts, left in `result`; returns its LSE.

    The exponentials are taken relative to the first part's maximum, which is exact unless one overflows; only then the
    maximum of all parts is taken first.
    """
    peak = parts[0].logits(number, q).amax(-1, keepdim=True)
    total = _sum_relative(parts, number, q, result, peak)
    if not math.isfinite(total.sum()):
        for part in parts[1:]:
            peak = torch.maximum(peak, part.logits(number, q).amax(-1, keepdim=True))
        parts[0].logits(number, q)
        total = _sum_relative(parts, number, q, result, peak)
    result.div_(total)
    return peak.add_(total.log_())[:, 0]


def _sum_relative(parts: list[_Columns], number: int, q: Tensor, result: Tensor, peak: Tensor) -> Tensor:
    """Sum e^(x - peak) [block_q, 1] over all parts; `result` gets the weighted sum. The first part has its logits."""
    total = None
    for part in parts:
        logits = part.room if total is None else part.logits(number, q)
        p = logits.sub_(peak).exp_()
        if part.lengths is not None:
            p.mul_(part.lengths[number])
        if total is None:
            total = p.sum(-1, keepdim=True)
            torch.mm(p, part.load_v(number), out=result)
        else:
            total += p.sum(-1, keepdim=True)
            result.addmm_(p, part.load_v(number))
    assert total is not None
    return total


class _Columns:
    """One part of the columns of block rows: exact tokens or pooled tiles, picked by `picks` [R, n]; reuses buffers."""

    def __init__(
        self, tiled: Tiled, lane: int, picks: Tensor, tail: bool, buffers: dict[str, Tensor], *, pooled: bool = False
    ) -> None:
        block, dim = tiled.k.shape[2:]
        self.picks, self.scale, self.lengths = picks.unbind(0), tiled.scale, None
        k, v, shape = tiled.k, tiled.v, (picks.shape[1], block, dim)
        if pooled:
            assert tiled.k_mean is not None
            assert tiled.v_mean is not None
            assert tiled.length is not None
            k, v, shape = tiled.k_mean, tiled.v_mean, (picks.shape[1], dim)
            self.lengths = tiled.length[picks % tiled.key_tiles].to(k.dtype).unbind(0)
        self.from_k, self.from_v = k[lane], v[lane]
        self.k, self.v = (_buffer(buffers, name, tiled.q, shape) for name in ("k", "v"))
        tokens = self.k.numel() // dim - (tiled.tail if tail else 0)
        self.k_columns, self.v_columns = (x.view(-1, dim)[:tokens] for x in (self.k, self.v))
        self.room, self.p = (_buffer(buffers, n, tiled.q, (tiled.q.shape[2], tokens)) for n in ("logits", "p"))

    def logits(self, number: int, q: Tensor) -> Tensor:
        """Scaled logits [block_q, C] of one block row, left in `room`."""
        torch.index_select(self.from_k, 0, self.picks[number], out=self.k)
        return torch.addmm(self.room, q, self.k_columns.mT, beta=0, alpha=self.scale, out=self.room)

    def load_v(self, number: int) -> Tensor:
        """The values [C, D] of one block row."""
        torch.index_select(self.from_v, 0, self.picks[number], out=self.v)
        return self.v_columns

    def attend(self, number: int, q: Tensor, result: Tensor, *, need_lse: bool) -> Tensor | None:
        """Attention of one block row over this part alone, left in `result`; returns its LSE [block_q] if needed."""
        torch.softmax(self.logits(number, q), -1, out=self.p)
        torch.mm(self.p, self.load_v(number), out=result)
        return _lse_of(self.room, self.p) if need_lse else None


def _lse_of(logits: Tensor, p: Tensor) -> Tensor:
    """log sum e^x = max x - log max p: two cheap passes where a logsumexp would repeat the softmax."""
    wide = wide_dtype(p.dtype)
    return logits.amax(-1).to(wide) - p.amax(-1).to(wide).log()


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
    room = max(1, PART_BYTES // (tiled.q.element_size() * tiled.q.shape[2] * tiled.k.shape[2]))
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
            return _buffer(buffers, name, tiled.q, shape)

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


def _buffer(buffers: dict[str, Tensor], name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of a reused flat buffer; grown when too small."""
    size = math.prod(shape)
    if name not in buffers or buffers[name].numel() < size:
        buffers[name] = like.new_empty(size)
    return buffers[name][:size].view(shape)
