"""The torch backend: query tiles that see about equally much are gathered and batched; O(S) memory, every feature.

On a CPU float32 runs in a compiled loop instead (fused.py), where there is a compiler. For all else,
a group of query tiles is a gather of key and value tiles, one batched product, a softmax, one batched product; masks,
decay and votes are applied while the logits are there, and votes are settled for many query tiles at once. Long calls
are shared by workers, group by group. Short ones leave the cores to torch, which waits for its threads for milliseconds
at every call that wants them otherwise, and are all the shorter the fewer operations they take. A selection is turned
into lists of every batch and head first, and nothing of one call's lists is remembered.

bench/block_sparse.py times the other ways to write it (all heads at once, one product a tile without a gather, SDPA on
gathered tiles, FlexAttention), bench/selection.py what selections cost. The gradient is in backward.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel_kernels.backends.torch import fused
from dit_accel_kernels.backends.torch.memory import cast
from dit_accel_kernels.backends.torch.schedule import Group, GroupSize, Portion
from dit_accel_kernels.backends.torch.tiled import Tiled, cut, portions_of
from dit_accel_kernels.backends.torch.workers import buffer, own_buffers, run_all, worker_threads
from dit_accel_kernels.features import product_dtype, wide_dtype
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.selection import LOG2_E
from dit_accel_kernels.states import resolved
from dit_accel_kernels.votes import FOUND_BYTES, Tally

GROUP_BYTES = 2 << 20  # logits of one group, a thread: more would leave the caches
GPU_GROUPS = 256  # a GPU's groups are this many times larger
WORKERS_FLOPS = 5e9  # of a call, a thread, from which on workers pay


def attend(problem: Problem, *, need_lse: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q] (empty where not needed), exact tiles, kept bits."""
    exact, tally, selects = None, Tally(problem) if problem.votes else None, problem.selection is not None
    if selects:
        problem, exact = resolved(problem)
    loop = fused.runs(problem)
    tiled = cut(problem, held=loop and problem.q.dtype == torch.bfloat16)
    if loop:
        out, lse = fused.attend(problem, tiled, tally, need_lse=need_lse)
        return *_whole(problem, out, lse, need_lse=need_lse), exact, None if tally is None else tally.kept()
    out = torch.zeros_like(tiled.q)  # query tiles that see nothing give 0
    lse = tiled.q.new_full(tiled.q.shape[:-1] if need_lse else (0,), -torch.inf, dtype=wide_dtype(out.dtype))
    workers, size = shares(problem)
    for portion in portions_of(problem, size, remember=not selects):
        work = _Work(tiled, portion, tally, need_lse=need_lse)
        run_all(work.attend, portion.groups, workers)
        out.index_copy_(0, portion.q_tiles, work.out)
        if work.lse is not None:
            lse.index_copy_(0, portion.q_tiles, work.lse)
        if tally is not None and work.found is not None:
            work.settle(tally)
    return *_whole(problem, out, lse, need_lse=need_lse), exact, None if tally is None else tally.kept()


