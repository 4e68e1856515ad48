"""The schedule of the torch backend: query tiles that are computed together, cached with the lists.

A group's query tiles see about equally many key tiles, padded to one length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel_kernels.cache import StorageCache

WASTE = 1 / 8  # most of a group's columns that padding may be


@dataclass(frozen=True, slots=True)
class Group:
    """Query tiles `start` to `stop` of a portion, computed together, with its first `exact` and `pooled` columns.

    They see from `least` to `most` tokens of exact tiles, a ragged tail's padding left out.
    """

    start: int
    stop: int
    exact: int
    pooled: int
    least: int
    most: int


@dataclass(frozen=True, eq=False, slots=True)
class Portion:
    """Many query tiles, those that see most first, and the groups that they are computed in.

    `q_tiles` int64 [P]; `exact` int64 [P, n] and `pooled` int64 [P, p] key tiles, padded by repeats of each one's last;
    of them `exact_counts` and `pooled_counts` int64 [P] are its own; `tokens` int64 [P] as in groups.
    """

    q_tiles: Tensor
    exact: Tensor
    pooled: Tensor
    exact_counts: Tensor
    pooled_counts: Tensor
    tokens: Tensor
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that lists alone don't tell: key tiles, tokens of a tile, and how many of the last one are padding.

    `heads`: the key head of every batch and head, counted through all batches.
    """

    key_tiles: int
    block: int
    tail: int
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupSize:
    """Most columns of a group, a number of query tiles that is better divided, and most key tiles of a portion."""

    columns: int
    multiple: int
    tiles: int


Csr = tuple[Tensor | None, Tensor | None]


class _Lists:
    """The lists of all batches and heads, one after the other: how many key tiles, and where each list starts."""

    def __init__(self, exact: Csr, pooled: Csr, shape: Shape) -> None:
        assert exact[0] is not None
        assert exact[1] is not None
        sets, q_tiles, device = exact[0].shape[0], exact[0].shape[1] - 1, exact[1].device
        bh = torch.arange(len(shape.heads), device=device)
        self.shift = (torch.tensor(shape.heads, device=device) * shape.key_tiles).repeat_interleave(q_tiles)

        def of_all(offsets: Tensor) -> tuple[Tensor, Tensor]:
            bounds = offsets.long()[bh % sets]
            return bounds[:, :-1].flatten(), (bounds[:, 1:] - bounds[:, :-1]).flatten()

        self.exact, self.pooled = exact[1], pooled[1]
        self.exact_starts, self.exact_counts = of_all(exact[0])
        self.pooled_starts, self.pooled_counts = self.exact_starts, torch.zeros_like(self.exact_counts)
        if pooled[0] is not None:
            self.pooled_starts, self.pooled_counts = of_all(pooled[0])
        self.tail = torch.zeros_like(self.exact_counts, dtype=torch.bool)
        if shape.tail and exact[1].numel():
            last = exact[1][(self.exact_starts + self.exact_counts - 1).clamp(min=0)]
            self.tail = (self.exact_counts > 0) & (last == shape.key_tiles - 1)

    def tiles_of(self, chosen: Tensor, exact: int, pooled: int) -> tuple[Tensor, Tensor]:
        """Key tiles of the chosen query tiles, int64 [P, exact] and [P, pooled], padded with each one's last."""
        return (
            self._pick(self.exact, self.exact_starts, self.exact_counts, chosen, exact),
            self._pick(self.pooled, self.pooled_starts, self.pooled_counts, chosen, pooled),
        )

    def _pick(self, indices: Tensor | None, starts: Tensor, counts: Tensor, chosen: Tensor, most: int) -> Tensor:
        if indices is None or most == 0:
            return chosen.new_empty(chosen.numel(), 0)
        places = torch.minimum(torch.arange(most, device=chosen.device), counts[chosen, None] - 1)
        return indices[places.add_(starts[chosen, None]).clamp_(min=0)] + self.shift[chosen, None]


def build(exact: Csr, pooled: Csr, shape: Shape, size: GroupSize) -> list[Portion]:
    """Portions of one set of lists; a query tile that sees nothing is in none."""
    lists = _Lists(exact, pooled, shape)
    tokens = lists.exact_counts * shape.block - lists.tail * shape.tail
    kind = (lists.pooled_counts > 0) * 2 + (lists.exact_counts > 0)
    most = (shape.key_tiles + 1) * shape.block
    order = (kind * most + tokens) * (shape.key_tiles + 1) + lists.pooled_counts
    order = order.argsort(descending=True, stable=True)
    own = lists.exact_counts[order], lists.pooled_counts[order], tokens[order]
    exact_counts, pooled_counts, held = torch.stack(own).tolist()
    groups = _groups(exact_counts, pooled_counts, held, size, shape.block)
    found = []
    for some in _runs(groups, size.tiles):
        part = slice(some[0].start, some[-1].stop)
        chosen = order[part]
        tiles = lists.tiles_of(chosen, max(group.exact for group in some), max(group.pooled for group in some))
        here = [replace(group, start=group.start - part.start, stop=group.stop - part.start) for group in some]
        found.append(Portion(chosen, *tiles, own[0][part], own[1][part], own[2][part], here))
    return found


def _groups(exact: list[int], pooled: list[int], tokens: list[int], size: GroupSize, block: int) -> list[Group]:
    """Query tiles, those that see most first of each kind, cut into groups of little padding."""
    found: list[Group] = []
    end = next((i for i, tiles in enumerate(zip(exact, pooled, strict=True)) if not any(tiles)), len(exact))
    start = 0
    while start < end:
        stop, used, widest = start, 0, 0
        while stop < end and (exact[stop] > 0, pooled[stop] > 0) == (exact[start] > 0, pooled[start] > 0):
            columns, wide = exact[stop] * block + pooled[stop], max(widest, pooled[stop])
            room = (exact[start] * block + wide) * (stop + 1 - start)
            if stop > start and (room > size.columns or room - used - columns > WASTE * room):
                break
            stop, used, widest = stop + 1, used + columns, wide
        if stop < end and stop - start > size.multiple:
            stop -= (stop - start) % size.multiple
        widest = max(pooled[start:stop])
        found.append(Group(start, stop, exact[start], widest, tokens[stop - 1], tokens[start]))
        start = stop
    return found


def _runs(groups: list[Group], tiles: int) -> Iterator[list[Group]]:
    """Groups in runs of so many key tiles at most, padded, unless one group has more."""
    run: list[Group] = []
    exact = pooled = 0
    for group in groups:
        wide = max(exact, group.exact), max(pooled, group.pooled)
        if run and (group.stop - run[0].start) * sum(wide) > tiles:
            yield run
            run, wide = [], (group.exact, group.pooled)
        run.append(group)
        exact, pooled = wide
    if run:
        yield run


_PORTIONS: StorageCache[list[Portion]] = StorageCache()


def schedule(exact: Csr, pooled: Csr, shape: Shape, size: GroupSize) -> list[Portion]:
    """The portions of these lists, built on first use: a TileLists object is regrouped once, eager or compiled."""
    return _PORTIONS.get((*exact, *pooled), (shape, size), lambda: build(exact, pooled, shape, size))
