"""Schedules of the torch backend: block rows that are computed together, cached with the lists.

Units hold rows of equally many tiles, for calls with masks or decay and for gradients. Groups hold rows of about
equally many, padded to one length, for all other calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel_kernels.cache import StorageCache

WASTE = 1 / 8  # most of a group's columns that padding may be


@dataclass(frozen=True, eq=False, slots=True)
class Unit:
    """Block rows that can be computed as one batch: all visit the same number of exact tiles and of pooled tiles.

    `rows` int64 [R]; `exact` int64 [R, n] and `pooled` int64 [R, p] key tiles; `tail` tells whether the last exact tile
    of each row is the ragged last tile of its sequence.
    """

    rows: Tensor
    exact: Tensor
    pooled: Tensor
    tail: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Block rows `start` to `stop` of a portion, computed together, with the first `exact` and `pooled` of its columns.

    The rows hold from `least` to `most` tokens in exact tiles, a ragged tail's padding left out.
    """

    start: int
    stop: int
    exact: int
    pooled: int
    least: int
    most: int


@dataclass(frozen=True, eq=False, slots=True)
class Portion:
    """Many block rows, longest first, and the groups that they are computed in.

    `rows` int64 [P]; `exact` int64 [P, n] and `pooled` int64 [P, p] key tiles, padded by repeats of a row's last one;
    of them `counts` and `far` int64 [P] are a row's own; `tokens` int64 [P] as in groups.
    """

    rows: Tensor
    exact: Tensor
    pooled: Tensor
    counts: Tensor
    far: Tensor
    tokens: Tensor
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that lists alone don't tell: key tiles, tokens of a tile, and how many of the last one are padding.

    `heads`: the key head of every lane of rows ([0] for shared lists).
    """

    key_tiles: int
    block: int
    tail: int
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupSize:
    """Most columns of a group of several rows, a number of rows that is better divided, and most tiles of a portion."""

    columns: int
    multiple: int
    tiles: int


Csr = tuple[Tensor | None, Tensor | None]


class _Rows:
    """The block rows of all lanes, one after the other: how many exact and pooled tiles, and where they start."""

    def __init__(self, exact: Csr, pooled: Csr, shape: Shape) -> None:
        assert exact[0] is not None
        assert exact[1] is not None
        groups, rows, device = exact[0].shape[0], exact[0].shape[1] - 1, exact[1].device
        lanes = torch.arange(len(shape.heads), device=device)
        self.shift = (torch.tensor(shape.heads, device=device) * shape.key_tiles).repeat_interleave(rows)

        def of_lanes(offsets: Tensor) -> tuple[Tensor, Tensor]:
            bounds = offsets.long()[lanes % groups]
            return bounds[:, :-1].flatten(), (bounds[:, 1:] - bounds[:, :-1]).flatten()

        self.exact, self.pooled = exact[1], pooled[1]
        self.starts, self.counts = of_lanes(exact[0])
        self.far_starts, self.far = self.starts, torch.zeros_like(self.counts)
        if pooled[0] is not None:
            self.far_starts, self.far = of_lanes(pooled[0])
        self.tail = torch.zeros_like(self.counts, dtype=torch.bool)
        if shape.tail and exact[1].numel():
            last = exact[1][(self.starts + self.counts - 1).clamp(min=0)]
            self.tail = (self.counts > 0) & (last == shape.key_tiles - 1)

    def tiles_of(self, chosen: Tensor, most: int, far_most: int) -> tuple[Tensor, Tensor]:
        """Exact and pooled tiles of some rows, int64 [R, most] and [R, far_most], padded with their last ones."""
        return (
            self._pick(self.exact, self.starts, self.counts, chosen, most),
            self._pick(self.pooled, self.far_starts, self.far, chosen, far_most),
        )

    def _pick(self, indices: Tensor | None, starts: Tensor, counts: Tensor, chosen: Tensor, most: int) -> Tensor:
        if indices is None or most == 0:
            return chosen.new_empty(chosen.numel(), 0)
        places = torch.minimum(torch.arange(most, device=chosen.device), counts[chosen, None] - 1)
        return indices[places.add_(starts[chosen, None]).clamp_(min=0)] + self.shift[chosen, None]


def build(exact: Csr, pooled: Csr, shape: Shape) -> list[Unit]:
    """Units of one set of lists, longest rows first."""
    rows = _Rows(exact, pooled, shape)
    kind = (rows.counts * (shape.key_tiles + 1) + rows.far) * 2 + rows.tail
    kind, members = kind.sort(descending=True, stable=True)
    kinds, sizes = kind.unique_consecutive(return_counts=True)
    units = []
    for value, chosen in zip(kinds.tolist(), members.split(sizes.tolist()), strict=True):
        count, far_count = divmod(value // 2, shape.key_tiles + 1)
        if count + far_count:
            units.append(Unit(chosen, *rows.tiles_of(chosen, count, far_count), bool(value % 2)))
    return units


def build_portions(exact: Csr, pooled: Csr, shape: Shape, size: GroupSize) -> list[Portion]:
    """Portions of one set of lists; a row without any tile is in none."""
    rows = _Rows(exact, pooled, shape)
    tokens = rows.counts * shape.block - rows.tail * shape.tail
    kind = (rows.far > 0) * 2 + (rows.counts > 0)
    most = (shape.key_tiles + 1) * shape.block
    order = ((kind * most + tokens) * (shape.key_tiles + 1) + rows.far).argsort(descending=True, stable=True)
    own = rows.counts[order], rows.far[order], tokens[order]
    near, far, held = torch.stack(own).tolist()
    groups = _groups(near, far, held, size, shape.block)
    found = []
    for some in _runs(groups, size.tiles):
        part = slice(some[0].start, some[-1].stop)
        chosen = order[part]
        lists = rows.tiles_of(chosen, max(group.exact for group in some), max(group.pooled for group in some))
        here = [replace(group, start=group.start - part.start, stop=group.stop - part.start) for group in some]
        found.append(Portion(chosen, *lists, own[0][part], own[1][part], own[2][part], here))
    return found


def _groups(counts: list[int], far: list[int], tokens: list[int], size: GroupSize, block: int) -> list[Group]:
    """Rows, longest first of each kind, cut into groups of little padding."""
    found: list[Group] = []
    rows = next((row for row, tiles in enumerate(zip(counts, far, strict=True)) if not any(tiles)), len(counts))
    start = 0
    while start < rows:
        stop, used, pooled = start, 0, 0
        while stop < rows and (counts[stop] > 0, far[stop] > 0) == (counts[start] > 0, far[start] > 0):
            columns, wide = counts[stop] * block + far[stop], max(pooled, far[stop])
            room = (counts[start] * block + wide) * (stop + 1 - start)
            if stop > start and (room > size.columns or room - used - columns > WASTE * room):
                break
            stop, used, pooled = stop + 1, used + columns, wide
        if stop < rows and stop - start > size.multiple:
            stop -= (stop - start) % size.multiple
        pooled = max(far[start:stop])
        found.append(Group(start, stop, counts[start], pooled, tokens[stop - 1], tokens[start]))
        start = stop
    return found


def _runs(groups: list[Group], tiles: int) -> Iterator[list[Group]]:
    """Groups in runs of so many tiles at most, padded, unless one group has more."""
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


_UNITS: StorageCache[list[Unit]] = StorageCache()
_PORTIONS: StorageCache[list[Portion]] = StorageCache()


def schedule(exact: Csr, pooled: Csr, shape: Shape) -> list[Unit]:
    """The units of these lists, built on first use: a TileLists object is regrouped once, eager or compiled."""
    return _UNITS.get((*exact, *pooled), (shape,), lambda: build(exact, pooled, shape))


def schedule_portions(exact: Csr, pooled: Csr, shape: Shape, size: GroupSize) -> list[Portion]:
    """The portions of these lists, built on first use."""
    return _PORTIONS.get((*exact, *pooled), (shape, size), lambda: build_portions(exact, pooled, shape, size))