def _whole(problem: Problem, out: Tensor, lse: Tensor, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Output and LSE of all query tiles as the backend returns them."""
    batch, heads, tokens, dim = problem.q.shape
    out = cast(out.view(batch, heads, -1, dim)[:, :, :tokens], problem.q.dtype)
    return out, lse.view(batch, heads, -1)[:, :, :tokens] if need_lse else lse


def shares(problem: Problem) -> tuple[int, GroupSize]:
    """How many workers a call is shared by, and how large groups and portions are."""
    block_q, threads = problem.block_q, torch.get_num_threads()
    itemsize = product_dtype(problem.q.dtype, problem.q.device.type).itemsize
    columns, tiles = GROUP_BYTES // (block_q * itemsize), FOUND_BYTES // (block_q * 4)
    if problem.q.device.type != "cpu":
        return 1, GroupSize(columns * GPU_GROUPS, 1, tiles)
    repeats = problem.q.shape[0] * problem.q.shape[1] // problem.exact_offsets.shape[0]
    logits = problem.exact_indices.numel() * problem.block_k * block_q * repeats
    if 4 * problem.q.shape[3] * logits >= WORKERS_FLOPS * threads:
        workers, each = worker_threads(problem.q.device)
        return workers, GroupSize(columns * each, each, tiles)
    return 1, GroupSize(columns * threads, threads, tiles)  # as many rows for each thread stay in its own cache


class _Work:
    """One portion: its queries and what is found for them in its order, `out` [P, block_q, D] and `lse` [P, block_q].

    `found` [n, P, block_q]: what votes want of every exact tile, -inf or 0 in padding.
    """

    def __init__(self, tiled: Tiled, portion: Portion, tally: Tally | None, *, need_lse: bool) -> None:
        self.tiled, self.portion, self.tally = tiled, portion, tally
        self.wide = wide_dtype(tiled.q.dtype)
        buffers = own_buffers()
        self.q = taken(tiled.q, portion.q_tiles, buffers, "queries")
        self.out = buffer(buffers, "outputs", self.q, tuple(self.q.shape), self.q.dtype)
        self.lse = self.q.new_empty(self.q.shape[:2], dtype=self.wide) if need_lse else None
        self.weights = weights_of(tiled, portion)
        if self.weights is not None and tally is not None:
            self.weights *= LOG2_E
        self.found = None
        if tally is not None and portion.exact.shape[1]:
            shape = (portion.exact.shape[1], *self.q.shape[:2])
            self.found = buffer(buffers, "found", self.q, shape, self.wide).fill_(0.0 if tally.by_mass else -torch.inf)

    def settle(self, tally: Tally) -> None:
        """Settle the votes."""
        assert self.found is not None
        tiles = self.portion.exact % self.tiled.key_tiles
        tiles.masked_fill_(beyond(self.portion.exact_counts, tiles.shape[1]), tally.none)
        tally.settle(self.portion.q_tiles, tiles, self.found)

    def attend(self, group: Group, buffers: dict[str, Tensor]) -> None:
        """One group."""
        tiled, part, block, portion = self.tiled, slice(group.start, group.stop), self.tiled.k.shape[1], self.portion
        q, out = self.q[part], self.out[part]
        columns, exact = group.exact * block, portion.exact[part, : group.exact].flatten()
        if self.tally is None and group.least == group.most:
            columns = group.most  # all end with the ragged tile
        x = buffer(buffers, "products", q, (*q.shape[:2], columns + group.pooled), q.dtype)
        near, far = x[:, :, :columns], x[:, :, columns:]
        scale = tiled.scale if self.tally is None else tiled.scale * LOG2_E
        if group.exact:
            k = taken(tiled.k, exact, buffers, "tokens").view(len(q), -1, q.shape[2])[:, :columns]
            torch.baddbmm(near, q, k.mT, beta=0, alpha=scale, out=near)
        if group.pooled and tiled.k_mean is not None:
            pooled = portion.pooled[part, : group.pooled].flatten()
            means = taken(tiled.k_mean, pooled, buffers, "means").view(len(q), -1, q.shape[2])
            torch.baddbmm(far, q, means.mT, beta=0, alpha=scale, out=far)
        p = x
        if x.dtype != self.wide and (group.pooled or self.tally is not None or tiled.t is not None):
            x = buffer(buffers, "wide", q, tuple(x.shape), self.wide).copy_(x)
        self._transform(x, group, columns, buffers)
        total = self._softmax(x, part) if self.tally is None else self._exponentials(x, columns, part)
        if p is not x:
            p.copy_(x if total is None else x.div_(total[:, :, None]))
        if group.exact:
            v = taken(tiled.v, exact, buffers, "tokens").view(len(q), -1, q.shape[2])[:, :columns]
            torch.bmm(p[:, :, :columns], v, out=out)
        else:
            out.zero_()
        if group.pooled and tiled.v_mean is not None:
            means = taken(tiled.v_mean, pooled, buffers, "means").view(len(q), -1, q.shape[2])
            out.baddbmm_(p[:, :, columns:], means)
        if total is not None and p is x:
            out.div_(total[:, :, None])
        dead = without_keys(self.tiled, self.portion, group, self.weights)
        if dead is not None:
            self._empty(dead, part)

    def _transform(self, x: Tensor, group: Group, columns: int, buffers: dict[str, Tensor]) -> None:
        """Decay logits, mask what is absent and add a pooled tile's length, in place."""
        part = slice(group.start, group.stop)
        t = decay_of(self.tiled, self.portion, group, columns, buffers)
        if t is not None:
            torch.minimum(x, torch.mul(x, t, out=buffer(buffers, "decayed", x, tuple(x.shape), x.dtype)), out=x)
        absent, start = absent_of(self.tiled, self.portion, group, columns)
        if absent is not None:
            x[:, :, start:columns].masked_fill_(absent[:, None], -torch.inf)
        if self.weights is not None and group.pooled:
            x[:, :, columns:].add_(self.weights[part, None, : group.pooled])

    def _empty(self, dead: Tensor, part: slice) -> None:
        """Query tiles without a valid key, bool [R], whose weights are not numbers, give 0."""
        self.out[part].masked_fill_(dead[:, None, None], 0.0)
        if self.lse is not None:
            self.lse[part].masked_fill_(dead[:, None], -torch.inf)

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
        near, far = x[:, :, :columns].unflatten(2, (-1, self.tiled.k.shape[1])), x[:, :, columns:]
        if columns and not tally.by_mass:
            found = near.amax(-1)
            peak = found.amax(-1, keepdim=True)
            if far.shape[2]:
                peak = torch.maximum(peak, far.amax(-1, keepdim=True))
        else:
            peak = x.amax(-1, keepdim=True)
        if self.tiled.absent is not None:
            peak.masked_fill_(peak == -torch.inf, 0.0)
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


def weights_of(tiled: Tiled, portion: Portion) -> Tensor | None:
    """What a portion's pooled tiles add to their logits, log of their lengths, [P, p]; -inf in padding."""
    if tiled.log_length is None or not portion.pooled.shape[1]:
        return None
    weights = tiled.log_length[portion.pooled]
    return weights.masked_fill_(beyond(portion.pooled_counts, weights.shape[1]), -torch.inf)


def absent_of(tiled: Tiled, portion: Portion, group: Group, columns: int) -> tuple[Tensor | None, int]:
    """Which exact columns of a group are padding or masked, bool [R, columns - start] or None, and the start."""
    part = slice(group.start, group.stop)
    padded = beyond(portion.tokens[part], columns, group.least) if group.least < columns else None
    if tiled.absent is None or not group.exact:
        return padded, group.least
    masked = tiled.absent[portion.exact[part, : group.exact]].flatten(1)[:, :columns]
    if padded is not None:
        masked[:, group.least :] |= padded
    return masked, 0


def without_keys(tiled: Tiled, portion: Portion, group: Group, weights: Tensor | None) -> Tensor | None:
    """Which query tiles of a group see no valid key, bool [R]; None where there is no mask."""
    if tiled.absent_tiles is None:
        return None
    part = slice(group.start, group.stop)
    dead = torch.ones(group.stop - group.start, dtype=torch.bool, device=tiled.absent_tiles.device)
    if group.exact:
        dead &= tiled.absent_tiles[portion.exact[part, : group.exact]].all(1)  # repeats of the last pad a list
    if weights is not None and group.pooled:
        dead &= (weights[part, : group.pooled] == -torch.inf).all(1)
    return dead


def decay_of(tiled: Tiled, portion: Portion, group: Group, columns: int, buffers: dict[str, Tensor]) -> Tensor | None:
    """Decay of a group's logits, float32 [R, block_q, columns + pooled], or [R, 1, ...] where each tile has one frame.

    None in calls without decay.
    """
    if tiled.t is None or tiled.t_mean is None or tiled.frames is None or tiled.one_frame is None:
        return None
    part, count = slice(group.start, group.stop), tiled.key_tiles
    q_tiles = portion.q_tiles[part] % len(tiled.frames)
    frames = tiled.frames[q_tiles]
    if bool(tiled.one_frame[q_tiles].all()):
        frames = frames[:, :1]
    first = frames[:, :, None] * count
    exact, pooled = portion.exact[part, None, : group.exact], portion.pooled[part, None, : group.pooled]
    by_token = taken(tiled.t, (first + exact % count).flatten(), buffers, "decay")
    by_token = by_token.view(*frames.shape, -1)[:, :, :columns]
    if not group.pooled:
        return by_token
    return torch.cat([by_token, tiled.t_mean[first + pooled % count]], 2)


def beyond(counts: Tensor, columns: int, start: int = 0) -> Tensor:
    """Where columns, from `start` on, lie behind the `counts` [R] of their rows, bool [R, columns - start]."""
    return torch.arange(start, columns, device=counts.device) >= counts[:, None]


def taken(x: Tensor, index: Tensor, buffers: dict[str, Tensor], name: str) -> Tensor:
    """x[index] for a flat index, in a reused buffer."""
    return torch.index_select(x, 0, index, out=buffer(buffers, name, x, (len(index), *x.shape[1:]), x.dtype))
