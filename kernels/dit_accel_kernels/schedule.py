"""Schedules of the torch backend: block rows with equally long lists grouped into units, cached with the lists."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_CAPACITY = 64


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


class _Cache:
    """Schedules by the storage of their lists: a TileLists object is regrouped once, eager or compiled.

    Keyed by storage and version, not by Python object: compiled graphs hand over aliases. A dead storage drops its
    entry.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple, tuple[list[StorageWeakRef], list[Unit]]] = OrderedDict()
        self._lock = Lock()

    def get(
        self,
        exact: tuple[Tensor, Tensor],
        pooled: tuple[Tensor | None, Tensor | None],
        key_tiles: int,
        heads: list[int],
        ragged: bool,
    ) -> list[Unit]:
        """The units of these lists, built on first use."""
        parts = [t for t in (*exact, *pooled) if t is not None]
        refs = [StorageWeakRef(t.untyped_storage()) for t in parts]
        key = (
            key_tiles,
            ragged,
            tuple(heads),
            *((r.cdata, t.storage_offset(), t.numel(), _version(t)) for r, t in zip(refs, parts, strict=True)),
        )
        with self._lock:
            found = self._entries.get(key)
            if found is not None and not any(r.expired() for r in found[0]):
                self._entries.move_to_end(key)
                return found[1]
        units = build(exact, pooled, key_tiles, heads, ragged)
        with self._lock:
            for stale in [k for k, (rs, _) in self._entries.items() if any(r.expired() for r in rs)]:
                del self._entries[stale]
            self._entries[key] = (refs, units)
            while len(self._entries) > _CAPACITY:
                self._entries.popitem(last=False)
        return units


def _version(tensor: Tensor) -> int:
    """In-place write counter, 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


schedule = _Cache().get
