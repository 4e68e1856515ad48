"""The torch backend: block rows with equally long lists are gathered and batched; O(S) memory, every feature.

The hot loop takes one block row of one lane (or as many as fit `SCORES_BYTES`) at a time: gather its key and value
tiles, one product, one softmax, one product, all in buffers that stay in a core's cache; on a CPU every core runs this
loop on block rows of its own (workers.py). Gathering costs a few per cent of the products; bench/block_sparse.py times
the other ways to write it (all heads at once, one product a tile without a gather, SDPA on gathered tiles,
FlexAttention). The gradient is in backward.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel_kernels.features import Problem, decay_by_frame, tile_means
from dit_accel_kernels.schedule import Unit, schedule
from dit_accel_kernels.workers import run_all, worker_threads

GPU_LANES = 256  # batches of a GPU are this many times larger
PART_BYTES = 1 << 20  # logits of one block row of a lane; longer rows are cut into parts and joined by their LSE
SCORES_BYTES = 512 << 10  # logits of one batch, a thread
RUNS = 4  # pieces of a worker, so that all end together


@dataclass(slots=True)
class Tiled:
    """The problem cut into tiles for batched products: N lanes of R block rows that all read the same lists.

    Shared lists: N = B*H lanes, R = NQ. Per-head lists: one lane, R = B*H*NQ, tile numbers shifted by head. Queries
    hold the per-head scale, `scale` is still to be applied. `bias` is float32 [N, tiles, block_k], 0 or -inf, or None;
    `log_length` float32 [N or 1, tiles]; `t` [F + 2, NK, block_k].
    """

    q: Tensor  # [N, R, block_q, D]
    k: Tensor  # [N, tiles, block_k, D]
    v: Tensor
    bias: Tensor | None
    k_mean: Tensor | None  # [N, tiles, D]
    v_mean: Tensor | None
    log_length: Tensor | None
    length: Tensor | None  # [NK], where every lane has the same
    t: Tensor | None
    t_mean: Tensor | None  # [F + 2, NK]
    t_rows: Tensor | None  # int64 [NQ, block_q]
    scale: float
    key_tiles: int
    tail: int  # padded tokens in the last key tile


@dataclass(slots=True)
class Operands:
    """What one batched product needs: q [N, R, block_q, D]; k, v [N, R, C, D] of exact columns, then pooled ones.

    `bias` float32 [N or 1, R, 1, C] and `t` float32 [R, block_q, C] or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    t: Tensor | None
    scale: float


