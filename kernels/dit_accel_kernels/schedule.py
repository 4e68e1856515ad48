"""Schedules of the torch backend: block rows with equally long lists grouped into units, cached with the lists."""

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


def _rows(offsets: Tensor | None, indices: Tensor | None, key_tiles: int, heads: list[int], rows: int) -> list[Tensor]:
    """Key tiles of every block row of every lane, shifted by `key_tiles` times the key head of its list set."""
    if offsets is None or indices is None:
        return [torch.empty(0, dtype=torch.int64)] * (rows * len(heads))
    result: list[Tensor] = []
    all_indices = indices.to(torch.int64)
    bounds = offsets.tolist()
    groups = len(bounds)
    for lane, head in enumerate(heads):
        row = bounds[lane % groups]
        result += [all_indices[a:b] + head * key_tiles for a, b in pairwise(row)]
    return result


def build(
    exact: tuple[Tensor, Tensor],
    pooled: tuple[Tensor | None, Tensor | None],
    key_tiles: int,
    heads: list[int],
    ragged: bool,
) -> list[Unit]:
    """Units of one set of lists, longest rows first; `heads`: the key head of every lane ([0] for shared lists)."""
    rows = exact[0].shape[1] - 1
    device = exact[1].device
    exact_rows = _rows(exact[0].cpu(), exact[1].cpu(), key_tiles, heads, rows)
    pooled_rows = _rows(
        None if pooled[0] is None else pooled[0].cpu(),
        None if pooled[1] is None else pooled[1].cpu(),
        key_tiles,
        heads,
        rows,
    )
    kinds: dict[tuple[int, int, bool], list[int]] = {}
    for row, (e, p) in enumerate(zip(exact_rows, pooled_rows, strict=True)):
        tail = ragged and e.numel() > 0 and int(e[-1]) % key_tiles == key_tiles - 1
        if e.numel() + p.numel():
            kinds.setdefault((e.numel(), p.numel(), tail), []).append(row)
    return [
        Unit(
            torch.tensor(members, device=device),
            torch.stack([exact_rows[r] for r in members]).to(device),
            torch.stack([pooled_rows[r] for r in members]).to(device),
            tail,
        )
        for (_, _, tail), members in sorted(kinds.items(), key=lambda kind: kind[0], reverse=True)
    ]


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
