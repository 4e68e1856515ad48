"""The torch backend's loop over single block rows, for calls without masks and decay: lists of any lengths.

Nothing is prepared but views, one set for each length that occurs, and all buffers stay in a core's cache. Long rows
are taken in parts joined by their maxima and sums. A vote gets the largest logit or the mass of every query in every
tile while these are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel_kernels.selection import LOG2_E
from dit_accel_kernels.tiled import Tiled, wide_dtype
from dit_accel_kernels.votes import Tally

PART_BYTES = 1 << 20  # logits of one block row of a lane; longer rows are cut into parts
STATISTICS_BYTES = 1 << 20  # what votes are settled from at a time


class Row(NamedTuple):
    """One block row of a lane: its exact key tiles int64 [n], the last one ragged if `tail`, and pooled ones [p].

    `lengths` [p] are the pooled tiles', as `far_lengths` gives them.
    """

    number: int
    exact: Tensor
    pooled: Tensor | None
    lengths: Tensor | None
    tail: bool


def far_lengths(tiled: Tiled, pooled: Tensor) -> Tensor:
    """Base-2 logarithms of the lengths of pooled tiles: their columns' weights, which join the logits."""
    assert tiled.length is not None
    return tiled.length.log2().to(wide_dtype(tiled.q.dtype))[pooled % tiled.key_tiles]


