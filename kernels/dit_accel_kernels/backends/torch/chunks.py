"""Chunks of the torch backend: query tiles that see about equally many key tiles and are computed together."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache import StorageCache
from ...problem import Problem

WASTE = 0.125  # most of a chunk's columns that padding may be


@dataclass(frozen=True, eq=False, slots=True)
class Lists:
    """Lists of the query tiles of all batches and heads: int64 starts and counts [B * H * NQ] in int32 `tiles`."""

    starts: Tensor
    counts: Tensor
    tiles: Tensor

    def positions(self, q_tiles: Tensor, length: int) -> Tensor:
        """Where some query tiles' key tiles are, int64 [R, length], padded by repeats of each one's last, if any."""
        column = torch.arange(length, device=self.tiles.device)
        return torch.minimum(column, self.counts[q_tiles, None] - 1).add_(self.starts[q_tiles, None])

    def padded(self, q_tiles: Tensor, length: int) -> Tensor:
        """The key tiles at these positions, int64 [R, length]."""
        return self.tiles[self.positions(q_tiles, length)].long()


def flat_lists(problem: Problem, *, pooled: bool = False) -> Lists:
    """The exact or the pooled lists of a call; empty ones where it pools nothing."""
    offsets = problem.pooled_offsets if pooled else problem.exact_offsets
    tiles = problem.pooled_indices if pooled else problem.exact_indices
    if offsets is None or tiles is None:
        offsets, tiles = torch.zeros_like(problem.exact_offsets), problem.exact_indices[:0]
    bounds = offsets.long().repeat(problem.q.shape[0] * problem.q.shape[1] // offsets.shape[0], 1)
    counts = (bounds[:, 1:] - bounds[:, :-1]).flatten()
    return Lists(bounds[:, :-1].reshape(-1).contiguous(), counts, tiles.to(torch.int32).contiguous())


Partial = tuple[Tensor, Tensor, Tensor]
"""Tiles of a chunk that have a mask: row and column in its `exact`, and number of the mask, int64 [N]."""


def beyond(counts: Tensor, columns: int, start: int = 0) -> Tensor:
    """Where columns, from `start` on, lie behind the `counts` [R] of their rows, bool [R, columns - start]."""
    return torch.arange(start, columns, device=counts.device) >= counts[:, None]


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Query tiles computed together, their key tiles padded to one length by repeats of each one's last.

    `q_tiles` int64 [R]; `exact` int64 [R, n] and `pooled` int64 [R, p], counted through all batches and key heads; of
    them `exact_counts` and `pooled_counts` [R] are each one's own. `tokens` [R] counts the keys of exact tiles, from
    `least` to `most`, a ragged tail's padding left out. `partial` are those of its tiles that have a mask; None where
    none has.
    """

    q_tiles: Tensor
    exact: Tensor
    pooled: Tensor
    exact_counts: Tensor
    pooled_counts: Tensor
    tokens: Tensor
    least: int
    most: int
    partial: Partial | None


_CHUNKS: StorageCache[list[Chunk]] = StorageCache()


def chunks_of(problem: Problem, columns: int, multiple: int, *, remember: bool) -> list[Chunk]:
    """The chunks of a call's lists, those that see most first of each kind; a query tile that sees nothing is in none.

    A chunk's query tiles have at most so many `columns` of exact keys and pooled tiles, padding included, unless one
    alone has more; their number is better divided by `multiple`. The call's selection is resolved. `remember` keeps the
    chunks with the lists; those of one call only are not worth it.
    """
    if not remember:
        return _build(problem, columns, multiple)
    key = (problem.q.shape, problem.k.shape, problem.block_q, problem.block_k, columns, multiple)
    return _CHUNKS.get(problem.parts.values(), key, lambda: _build(problem, columns, multiple))


def _build(problem: Problem, columns: int, multiple: int) -> list[Chunk]:
    exact, pooled = flat_lists(problem), flat_lists(problem, pooled=True)
    tiles, block = problem.key_tiles, problem.block_k
    tokens = exact.counts * block
    tail = tiles * block - problem.k.shape[2]
    if tail and exact.tiles.numel():
        last = exact.tiles[(exact.starts + exact.counts - 1).clamp(min=0)]
        tokens = tokens - tail * ((exact.counts > 0) & (last == tiles - 1))
    kind = (pooled.counts > 0) * 2 + (exact.counts > 0)
    key = (kind * ((tiles + 1) * block) + tokens) * (tiles + 1) + pooled.counts
    order = key.argsort(descending=True, stable=True)
    counts = torch.stack([exact.counts, pooled.counts, tokens])[:, order]
    batch_heads, shared_by = problem.q.shape[0] * problem.q.shape[1], problem.q.shape[1] // problem.k.shape[1]
    first = (torch.arange(batch_heads, device=order.device) // shared_by * tiles).repeat_interleave(problem.query_tiles)
    chunks = []
    for start, stop, longest, most_pooled, least, most in _cuts(counts.tolist(), columns, multiple, block):
        q_tiles = order[start:stop]
        shift = first[q_tiles, None]
        near = exact.padded(q_tiles, longest).add_(shift) if longest else shift[:, :0]
        far = pooled.padded(q_tiles, most_pooled).add_(shift) if most_pooled else shift[:, :0]
        partial = _partial(problem.mask_ids, exact.positions(q_tiles, longest))
        own = counts[:, start:stop]
        chunks.append(Chunk(q_tiles, near, far, own[0], own[1], own[2], least, most, partial))
    return chunks


def _partial(mask_ids: Tensor | None, positions: Tensor) -> Partial | None:
    """The tiles with masks among those at some positions of the lists."""
    if mask_ids is None or not positions.shape[1]:
        return None
    ids = mask_ids[positions].long()
    row, column = (ids >= 0).nonzero(as_tuple=True)
    return (row, column, ids[row, column]) if len(row) else None


def _cuts(
    counts: list[list[int]], most: int, multiple: int, block: int
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Query tiles, those that see most first of each kind, cut into chunks of little padding; none that see nothing."""
    exact, pooled, tokens = counts
    end = next((i for i, tiles in enumerate(zip(exact, pooled, strict=True)) if not any(tiles)), len(exact))
    start = 0
    while start < end:
        stop, used, widest = start, 0, 0
        while stop < end and (exact[stop] > 0, pooled[stop] > 0) == (exact[start] > 0, pooled[start] > 0):
            columns, wide = exact[stop] * block + pooled[stop], max(widest, pooled[stop])
            room = (exact[start] * block + wide) * (stop + 1 - start)
            if stop > start and (room > most or room - used - columns > WASTE * room):
                break
            stop, used, widest = stop + 1, used + columns, wide
        if stop < end and stop - start > multiple:
            stop -= (stop - start) % multiple
        yield start, stop, exact[start], max(pooled[start:stop]), tokens[stop - 1], tokens[start]
        start = stop