def attend(problem: Problem, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Output [B, H, S_q, D] and natural-log LSE float32 [B, H, S_q] (empty where not needed)."""
    tiled = cut(problem)
    units = units_of(problem)
    complete = sum(unit.rows.numel() for unit in units) == tiled.q.shape[1]
    out = torch.empty_like(tiled.q) if complete else torch.zeros_like(tiled.q)  # block rows without a tile give 0
    lse = tiled.q.new_full(tiled.q.shape[:-1] if need_lse else (0,), -torch.inf, dtype=wide_dtype(out.dtype))
    plain = tiled.bias is None and tiled.t is None
    workers, threads = worker_threads(out.device)

    def work(piece: tuple[Unit, slice], buffers: dict[str, Tensor]) -> None:
        unit, lanes = piece
        if plain:
            _plain_unit(tiled, unit, lanes, buffers, out[lanes], lse[lanes] if need_lse else None)
            return
        part, part_lse = attend_operands(gather(tiled, unit, lanes), need_lse=need_lse)
        out[lanes].index_copy_(1, unit.rows, part)
        if part_lse is not None:
            lse[lanes].index_copy_(1, unit.rows, part_lse)

    pieces = _plain_pieces(tiled, units, workers) if plain else chunks(tiled, units, threads)
    run_all(work, pieces, workers)
    shape = (*problem.q.shape[:2], -1)
    tokens = problem.q.shape[2]
    out = out.view(*shape, out.shape[-1])[:, :, :tokens]
    return out, lse.view(*shape)[:, :, :tokens] if need_lse else lse


def _plain_pieces(tiled: Tiled, units: list[Unit], workers: int) -> Iterator[tuple[Unit, slice]]:
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


def _plain_unit(
    tiled: Tiled, unit: Unit, lanes: slice, buffers: dict[str, Tensor], out: Tensor, lse: Tensor | None
) -> None:
    """One piece without masks and decay: the hot loop, which makes no view and no buffer it made before.

    `out` and `lse` are the lanes' own part.
    """
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
            found = _plain_batch(tiled, part, rows, room, need_lse=lse is not None or len(parts) > 1)
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


def _plain_batch(tiled: Tiled, part: Unit, rows: slice, room: _Room, *, need_lse: bool) -> Tensor | None:
    """Attention of some block rows over one part, left in `room.out`; returns its LSE [L * R, block_q] if needed."""
    exact, pooled = part.exact[rows].flatten(), part.pooled[rows]
    torch.index_select(room.from_q, 1, part.rows[rows], out=room.q)
    torch.index_select(room.from_k, 1, exact, out=room.k)
    torch.index_select(room.from_v, 1, exact, out=room.v)
    if pooled.shape[1]:
        _append_means(tiled, pooled, room)
    torch.baddbmm(room.logits, room.q_batch, room.k_columns.mT, beta=0, alpha=tiled.scale, out=room.logits)
    torch.softmax(room.logits, -1, out=room.p)
    lse = None
    if need_lse:  # log sum e^x = max x - log max p: two cheap passes where a logsumexp would repeat the softmax
        wide = wide_dtype(room.p.dtype)
        lse = room.logits.amax(-1).to(wide) - room.p.amax(-1).to(wide).log()
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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def units_of(problem: Problem) -> list[Unit]:
    """The schedule of this problem's lists, from the cache."""
    batch, heads, key_heads = problem.q.shape[0], problem.q.shape[1], problem.k.shape[1]
    lanes = [0]
    if problem.exact_offsets.shape[0] > 1:
        lanes = [b * key_heads + h * key_heads // heads for b in range(batch) for h in range(heads)]
    return schedule(
        (problem.exact_offsets, problem.exact_indices),
        (problem.pooled_offsets, problem.pooled_indices),
        problem.key_tiles,
        lanes,
        problem.k.shape[2] % problem.block_k > 0,
    )


def cut(problem: Problem) -> Tiled:
    """Pad to whole tiles, apply the head scale, lay lanes out as the lists are shared, pool if a list asks for it."""
    q, k, v, valid = problem.q, problem.k, problem.v, problem.key_valid
    if problem.head_scale is not None:
        q = (q * problem.head_scale[:, :, None, None]).to(q.dtype)
    if valid is not None:
        k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
    weight = None if valid is None else valid[:, None].expand(-1, k.shape[1], -1)
    shared = problem.exact_offsets.shape[0] == 1
    repeat = q.shape[1] // k.shape[1]

    def lanes(x: Tensor) -> Tensor:
        x = x.repeat_interleave(repeat, 1) if shared and repeat > 1 else x
        return x.flatten(0, 1) if shared else x.flatten(0, 2)[None]

    k_mean = v_mean = log_length = same_length = None
    if problem.pooled_indices is not None:
        k_mean, length = tile_means(k, problem.block_k, weight)
        v_mean, _ = tile_means(v, problem.block_k, weight)
        same_length = length if weight is None else None
        log_length = lanes(length.expand(k_mean.shape[:-1]).log().to(wide_dtype(q.dtype)))
        k_mean, v_mean = lanes(k_mean), lanes(v_mean)
    bias = None
    if weight is not None:
        bias = torch.zeros(weight.shape, device=q.device).masked_fill(~weight, -torch.inf)
        bias = lanes(_tiles(bias[..., None], problem.block_k)[..., 0])
    t = t_mean = t_rows = None
    if problem.decay is not None:
        flat, rows = decay_by_frame(*problem.decay)
        t_mean = tile_means(flat[..., None], problem.block_k, None)[0][..., 0]
        t = _tiles(flat[..., None], problem.block_k)[..., 0]
        t_rows = _tiles(rows[:, None], problem.block_q)[..., 0]
    tiled_q, tiled_k, tiled_v = _tiles(q, problem.block_q), _tiles(k, problem.block_k), _tiles(v, problem.block_k)
    return Tiled(
        q=tiled_q.flatten(0, 1) if shared else tiled_q.flatten(0, 2)[None],
        k=lanes(tiled_k),
        v=lanes(tiled_v),
        bias=bias,
        k_mean=k_mean,
        v_mean=v_mean,
        log_length=log_length,
        length=same_length,
        t=t,
        t_mean=t_mean,
        t_rows=t_rows,
        scale=problem.logit_scale,
        key_tiles=problem.key_tiles,
        tail=problem.key_tiles * problem.block_k - k.shape[2],
    )


def _tiles(x: Tensor, block: int) -> Tensor:
    """[..., S, D] as contiguous [..., tiles, block, D], zero-padded in the last tile."""
    pad = -x.shape[-2] % block
    if pad:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad))
    return x.contiguous().unflatten(-2, (-1, block))


