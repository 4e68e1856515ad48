"""The torch backend: block rows with equally long lists are gathered and batched; O(S) memory, every feature.

The hot loop takes one block row of one lane (or as many as fit `SCORES_BYTES` a thread) at a time: gather its key and value tiles,
one product, one softmax, one product, all in buffers that stay in a core's cache. On a CPU, gathering costs a few per cent of the
products, and this order beat batching all heads at once, per-tile products without a gather, flash-style chunks of keys, and SDPA
on gathered tiles (bench/block_sparse.py prints them beside each other). The gradient is in backward.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel_kernels.features import Problem, decay_by_frame, tile_means
from dit_accel_kernels.schedule import Unit, schedule

GPU_LANES = 256  # batches of a GPU are this many times larger
SCORES_BYTES = 512 << 10  # logits of one batch, a thread


@dataclass(slots=True)
class Tiled:
    """The problem cut into tiles for batched products: N lanes of R block rows that all read the same lists.

    Shared lists: N = B*H lanes, R = NQ. Per-head lists: one lane, R = B*H*NQ, tile numbers shifted by head. Queries are scaled.
    `bias` is float32 [N, tiles, block_k], 0 or -inf, or None; `log_length` float32 [N or 1, tiles]; `t` [F + 2, NK, block_k].
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


def attend(problem: Problem, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Output [B, H, S_q, D] and natural-log LSE float32 [B, H, S_q] (empty where not needed)."""
    tiled = cut(problem)
    out = torch.zeros_like(tiled.q)
    lse = tiled.q.new_full(tiled.q.shape[:-1] if need_lse else (0,), -torch.inf, dtype=wide_dtype(out.dtype))
    buffers: dict[str, Tensor] = {}
    for unit, lanes in chunks(tiled, units_of(problem)):
        if tiled.bias is None and tiled.t is None:
            part, part_lse = _attend_plain(tiled, unit, lanes, buffers, need_lse=need_lse)
        else:
            part, part_lse = attend_operands(gather(tiled, unit, lanes), need_lse=need_lse)
        out[lanes].index_copy_(1, unit.rows, part)
        if part_lse is not None:
            lse[lanes].index_copy_(1, unit.rows, part_lse)
    shape = (*problem.q.shape[:2], -1)
    tokens = problem.q.shape[2]
    out = out.view(*shape, out.shape[-1])[:, :, :tokens]
    return out, lse.view(*shape)[:, :, :tokens] if need_lse else lse


def _attend_plain(
    tiled: Tiled, unit: Unit, lanes: slice, buffers: dict[str, Tensor], *, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of one batch without masks and decay, in reused buffers; pooled columns are weighed after the softmax."""
    rows, exact = unit.exact.shape
    pooled, count = unit.pooled.shape[1], lanes.stop - lanes.start
    block, dim = tiled.k.shape[2:]
    columns = exact * block - (tiled.tail if unit.tail else 0)

    def pick(name: str, x: Tensor, mean: Tensor | None) -> Tensor:
        if pooled == 0 or mean is None:
            tokens = _buffer(buffers, name, x, (count, rows * exact, block, dim))
            torch.index_select(x[lanes], 1, unit.exact.view(-1), out=tokens)
            return tokens.view(count * rows, exact * block, dim)[:, :columns]
        tokens = _buffer(buffers, name, x, (count, rows, columns + pooled, dim))
        for row in range(rows):
            picked = x[lanes].index_select(1, unit.exact[row]).view(count, exact * block, dim)
            tokens[:, row, :columns] = picked[:, :columns]
            tokens[:, row, columns:] = mean[lanes].index_select(1, unit.pooled[row])
        return tokens.view(count * rows, columns + pooled, dim)

    k, v = pick("k", tiled.k, tiled.k_mean), pick("v", tiled.v, tiled.v_mean)
    q = tiled.q[lanes].index_select(1, unit.rows).flatten(0, 1)
    shape = (q.shape[0], q.shape[1], columns + pooled)
    logits, p = _buffer(buffers, "logits", q, shape), _buffer(buffers, "p", q, shape)
    torch.bmm(q, k.mT, out=logits)
    torch.softmax(logits, -1, out=p)
    total = None
    if pooled and tiled.length is not None:
        p[..., columns:] *= tiled.length[unit.pooled % tiled.key_tiles][:, None].repeat(count, 1, 1).to(p.dtype)
        total = p.sum(-1, keepdim=True, dtype=wide_dtype(p.dtype))
    out = torch.bmm(p, v)
    lse = torch.logsumexp(logits.to(wide_dtype(q.dtype)), -1, keepdim=True) if need_lse else None
    if total is not None:
        out = (out / total).to(out.dtype)
        lse = None if lse is None else lse + total.log()
    return out.unflatten(0, (count, rows)), None if lse is None else lse.view(count, rows, -1)


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
    )


def cut(problem: Problem) -> Tiled:
    """Pad to whole tiles, scale the queries, lay lanes out for the lists' sharing, and pool where a list asks for it."""
    q, k, v, valid = problem.q, problem.k, problem.v, problem.key_valid
    scale: float | Tensor = problem.logit_scale
    if problem.head_scale is not None:
        scale = scale * problem.head_scale[:, :, None, None]
    q = (q * scale).to(q.dtype)
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
        key_tiles=problem.key_tiles,
        tail=problem.key_tiles * problem.block_k - k.shape[2],
    )


def _tiles(x: Tensor, block: int) -> Tensor:
    """[..., S, D] as contiguous [..., tiles, block, D], zero-padded in the last tile."""
    pad = -x.shape[-2] % block
    if pad:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad))
    return x.contiguous().unflatten(-2, (-1, block))


def chunks(tiled: Tiled, units: list[Unit]) -> Iterator[tuple[Unit, slice]]:
    """Units cut so that one batch of logits stays within SCORES_BYTES a thread (at least one block row of a lane each)."""
    threads = torch.get_num_threads() if tiled.q.device.type == "cpu" else GPU_LANES
    lanes, _, block_q, _ = tiled.q.shape
    for unit in units:
        columns = unit.exact.shape[1] * tiled.k.shape[2] + unit.pooled.shape[1]
        room = threads * max(1, SCORES_BYTES // (tiled.q.element_size() * block_q * columns))
        lane_step = min(lanes, room)
        row_step = max(1, room // lane_step)
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
        tiled.q[lanes].index_select(1, unit.rows), pick(tiled.k, tiled.k_mean), pick(tiled.v, tiled.v_mean), bias, t
    )


def logits_of(raw: Tensor, x: Operands) -> tuple[Tensor, Tensor | None]:
    """Final logits from raw scores, decayed, masked and weighed, and which rows have no key (bool [..., 1], or None)."""
    wide = wide_dtype(raw.dtype)
    logits = raw
    if x.t is not None:
        logits = logits.to(wide)
        logits = torch.minimum(logits, logits * x.t)
    if x.bias is None:
        return logits, None
    logits = logits.to(wide) + x.bias
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(dead, 0.0), dead


def attend_operands(x: Operands, *, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of gathered operands: output [N, R, block_q, D] and LSE [N, R, block_q] or None."""
    logits, dead = logits_of(x.q @ x.k.mT, x)
    out = torch.softmax(logits, -1).to(x.q.dtype) @ x.v
    lse = torch.logsumexp(logits.to(wide_dtype(logits.dtype)), -1) if need_lse else None
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
        lse = None if lse is None else lse.masked_fill(dead[..., 0], -torch.inf)
    return out, lse
