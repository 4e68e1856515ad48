"""The torch backend: block rows with about equally long lists are gathered and batched; O(S) memory, every feature.

The usual call goes to plain.py, calls with masks or decay take the plainer code here. A selection is turned into
lists of every batch and head first, and nothing of one call's lists is remembered. Gathering costs a few per cent of
the products; bench/block_sparse.py times the other ways to write it (all heads at once, one product a tile without a
gather, SDPA on gathered tiles, FlexAttention), bench/selection.py what selections cost. The gradient is in backward.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel_kernels.backends.torch.plain import GPU_GROUPS, attend_plain
from dit_accel_kernels.backends.torch.schedule import Unit
from dit_accel_kernels.backends.torch.tiled import Tiled, cut, units_of
from dit_accel_kernels.backends.torch.workers import run_all, worker_threads
from dit_accel_kernels.features import wide_dtype
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.selection import LOG2_E
from dit_accel_kernels.states import resolved
from dit_accel_kernels.votes import Tally

SCORES_BYTES = 512 << 10  # logits of one batch with masks or decay, a thread


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


def attend(problem: Problem, *, need_lse: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q] (empty where not needed), exact tiles, kept bits."""
    exact = tally = None
    selects = problem.selection is not None
    if problem.selection is not None:
        tally = None if problem.selection.vote is None else Tally(problem)
        problem, exact = resolved(problem)
    tiled = cut(problem)
    out = torch.zeros_like(tiled.q)  # block rows without a tile give 0
    lse = tiled.q.new_full(tiled.q.shape[:-1] if need_lse else (0,), -torch.inf, dtype=wide_dtype(out.dtype))
    if tiled.bias is None and tiled.t is None:
        attend_plain(problem, tiled, out, lse if need_lse else None, tally, remember=not selects)
    else:
        workers, threads = worker_threads(tiled.q.device)

        def work(piece: tuple[Unit, slice], _: dict[str, Tensor]) -> None:
            unit, lanes = piece
            part, part_lse = attend_operands(
                gather(tiled, unit, lanes), need_lse=need_lse, settle=settling(tiled, unit, tally)
            )
            out[lanes].index_copy_(1, unit.rows, part)
            if part_lse is not None:
                lse[lanes].index_copy_(1, unit.rows, part_lse)

        run_all(work, chunks(tiled, units_of(problem, remember=not selects), threads), workers)
    shape = (*problem.q.shape[:2], -1)
    tokens = problem.q.shape[2]
    out = out.view(*shape, out.shape[-1])[:, :, :tokens]
    kept = None if tally is None else tally.kept()
    return out, lse.view(*shape)[:, :, :tokens] if need_lse else lse, exact, kept


def chunks(tiled: Tiled, units: list[Unit], threads: int) -> Iterator[tuple[Unit, slice]]:
    """Units cut into batches for so many torch threads: SCORES_BYTES of logits for each, or a block row of a lane."""
    lanes, _, block_q, _ = tiled.q.shape
    batches = threads if tiled.q.device.type == "cpu" else GPU_GROUPS
    for unit in units:
        columns = unit.exact.shape[1] * tiled.k.shape[2] + unit.pooled.shape[1]
        room = batches * max(1, SCORES_BYTES // (tiled.q.element_size() * block_q * columns))
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


def attend_operands(
    x: Operands, *, need_lse: bool, settle: Callable[[Tensor, Tensor], None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of gathered operands: output [N, R, block_q, D] and LSE [N, R, block_q] or None.

    `settle` is called with the logits and the softmax, [N, R, block_q, C].
    """
    logits, dead = logits_of(raw_logits(x), x)
    p = torch.softmax(logits, -1)
    if settle is not None:
        settle(logits, p)
    out = p.to(x.q.dtype) @ x.v
    lse = torch.logsumexp(logits, -1) if need_lse else None
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
        lse = None if lse is None else lse.masked_fill(dead[..., 0], -torch.inf)
    return out, lse


def settling(tiled: Tiled, unit: Unit, tally: Tally | None) -> Callable[[Tensor, Tensor], None] | None:
    """What settles the votes of a unit's block rows, from their logits and softmax."""
    if tally is None or not unit.exact.shape[1]:
        return None

    def settle(logits: Tensor, p: Tensor) -> None:
        count, block = unit.exact.shape[1], tiled.k.shape[2]
        x = (p if tally.by_mass else logits)[0, :, :, : count * block - (tiled.tail if unit.tail else 0)]
        x = torch.nn.functional.pad(x, (0, count * block - x.shape[-1]), value=0.0 if tally.by_mass else -torch.inf)
        x = x.unflatten(-1, (count, block))
        found = x.sum(-1) if tally.by_mass else x.amax(-1) * LOG2_E
        tally.settle(unit.rows, unit.exact % tiled.key_tiles, found.permute(2, 0, 1))

    return settle