def steps(tiled: Tiled, unit: Unit, threads: int) -> tuple[int, int]:
    """Lanes and block rows of one batch: logits within SCORES_BYTES a thread, and one block row of a lane at least."""
    lanes, _, block_q, _ = tiled.q.shape
    columns = unit.exact.shape[1] * tiled.k.shape[2] + unit.pooled.shape[1]
    threads = threads if tiled.q.device.type == "cpu" else GPU_LANES
    room = threads * max(1, SCORES_BYTES // (tiled.q.element_size() * block_q * columns))
    lane_step = min(lanes, room)
    return lane_step, max(1, room // lane_step)


def chunks(tiled: Tiled, units: list[Unit], threads: int) -> Iterator[tuple[Unit, slice]]:
    """Units cut into batches for so many torch threads."""
    lanes = tiled.q.shape[0]
    for unit in units:
        lane_step, row_step = steps(tiled, unit, threads)
        for start in range(0, unit.rows.numel(), row_step):
            part = slice(start, start + row_step)
            piece = Unit(unit.rows[part], unit.exact[part], unit.pooled[part], unit.tail)
            for lane in range(0, lanes, lane_step):
                yield piece, slice(lane, min(lane + lane_step, lanes))


def gather(tiled: Tiled, unit: Unit, lanes: slice) -> Operands:
    """Copy the tiles one unit needs next to each other; the ragged tail is cut off, never masked."""
    rows, exact = unit.exact.shape
    pooled = unit.pooled.shape[1]
    columns = exact * tiled.k.shape[2] - (tiled.tail if unit.tail else 0)

    def pick(x: Tensor, mean: Tensor | None) -> Tensor:
        tokens = x[lanes].index_select(1, unit.exact.flatten()).unflatten(1, (rows, exact)).flatten(2, 3)
        tokens = tokens[:, :, :columns]
        if pooled == 0 or mean is None:
            return tokens
        means = mean[lanes].index_select(1, unit.pooled.flatten()).unflatten(1, (rows, pooled))
        return torch.cat([tokens, means], 2)

    bias = t = None
    if tiled.bias is not None or pooled:
        none = tiled.q.new_zeros(1, 1, 1, dtype=torch.float32).expand(
            lanes.stop - lanes.start, tiled.k.shape[1], tiled.k.shape[2]
        )
        bias = none if tiled.bias is None else tiled.bias[lanes]
        length = None if tiled.log_length is None else tiled.log_length[lanes]
        bias = bias.index_select(1, unit.exact.flatten()).unflatten(1, (rows, exact)).flatten(2, 3)[:, :, :columns]
        if pooled and length is not None:
            bias = torch.cat([bias, length.index_select(1, unit.pooled.flatten()).unflatten(1, (rows, pooled))], 2)
        bias = bias[:, :, None]
    if tiled.t is not None and tiled.t_mean is not None and tiled.t_rows is not None:
        by_frame = tiled.t.index_select(1, unit.exact.flatten() % tiled.key_tiles).unflatten(1, (rows, exact))
        by_frame = by_frame.flatten(2, 3)[:, :, :columns]
        means = tiled.t_mean.index_select(1, unit.pooled.flatten() % tiled.key_tiles).unflatten(1, (rows, pooled))
        frames = tiled.t_rows[unit.rows % tiled.t_rows.shape[0]]
        t = torch.cat([by_frame, means], 2)[frames, torch.arange(rows, device=frames.device)[:, None]]
    return Operands(
        tiled.q[lanes].index_select(1, unit.rows),
        pick(tiled.k, tiled.k_mean),
        pick(tiled.v, tiled.v_mean),
        bias,
        t,
        tiled.scale,
    )


def raw_logits(x: Operands) -> Tensor:
    """Scaled products of queries and keys, in the wide dtype."""
    return (x.q @ x.k.mT).to(wide_dtype(x.q.dtype)) * x.scale


def logits_of(raw: Tensor, x: Operands) -> tuple[Tensor, Tensor | None]:
    """Final logits from raw ones, decayed, masked and weighed, and which rows have no key (bool [..., 1], or None)."""
    logits = raw if x.t is None else torch.minimum(raw, raw * x.t)
    if x.bias is None:
        return logits, None
    logits = logits + x.bias
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(dead, 0.0), dead


def attend_operands(x: Operands, *, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of gathered operands: output [N, R, block_q, D] and LSE [N, R, block_q] or None."""
    logits, dead = logits_of(raw_logits(x), x)
    out = torch.softmax(logits, -1).to(x.q.dtype) @ x.v
    lse = torch.logsumexp(logits, -1) if need_lse else None
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
        lse = None if lse is None else lse.masked_fill(dead[..., 0], -torch.inf)
    return out, lse
