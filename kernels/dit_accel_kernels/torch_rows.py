"""The torch backend's loop over single block rows, for calls without masks and decay: lists of any lengths.

Nothing is prepared but views, one set for each length that occurs, and all buffers stay in a core's cache. Long rows
are taken in parts joined by their LSE. A vote gets the largest logit or the share of the mass of every query in every
tile while these are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel_kernels.tiled import Tiled, wide_dtype
from dit_accel_kernels.votes import Tally

PART_BYTES = 1 << 20  # logits of one block row of a lane; longer rows are cut into parts
STATISTICS_BYTES = 512 << 10  # what votes are settled from at a time


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
    """Lengths of pooled tiles, weights of their columns; in wide dtypes their logarithms, which join the logits."""
    assert tiled.length is not None
    lengths = tiled.length[pooled % tiled.key_tiles].to(tiled.q.dtype)
    return lengths if _weighs(tiled) else lengths.log_()


def _weighs(tiled: Tiled) -> bool:
    """Whether logits are too coarse to take the logarithm of a length in."""
    return tiled.q.dtype != wide_dtype(tiled.q.dtype)


class RowLoop:
    """Block rows of one lane, one by one, with as few operations as can be: workers queue for Python at each of them.

    `out` [R, block_q, D] and `lse` [R, block_q] or None are the lane's own; a tally wants only the lane of lists of
    every batch and head.
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
        self.weighs = _weighs(tiled)
        self.most = tiles_of_part(tiled)
        self.views: dict[tuple[int, int, bool], _Views] = {}

    def run(self, rows: Sequence[Row]) -> None:
        """Attention of these rows, and their votes."""
        if self.tally is None:
            for row in rows:
                self._row(row, None)
            return
        size = 4 * self.tiled.q.shape[2] * max(1, *(row.exact.numel() for row in rows))
        step = max(1, STATISTICS_BYTES // size)
        for start in range(0, len(rows), step):
            self._vote(self.tally, rows[start : start + step])

    def _vote(self, tally: Tally, rows: Sequence[Row]) -> None:
        """Attention of a few rows, whose votes are settled then."""
        counts = torch.tensor([row.exact.numel() for row in rows])
        most = int(counts.max())
        shape = (len(rows), self.tiled.q.shape[2], most)
        found = self.tiled.q.new_full(shape, tally.nothing, dtype=wide_dtype(self.tiled.q.dtype))
        for row, room in zip(rows, found.unbind(0), strict=True):
            self._row(row, room)
        tiles = torch.full((len(rows), most), tally.none)
        tiles[torch.arange(most) < counts[:, None]] = torch.cat([row.exact for row in rows]) % self.tiled.key_tiles
        tally.settle(torch.tensor([row.number for row in rows]), tiles, found)

    def _row(self, row: Row, found: Tensor | None) -> None:
        """Attention of one row; `found` [block_q, n or more] gets what votes need."""
        result = self.out_rows[row.number]
        if row.exact.numel() > self.most:
            sums = self._parts(row, found, result)
        else:
            sums = self._part(row, found, result, need_sums=self.lse_rows is not None)
        if self.lse_rows is not None and sums is not None:
            self.lse_rows[row.number].copy_(sums[0] + sums[1].log_())

    def _parts(self, row: Row, found: Tensor | None, result: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a long row, in parts, pooled tiles with the last; returns maximum and sum like `_part`."""
        count = row.exact.numel()
        cuts = min(count, 2 * -(-count // self.most))  # halves fit the cache beside their keys
        out = buffer(self.buffers, "out", result, tuple(result.shape))
        whole = peak = total = None
        seen = []
        for number, exact in enumerate(row.exact.tensor_split(cuts)):
            last = number == cuts - 1
            part = Row(row.number, exact, row.pooled if last else None, row.lengths, row.tail and last)
            room = None
            if found is not None:
                room, found = found[:, : exact.numel()], found[:, exact.numel() :]
            sums = self._part(part, room, out, need_sums=True)
            assert sums is not None
            seen.append((room, *sums))
            if whole is None or peak is None or total is None:
                whole, (peak, total) = out.to(sums[0].dtype, copy=True), sums
                continue
            before, peak = peak, torch.maximum(peak, sums[0])
            share, more = total * (before - peak).exp_(), sums[1] * (sums[0] - peak).exp_()
            total = share + more
            whole.mul_((share / total)[:, None]).addcmul_(out.to(whole.dtype), (more / total)[:, None])
        assert whole is not None
        assert peak is not None
        assert total is not None
        if self.tally is not None and self.tally.by_mass:
            for room, part_peak, part_total in seen:
                room.mul_(((part_peak - peak).exp_() * part_total)[:, None])
        result.copy_(whole)
        return peak, total

    def _part(self, row: Row, found: Tensor | None, result: Tensor, *, need_sums: bool) -> tuple[Tensor, Tensor] | None:
        """Attention over some tiles of a row, left in `result`.

        Returns, if needed, the largest logit x and the sum of e^(logit - x) of every query, [block_q] each: maxima of
        logits and of the softmax are two cheap passes where a logsumexp would repeat it.
        """
        pooled = row.pooled
        key = (row.exact.numel(), 0 if pooled is None else pooled.numel(), row.tail)
        at = self.views.get(key)
        if at is None:
            at = self.views[key] = _Views(self.tiled, self.buffers, *key)
        torch.index_select(self.k, 0, row.exact, out=at.k)
        if at.pooled:
            torch.index_select(self.k_mean, 0, pooled, out=at.k_means)
        torch.addmm(at.logits, self.q_rows[row.number], at.k_columns, beta=0, alpha=self.tiled.scale, out=at.logits)
        if at.pooled and not self.weighs:
            at.far_logits.add_(row.lengths)
        torch.softmax(at.logits, -1, out=at.p)
        if found is not None and self.tally is not None:
            at.sums(found) if self.tally.by_mass else at.maxima(found)
        torch.index_select(self.v, 0, row.exact, out=at.v)
        if at.pooled:
            torch.index_select(self.v_mean, 0, pooled, out=at.v_means)
        sums, wide = None, wide_dtype(at.p.dtype)
        if need_sums:
            sums = at.logits.amax(-1).to(wide), at.p.amax(-1).to(wide).reciprocal_()
        if not (at.pooled and self.weighs):
            torch.mm(at.p, at.v_columns, out=result)
            return sums
        at.far_p.mul_(row.lengths)
        total = at.p.sum(-1, dtype=wide)
        torch.mm(at.p, at.v_columns, out=result)
        result.copy_(result / total[:, None])
        if sums is None:
            return None
        if found is not None and self.tally is not None and self.tally.by_mass:
            found.div_(total[:, None])
        return sums[0], sums[1].mul_(total)


class _Views:
    """Views of reused buffers for block rows of `exact` and `pooled` tiles; `logits` and `p` are [block_q, C]."""

    def __init__(self, tiled: Tiled, buffers: dict[str, Tensor], exact: int, pooled: int, tail: bool) -> None:
        block, dim = tiled.k.shape[2:]
        tokens = exact * block - (tiled.tail if tail else 0)
        columns = tokens + pooled
        k, v = (buffer(buffers, name, tiled.q, (max(exact * block, columns), dim)) for name in ("k", "v"))
        self.k, self.v = (x[: exact * block].view(exact, block, dim) for x in (k, v))
        self.k_means, self.v_means = (x[tokens:columns] for x in (k, v))  # behind the tokens, over what pads the last
        self.k_columns, self.v_columns = k[:columns].mT, v[:columns]
        self.logits, self.p = (buffer(buffers, n, tiled.q, (tiled.q.shape[2], columns)) for n in ("logits", "p"))
        self.pooled = pooled
        self.far_logits, self.far_p = (x[:, tokens:] for x in (self.logits, self.p))
        whole = exact - tail  # tiles
        self.tiles_logits, self.tiles_p = (
            x[:, : whole * block].view(len(x), whole, block) for x in (self.logits, self.p)
        )
        self.rest_logits, self.rest_p = (x[:, whole * block : tokens] for x in (self.logits, self.p))
        self.whole, self.tail = slice(0, whole), whole if tail else None

    def maxima(self, found: Tensor) -> None:
        """The largest logit of every query in every exact tile, in the first columns of `found` [block_q, ...]."""
        if found.dtype == self.logits.dtype:
            torch.amax(self.tiles_logits, -1, out=found[:, self.whole])
        else:
            found[:, self.whole] = self.tiles_logits.amax(-1)
        if self.tail is not None:
            found[:, self.tail] = self.rest_logits.amax(-1)

    def sums(self, found: Tensor) -> None:
        """The same for each tile's sum of the softmax over these columns."""
        torch.sum(self.tiles_p, -1, dtype=found.dtype, out=found[:, self.whole])
        if self.tail is not None:
            found[:, self.tail] = self.rest_p.sum(-1, dtype=found.dtype)


def tiles_of_part(tiled: Tiled) -> int:
    """Exact tiles of one part of a block row."""
    return max(1, PART_BYTES // (tiled.q.element_size() * tiled.q.shape[2] * tiled.k.shape[2]))


def buffer(buffers: dict[str, Tensor], name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of a reused flat buffer; grown when too small."""
    size = math.prod(shape)
    if name not in buffers or buffers[name].numel() < size:
        buffers[name] = like.new_empty(size)
    return buffers[name][:size].view(shape)
