"""Tile states, and lists of tiles by rows (CSR): made of booleans, read by entry or padded, values checked."""

from collections.abc import Callable

import torch
from torch import Tensor

SKIPPED = 0
"""State of a tile that is absent."""
POOLED = 1
"""State of a tile that enters as one key: the mean of its keys, with their number."""
EXACT = 2
"""State of a tile whose keys enter as they are."""
PARTIAL = 3
"""State of a tile that is exact but for what a mask of bits hides."""

_INT32_MAX = torch.iinfo(torch.int32).max


def csr_of(selected: Tensor) -> tuple[Tensor, Tensor]:
    """CSR of a boolean [G, NQ, NK]: absolute offsets int32 [G, NQ + 1] and ascending indices int32 [nnz]."""
    groups, rows, _ = selected.shape
    indices = selected.nonzero()[:, 2].to(torch.int32)
    if indices.numel() > _INT32_MAX:
        raise ValueError(f"tile lists hold at most {_INT32_MAX} entries, found {indices.numel()}: use larger tiles")
    ends = selected.sum(-1, dtype=torch.int64).flatten().cumsum(0).view(groups, rows)
    starts = torch.cat([ends.new_zeros(1), ends[:-1, -1]])
    return torch.cat([starts[:, None], ends], 1).to(torch.int32), indices


def row_of_entry(offsets: Tensor, entries: int) -> Tensor:
    """Row g * NQ + i of every entry of a CSR with offsets [G, NQ + 1], int64 [nnz], without a device sync."""
    counts = (offsets[:, 1:] - offsets[:, :-1]).flatten()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=offsets.device), counts, output_size=entries)


def padded_rows(chosen: Tensor, read: bool = False) -> tuple[Tensor, Tensor]:
    """Bool [.., NK] as counts int32 [..] and ascending indices int32 [.., N], which come before what pads them.

    N is NK, or if `read` the longest row's count, which is read from the device.
    """
    counts = chosen.sum(-1, dtype=torch.int32)
    width = max(1, int(counts.max())) if read else chosen.shape[-1]
    indices = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
    return counts, indices.to(torch.int32)


def check_csr(name: str, offsets: Tensor, indices: Tensor, rows: int) -> None:
    """Shapes, dtypes and devices of one CSR, without reading values."""
    check_int32(**{f"{name}_offsets": offsets, f"{name}_indices": indices})
    if offsets.dim() != 2 or offsets.shape[1] != rows + 1:
        raise ValueError(f"{name}_offsets must be [G, {rows + 1}] for {rows} query tiles, found {list(offsets.shape)}")
    if indices.dim() != 1:
        raise ValueError(f"{name}_indices must have one dimension, found {list(indices.shape)}")


def check_int32(**tensors: Tensor) -> None:
    """Raise where one of two tensors is not int32 or they lie on two devices."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, found {tensor.dtype}")
    first, second = (tensor.device for tensor in tensors.values())
    if first != second:
        raise ValueError(f"{' and '.join(tensors)} must share a device, found {first} and {second}")


def check_range(
    name: str, values: Tensor, low: int, high: int, what: str, where: Callable[[int], str] = lambda position: ""
) -> None:
    """Raise with the first of some values that lies outside of low..high; `where` adds to the text."""
    outside = (values < low) | (values > high)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        found = f"found {int(values[i])} at position {i}{where(i)}"
        raise ValueError(f"{name} must lie in {low}..{high} ({what}), {found}")


def check_lists(name: str, offsets: Tensor, indices: Tensor, tiles: int) -> Tensor:
    """Values of one CSR: offsets rise from 0 to nnz, indices lie in range and ascend strictly in a row.

    Returns where each entry is among all tiles of all rows, int64 [nnz].
    """
    flat = torch.cat([offsets[:1, 0], offsets[:, 1:].flatten()])
    if int(flat[0]) != 0 or int(flat[-1]) != indices.numel() or bool((flat[1:] < flat[:-1]).any()):
        raise ValueError(f"{name}_offsets must rise from 0 to {indices.numel()}, found {flat.tolist()[:8]}")
    if bool((offsets[1:, 0] != offsets[:-1, -1]).any()):
        found = f"found {offsets[1:, 0].tolist()[:8]} after {offsets[:-1, -1].tolist()[:8]}"
        raise ValueError(f"{name}_offsets are absolute: every list set must start where the one before ends, {found}")
    rows = row_of_entry(offsets, indices.numel())
    check_range(
        f"{name}_indices", indices, 0, tiles - 1, f"NK = {tiles} key tiles", lambda i: f", {spelled(rows[i], offsets)}"
    )
    keys = rows * tiles + indices
    repeats = keys[1:] <= keys[:-1]
    if bool(repeats.any()):
        i = int(repeats.nonzero()[0]) + 1
        raise ValueError(
            f"{name}_indices must ascend strictly in every query tile, found {int(indices[i])} after "
            f"{int(indices[i - 1])} at position {i}, {spelled(rows[i], offsets)}: sort them, remove repeats"
        )
    return keys


def spelled(row: Tensor | int, offsets: Tensor) -> str:
    """A row of lists in words."""
    group, tile = divmod(int(row), offsets.shape[1] - 1)
    return f"in query tile {tile} of list set {group}"
