"""Chunks of the torch backend: query tiles that see about equally many key tiles and are computed together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache import StorageCache
from ...problem import Problem
from ...tiles import PARTS

WASTE = 1 / 8  # most of a chunk's columns that padding may be


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


@dataclass(frozen=True, eq=False, slots=True)
class Partial:
    """Tiles of a chunk that have a mask.

    `tiles` int64 [3, N]: row and column in the chunk's `exact`, and place in `masks` int64 [M'], which are numbers of
    masks, each once. `first` is the first column that has one; `alone` tells whether a query tile sees no other tiles.
    """

    tiles: Tensor
    masks: Tensor
    first: int
    alone: bool


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

    Args:
        problem: the call, its selection resolved.
        columns: most exact keys and pooled tiles of a chunk's query tiles, padding included, unless one has more.
        multiple: a number of query tiles that is better divided.
        remember: keep them with the lists; those of one call only are not worth it.
    """
    if not remember:
        return _build(problem, columns, multiple)
    parts = [getattr(problem, name) for name in PARTS]
    shapes = (problem.q.shape[:3], problem.k.shape[1:3], problem.block_q, problem.block_k, columns, multiple)
    return _CHUNKS.get(parts, shapes, lambda: _build(problem, columns, multiple))


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
    first = (torch.tensor(key_heads(problem), device=order.device) * tiles).repeat_interleave(problem.query_tiles)
    chunks = []
    exact_counts, pooled_counts, token_counts = counts.tolist()
    cuts = _cuts(exact_counts, pooled_counts, token_counts, columns, multiple, block)
    for start, stop, longest, most_pooled, least, most in cuts:
        q_tiles, part = order[start:stop], counts[:, start:stop]
        shift = first[q_tiles, None]
        chunks.append(
            Chunk(
                q_tiles=q_tiles,
                exact=exact.padded(q_tiles, longest).add_(shift) if longest else shift[:, :0],
                pooled=pooled.padded(q_tiles, most_pooled).add_(shift) if most_pooled else shift[:, :0],
                exact_counts=part[0],
                pooled_counts=part[1],
                tokens=part[2],
                least=least,
                most=most,
                partial=_partial(problem.mask_ids, exact.positions(q_tiles, longest)),
            )
        )
    return chunks


def _partial(mask_ids: Tensor | None, positions: Tensor) -> Partial | None:
    """The tiles with masks among those at some positions of the lists."""
    if mask_ids is None or not positions.shape[1]:
        return None
    ids = mask_ids[positions].long()
    masked = ids >= 0
    row, column = masked.nonzero(as_tuple=True)
    if not len(row):
        return None
    masks, place = ids[row, column].unique(return_inverse=True)
    return Partial(torch.stack([row, column, place]), masks, int(column.min()), bool(masked.all(1).any()))


def _cuts(
    exact: list[int], pooled: list[int], tokens: list[int], most: int, multiple: int, block: int
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Query tiles, those that see most first of each kind, cut into chunks of little padding; none that see nothing."""
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


def key_heads(problem: Problem) -> tuple[int, ...]:
    """The key head of every batch and head, counted through all batches."""
    batch, heads, key_heads = problem.q.shape[0], problem.q.shape[1], problem.k.shape[1]
    return tuple(b * key_heads + h * key_heads // heads for b in range(batch) for h in range(heads))
