"""The torch backend's work for calls without masks and decay: groups of block rows, few operations for each.

Gather key and value tiles, one batched product, a softmax, one batched product; votes get the largest logit or the mass
of every query in every tile while these are there, and are settled for many rows at once. Long calls are shared by
workers, group by group. Short ones leave the cores to torch, which waits for its threads for milliseconds at every call
that wants them otherwise, and are all the shorter the fewer operations they take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel_kernels.backends.torch.schedule import Group, GroupSize, Portion
from dit_accel_kernels.backends.torch.tiled import Tiled, portions_of
from dit_accel_kernels.backends.torch.workers import buffer, own_buffers, run_all, worker_threads
from dit_accel_kernels.features import wide_dtype
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.selection import LOG2_E
from dit_accel_kernels.votes import Tally

GROUP_BYTES = 2 << 20  # logits of one group, a thread: more would leave the caches
GPU_GROUPS = 256  # a GPU's groups are this many times larger
WORKERS_FLOPS = 5e9  # of a call, a thread, from which on workers pay
FOUND_BYTES = 16 << 20  # what votes are kept in until they are settled


def attend_plain(
    problem: Problem, tiled: Tiled, out: Tensor, lse: Tensor | None, tally: Tally | None, *, remember: bool
) -> None:
    """Attention of all block rows into `out` [N, R, block_q, D] and `lse` [N, R, block_q], and their votes.

    Rows without a tile are left as they are.
    """
    workers, size = _shares(problem, tiled)
    out, lse = out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)
    for portion in portions_of(problem, size, remember=remember):
        work = _Work(tiled, portion, tally, need_lse=lse is not None)
        run_all(work.attend, portion.groups, workers)
        out.index_copy_(0, portion.rows, work.out)
        if lse is not None and work.lse is not None:
            lse.index_copy_(0, portion.rows, work.lse)
        if tally is not None and work.found is not None:
            work.settle(tally)


def _shares(problem: Problem, tiled: Tiled) -> tuple[int, GroupSize]:
    """How many workers a call is shared by, and how large groups and portions are."""
    block_q, threads = problem.block_q, torch.get_num_threads()
    columns, tiles = GROUP_BYTES // (block_q * tiled.q.element_size()), FOUND_BYTES // (block_q * 4)
    if tiled.q.device.type != "cpu":
        return 1, GroupSize(columns * GPU_GROUPS, 1, tiles)
    repeats = problem.q.shape[0] * problem.q.shape[1] // problem.exact_offsets.shape[0]
    logits = problem.exact_indices.numel() * problem.block_k * block_q * repeats
    if 4 * problem.q.shape[3] * logits >= WORKERS_FLOPS * threads:
        workers, each = worker_threads(tiled.q.device)
        return workers, GroupSize(columns * each, each, tiles)
    return 1, GroupSize(columns * threads, threads, tiles)  # as many rows for each thread stay in its own cache


class _Work:
    """One portion: its queries and what is found for them in its order, `out` [P, block_q, D] and `lse` [P, block_q].

    `found` [n, P, block_q]: what votes want of every exact tile, -inf or 0 in padding.
    """

    def __init__(self, tiled: Tiled, portion: Portion, tally: Tally | None, *, need_lse: bool) -> None:
        self.tiled, self.portion, self.tally = tiled, portion, tally
        self.wide = wide_dtype(tiled.q.dtype)
        self.k, self.v = tiled.k.flatten(0, 1), tiled.v.flatten(0, 1)
        buffers = own_buffers()
        self.q = taken(tiled.q.flatten(0, 1), portion.rows, buffers, "queries")
        self.out = buffer(buffers, "outputs", self.q, tuple(self.q.shape), self.q.dtype)
        self.lse = self.q.new_empty(self.q.shape[:2], dtype=self.wide) if need_lse else None
        self.found = self.weights = self.k_mean = self.v_mean = None
        if portion.pooled.shape[1]:
            assert tiled.k_mean is not None
            assert tiled.v_mean is not None
            assert tiled.length is not None
            self.k_mean, self.v_mean = tiled.k_mean.flatten(0, 1), tiled.v_mean.flatten(0, 1)
            unit = 1.0 if tally is None else LOG2_E
            weights = (tiled.length.log() * unit).to(self.wide)[portion.pooled % tiled.key_tiles]
            self.weights = weights.masked_fill_(_from(weights.shape[1], portion.far), -torch.inf)
        if tally is not None and portion.exact.shape[1]:
            shape = (portion.exact.shape[1], *self.q.shape[:2])
            self.found = buffer(buffers, "found", self.q, shape, self.wide).fill_(0.0 if tally.by_mass else -torch.inf)

    def settle(self, tally: Tally) -> None:
        """Settle the votes."""
        assert self.found is not None
        tiles = self.portion.exact % self.tiled.key_tiles
        tiles.masked_fill_(_from(tiles.shape[1], self.portion.counts), tally.none)
        tally.settle(self.portion.rows, tiles, self.found)

    def attend(self, group: Group, buffers: dict[str, Tensor]) -> None:
        """One group of rows."""
        part, block, portion = slice(group.start, group.stop), self.k.shape[1], self.portion
        q, out = self.q[part], self.out[part]
        columns, exact = group.exact * block, portion.exact[part, : group.exact].flatten()
        if self.tally is None and group.least == group.most:
            columns = group.most  # all rows end with the ragged tile
        x = buffer(buffers, "products", q, (*q.shape[:2], columns + group.pooled), q.dtype)
        near, far = x[:, :, :columns], x[:, :, columns:]
        scale = self.tiled.scale if self.tally is None else self.tiled.scale * LOG2_E
        if group.exact:
            k = taken(self.k, exact, buffers, "tokens").view(len(q), -1, q.shape[2])[:, :columns]
            torch.baddbmm(near, q, k.mT, beta=0, alpha=scale, out=near)
        if group.pooled and self.k_mean is not None:
            pooled = portion.pooled[part, : group.pooled].flatten()
            means = taken(self.k_mean, pooled, buffers, "means").view(len(q), -1, q.shape[2])
            torch.baddbmm(far, q, means.mT, beta=0, alpha=scale, out=far)
        p = x
        if x.dtype != self.wide and (group.pooled or self.tally is not None):
            x = buffer(buffers, "wide", q, tuple(x.shape), self.wide).copy_(x)
        if group.least < columns:
            absent = _from(columns, portion.tokens[part], group.least)
            x[:, :, group.least : columns].masked_fill_(absent[:, None], -torch.inf)
        if self.weights is not None and group.pooled:
            x[:, :, columns:].add_(self.weights[part, None, : group.pooled])
        total = self._softmax(x, part) if self.tally is None else self._exponentials(x, columns, part)
        if p is not x:
            p.copy_(x if total is None else x.div_(total[:, :, None]))
        if group.exact:
            v = taken(self.v, exact, buffers, "tokens").view(len(q), -1, q.shape[2])[:, :columns]
            torch.bmm(p[:, :, :columns], v, out=out)
        else:
            out.zero_()
        if group.pooled and self.v_mean is not None:
            means = taken(self.v_mean, pooled, buffers, "means").view(len(q), -1, q.shape[2])
            out.baddbmm_(p[:, :, columns:], means)
        if total is not None and p is x:
            out.div_(total[:, :, None])

    def _softmax(self, x: Tensor, part: slice) -> None:
        """Logits to weights, in place."""
        peak = None if self.lse is None else x.amax(-1)
        torch.softmax(x, -1, out=x)
        if self.lse is not None and peak is not None:
            # log sum e^x = max x - log max p: two cheap passes where a logsumexp would repeat the softmax
            self.lse[part] = peak.to(self.wide) - x.amax(-1).to(self.wide).log()

    def _exponentials(self, x: Tensor, columns: int, part: slice) -> Tensor:
        """Logits in log2 units to exponentials, in place, with their sums returned, and what votes want of them."""
        tally, found = self.tally, None
        assert tally is not None
        near, far = x[:, :, :columns].unflatten(2, (-1, self.k.shape[1])), x[:, :, columns:]
        if columns and not tally.by_mass:
            found = near.amax(-1)
            peak = found.amax(-1, keepdim=True)
            if far.shape[2]:
                peak = torch.maximum(peak, far.amax(-1, keepdim=True))
        else:
            peak = x.amax(-1, keepdim=True)
        x.sub_(peak).exp2_()
        if columns and tally.by_mass:
            found = near.sum(-1)
            total = found.sum(-1) + far.sum(-1)
        else:
            total = x.sum(-1)
        if found is not None and self.found is not None:
            self.found[: found.shape[2], part] = found.permute(2, 0, 1)
        if self.lse is not None:
            torch.add(peak[:, :, 0] / LOG2_E, total.log(), out=self.lse[part])
        return total


def _from(columns: int, counts: Tensor, start: int = 0) -> Tensor:
    """Where columns, from `start` on, lie behind the `counts` [R] of their rows, bool [R, columns - start]."""
    return torch.arange(start, columns, device=counts.device) >= counts[:, None]


def taken(x: Tensor, index: Tensor, buffers: dict[str, Tensor], name: str) -> Tensor:
    """x[index] for a flat index, in a reused buffer."""
    return torch.index_select(x, 0, index, out=buffer(buffers, name, x, (len(index), *x.shape[1:]), x.dtype))
