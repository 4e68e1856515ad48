"""Schedules of the torch backend: block rows with equally long lists grouped into units, cached with the lists.

Lists that change at every call are not grouped: their block rows are cut into runs of about the same work.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel_kernels.cache import StorageCache


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


@dataclass(frozen=True, eq=False, slots=True)
class Entries:
    """The key tiles of consecutive block rows as they come: `tiles` int64 [nnz], row r from starts[r] to starts[r + 1].

    Tiles ascend in a row and are shifted like a unit's.
    """

    tiles: Tensor
    starts: list[int]

    @property
    def counts(self) -> list[int]:
        """Tiles of every row."""
        return [b - a for a, b in pairwise(self.starts)]

    def split(self, values: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """One value an entry, cut by row: those of these rows."""
        starts = self.starts[rows.start : rows.stop + 1]
        return values[starts[0] : starts[-1]].split([b - a for a, b in pairwise(starts)])


def entries_of(offsets: Tensor, indices: Tensor, key_tiles: int, heads: list[int]) -> Entries:
    """The entries of all lanes, one after the other; `heads`: the key head of every lane (lists repeat, if fewer)."""
    repeats = len(heads) // offsets.shape[0]
    sizes = (offsets[:, -1] - offsets[:, 0]).long().repeat(repeats)
    shift = (torch.tensor(heads, device=indices.device) * key_tiles).repeat_interleave(sizes)
    ends = offsets[:, 1:].flatten() + indices.numel() * torch.arange(repeats, device=indices.device)[:, None]
    return Entries(indices.repeat(repeats) + shift, [0, *ends.flatten().tolist()])


def runs(columns: list[int], pieces: int) -> list[slice]:
    """Block rows cut into at most so many runs of about as many columns each."""
    total = max(1, sum(columns))
    found, start, done = [], 0, 0
    for row, count in enumerate(columns):
        done += count
        if done * pieces >= total * (len(found) + 1) or row + 1 == len(columns):
            found.append(slice(start, row + 1))
            start = row + 1
    return found


def build(
    exact: tuple[Tensor, Tensor],
    pooled: tuple[Tensor | None, Tensor | None],
    key_tiles: int,
    heads: list[int],
    ragged: bool,
) -> list[Unit]:
    """Units of one set of lists, longest rows first; `heads`: the key head of every lane ([0] for shared lists)."""
    groups, rows, device = exact[0].shape[0], exact[0].shape[1] - 1, exact[1].device
    lanes = torch.arange(len(heads), device=device)
    shift = (torch.tensor(heads, device=device) * key_tiles).repeat_interleave(rows)

    def of_lanes(offsets: Tensor) -> tuple[Tensor, Tensor]:
        bounds = offsets.long()[lanes % groups]
        return bounds[:, :-1].flatten(), (bounds[:, 1:] - bounds[:, :-1]).flatten()

    starts, counts = of_lanes(exact[0])
    far_starts, far_counts = (torch.zeros_like(starts),) * 2 if pooled[0] is None else of_lanes(pooled[0])
    tail = torch.zeros_like(counts, dtype=torch.bool)
    if ragged and exact[1].numel():
        tail = (counts > 0) & (exact[1][(starts + counts - 1).clamp(min=0)] == key_tiles - 1)
    kind = (counts * (key_tiles + 1) + far_counts) * 2 + tail
    kind, members = kind.sort(descending=True, stable=True)
    kinds, sizes = kind.unique_consecutive(return_counts=True)

    def pick(indices: Tensor | None, first: Tensor, chosen: Tensor, count: int) -> Tensor:
        if indices is None or count == 0:
            return chosen.new_empty(chosen.numel(), 0)
        places = first[chosen][:, None] + torch.arange(count, device=device)
        return indices[places] + shift[chosen][:, None]

    units = []
    for value, chosen in zip(kinds.tolist(), members.split(sizes.tolist()), strict=True):
        count, far_count = divmod(value // 2, key_tiles + 1)
        if count + far_count:
            near, far = pick(exact[1], starts, chosen, count), pick(pooled[1], far_starts, chosen, far_count)
            units.append(Unit(chosen, near, far, bool(value % 2)))
    return units


_CACHE: StorageCache[list[Unit]] = StorageCache()


def schedule(
    exact: tuple[Tensor, Tensor],
    pooled: tuple[Tensor | None, Tensor | None],
    key_tiles: int,
    heads: list[int],
    ragged: bool,
) -> list[Unit]:
    """The units of these lists, built on first use: a TileLists object is regrouped once, eager or compiled."""
    return _CACHE.get(
        (*exact, *pooled),
        (key_tiles, ragged, tuple(heads)),
        lambda: build(exact, pooled, key_tiles, heads, ragged),
    )