class RowLoop:
    """Block rows of one lane, one by one, with as few operations as can be: workers queue for Python at each of them.

    `out` [R, block_q, D] and `lse` [R, block_q] or None are the lane's own; a tally wants only the lane of lists of
    every batch and head. Logits are in log2 units and in the wide dtype: exp2 takes a third of the time of exp.
    """

    def __init__(
        self,
        tiled: Tiled,
        lane: int,
        buffers: dict[str, Tensor],
        out: Tensor,
        lse: Tensor | None,
        tally: Tally | None = None,
    ) -> None:
        self.tiled, self.buffers, self.tally = tiled, buffers, tally
        self.q_rows, self.out_rows = tiled.q[lane].unbind(0), out.unbind(0)
        self.lse_rows = None if lse is None else lse.unbind(0)
        self.k, self.v = tiled.k[lane], tiled.v[lane]
        self.k_mean, self.v_mean = (None if x is None else x[lane] for x in (tiled.k_mean, tiled.v_mean))
        self.most, self.wide = tiles_of_part(tiled), wide_dtype(tiled.q.dtype)
        self.views: dict[tuple[int, int, bool], _Views] = {}

    def run(self, rows: Sequence[Row]) -> None:
        """Attention of these rows, and their votes."""
        if self.tally is None:
            for row in rows:
                self._row(row, None)
            return
        size = self.tiled.q.shape[2] * max(1, *(row.exact.numel() for row in rows)) * self.wide.itemsize
        step = max(1, STATISTICS_BYTES // size)
        for start in range(0, len(rows), step):
            self._vote(self.tally, rows[start : start + step])

    def _vote(self, tally: Tally, rows: Sequence[Row]) -> None:
        """Attention of some rows, and their votes: a few operations for all of them."""
        block_q, device = self.tiled.q.shape[2], self.k.device
        sizes = [row.exact.numel() for row in rows]
        flat = buffer(self.buffers, "flat", self.k, (block_q * sum(sizes),), self.wide)
        for row, room, size in zip(rows, flat.split([block_q * size for size in sizes]), sizes, strict=True):
            self._row(row, room.view(block_q, size))
        here = torch.arange(max(sizes), device=device) < torch.tensor(sizes, device=device)[:, None]
        found = buffer(self.buffers, "found", self.k, (len(rows), block_q, here.shape[1]), self.wide)
        found.fill_(0.0 if tally.by_mass else -torch.inf).masked_scatter_(here[:, None].expand(found.shape), flat)
        tiles = torch.full(here.shape, tally.none, device=device)
        tiles.masked_scatter_(here, torch.cat([row.exact for row in rows]) % self.tiled.key_tiles)
        tally.settle(torch.tensor([row.number for row in rows], device=device), tiles, found)

    def _row(self, row: Row, found: Tensor | None) -> None:
        """Attention of one row; `found` [block_q, n] gets what votes need, maxima in log2 units."""
        result = self.out_rows[row.number]
        if row.exact.numel() > self.most:
            sums = self._parts(row, found, result)
        else:
            sums = self._part(row, found, result, need_sums=self.lse_rows is not None)
        if self.lse_rows is not None and sums is not None:
            peak, total = sums
            torch.add(peak[:, 0] / LOG2_E, total[:, 0].log(), out=self.lse_rows[row.number])

    def _parts(self, row: Row, found: Tensor | None, result: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a long row, in parts, pooled tiles with the last; returns what `_part` does."""
        count = row.exact.numel()
        cuts = min(count, 2 * -(-count // self.most))  # halves fit the cache beside their keys
        out = buffer(self.buffers, "out", result, tuple(result.shape))
        whole = peak = total = None
        seen = []
        for number, exact in enumerate(row.exact.tensor_split(cuts)):
            last, room = number == cuts - 1, None
            part = Row(row.number, exact, row.pooled if last else None, row.lengths, row.tail and last)
            if found is not None:
                room, found = found[:, : exact.numel()], found[:, exact.numel() :]
            sums = self._part(part, room, out, need_sums=True)
            assert sums is not None
            seen.append((room, sums[0]))
            if whole is None or peak is None or total is None:
                whole, (peak, total) = out.to(sums[0].dtype, copy=True), sums
                continue
            before, peak = peak, torch.maximum(peak, sums[0])
            share, more = total * (before - peak).exp2_(), sums[1] * (sums[0] - peak).exp2_()
            total = share + more
            whole.mul_(share / total).addcmul_(out.to(whole.dtype), more / total)
        assert whole is not None
        assert peak is not None
        assert total is not None
        if self.tally is not None and self.tally.by_mass:
            for room, part_peak in seen:
                room.mul_((part_peak - peak).exp2_())
        result.copy_(whole)
        return peak, total

    def _part(self, row: Row, found: Tensor | None, result: Tensor, *, need_sums: bool) -> tuple[Tensor, Tensor] | None:
        """Attention over some tiles of a row, left in `result`.

        Returns, at least if needed, the largest logit x and the sum of 2^(logit - x) of every query, [block_q, 1] each.
        """
        far, k_mean, v_mean = row.pooled, self.k_mean, self.v_mean
        key = (row.exact.numel(), 0 if far is None else far.numel(), row.tail)
        at = self.views.get(key)
        if at is None:
            at = self.views[key] = _Views(self.tiled, self.buffers, *key)
        simple = at.is_low and not at.pooled and found is None  # then softmax is faster
        scale = self.tiled.scale if simple else self.tiled.scale * LOG2_E
        torch.index_select(self.k, 0, row.exact, out=at.k)
        if at.pooled and far is not None and k_mean is not None:
            torch.index_select(k_mean, 0, far, out=at.k_means)
        torch.addmm(at.products, self.q_rows[row.number], at.k_columns, beta=0, alpha=scale, out=at.products)
        sums = None
        if simple:
            torch.softmax(at.products, -1, out=at.p)
            if need_sums:
                peak, most = (x.amax(-1, keepdim=True).to(at.x.dtype) for x in (at.products, at.p))
                sums = peak.mul_(LOG2_E), most.reciprocal_()
        else:
            sums = self._exponentials(at, row.lengths, found)
        torch.index_select(self.v, 0, row.exact, out=at.v)
        if at.pooled and far is not None and v_mean is not None:
            torch.index_select(v_mean, 0, far, out=at.v_means)
        torch.mm(at.p, at.v_columns, out=result)
        if sums is not None and not at.is_low:
            result.div_(sums[1])
        return sums

    def _exponentials(self, at: _Views, lengths: Tensor | None, found: Tensor | None) -> tuple[Tensor, Tensor]:
        """From products to weights in `at.p`, of sum 1 in low dtypes only; returns peaks and sums."""
        x, votes = at.x, None if found is None else self.tally
        if at.is_low:
            x.copy_(at.products)
        if at.pooled and lengths is not None:
            at.far.add_(lengths)
        if votes is None or found is None or votes.by_mass:
            peak = x.amax(-1, keepdim=True)
        else:
            at.by_tile(torch.amax, found)
            peak = found.amax(-1, keepdim=True) if at.exact else None
            if at.pooled:
                far = at.far.amax(-1, keepdim=True)
                peak = far if peak is None else torch.maximum(peak, far)
            assert peak is not None
        total = x.sub_(peak).exp2_().sum(-1, keepdim=True)
        if votes is not None and found is not None and votes.by_mass:
            at.by_tile(torch.sum, found)
        if at.is_low:
            torch.mul(x, total.reciprocal(), out=at.p)
        return peak, total


class _Views:
    """Views of reused buffers for block rows of `exact` and `pooled` tiles.

    `products`, `x`, `p` are [block_q, C]: scaled products, logits in the wide dtype, weights; one buffer where q's
    dtype is wide. `far` are the pooled columns of x.
    """

    def __init__(self, tiled: Tiled, buffers: dict[str, Tensor], exact: int, pooled: int, tail: bool) -> None:
        block, dim = tiled.k.shape[2:]
        tokens = exact * block - (tiled.tail if tail else 0)
        columns = tokens + pooled
        k, v = (buffer(buffers, name, tiled.q, (max(exact * block, columns), dim)) for name in ("k", "v"))
        self.k, self.v = (x[: exact * block].view(exact, block, dim) for x in (k, v))
        self.k_means, self.v_means = (x[tokens:columns] for x in (k, v))  # behind the tokens, over what pads the last
        self.k_columns, self.v_columns = k[:columns].mT, v[:columns]
        shape, wide = (tiled.q.shape[2], columns), wide_dtype(tiled.q.dtype)
        self.is_low = tiled.q.dtype != wide
        self.products = self.x = self.p = buffer(buffers, "products", tiled.q, shape)
        if self.is_low:
            self.x = buffer(buffers, "x", tiled.q, shape, wide)
            self.p = buffer(buffers, "p", tiled.q, shape)
        self.exact, self.pooled, self.far = exact, pooled, self.x[:, tokens:]
        whole = exact - tail
        self.whole, self.rest = self.x[:, : whole * block].view(len(self.x), whole, block), None
        if tail:
            self.rest = self.x[:, whole * block : tokens]

    def by_tile(self, reduce: Callable[..., Tensor], found: Tensor) -> None:
        """Reduce x over the keys of each exact tile into `found` [block_q, n]."""
        if self.rest is None:
            reduce(self.whole, -1, out=found)
            return
        found[:, :-1] = reduce(self.whole, -1)
        found[:, -1] = reduce(self.rest, -1)


def tiles_of_part(tiled: Tiled) -> int:
    """Exact tiles of one part of a block row."""
    return max(1, PART_BYTES // (tiled.q.element_size() * tiled.q.shape[2] * tiled.k.shape[2]))


def buffer(
    buffers: dict[str, Tensor], name: str, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """A view of a reused flat buffer; grown when too small."""
    size = math.prod(shape)
    if name not in buffers or buffers[name].numel() < size:
        buffers[name] = like.new_empty(size, dtype=dtype)
    return buffers[name][:size].view(shape)
