"""Tile states, and lists of tiles by rows (CSR): made of booleans, read by entry or padded, values checked."""

from __future__ import annotations

import torch
from torch import Tensor

SKIPPED, POOLED, EXACT, PARTIAL = 0, 1, 2, 3

_INT32_MAX = 2**31 - 1


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
    return counts, indices.to(torch.int32).contiguous()


def check_csr(name: str, offsets: Tensor, indices: Tensor, rows: int) -> None:
    """Shapes, dtypes and devices of one CSR, without reading values."""
    for part, tensor in (("offsets", offsets), ("indices", indices)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}_{part} must be torch.int32, found {tensor.dtype}")
    if offsets.dim() != 2 or offsets.shape[1] != rows + 1:
        raise ValueError(f"{name}_offsets must be [G, {rows + 1}] for {rows} query tiles, found {list(offsets.shape)}")
    if indices.dim() != 1:
        raise ValueError(f"{name}_indices must have one dimension, found {list(indices.shape)}")
    if offsets.device != indices.device:
        raise ValueError(
            f"{name}_offsets and {name}_indices must share a device, found {offsets.device} and {indices.device}"
        )


def check_values(name: str, offsets: Tensor, indices: Tensor, tiles: int) -> None:
    """Values of one CSR: offsets rise from 0 to nnz, indices lie in range and ascend strictly in a row."""
    flat = torch.cat([offsets[:1, 0], offsets[:, 1:].flatten()])
    if int(flat[0]) != 0 or int(flat[-1]) != indices.numel() or bool((flat[1:] < flat[:-1]).any()):
        raise ValueError(f"{name}_offsets must rise from 0 to {indices.numel()}, found {flat.tolist()[:8]}")
    if bool((offsets[1:, 0] != offsets[:-1, -1]).any()):
        found = f"found {offsets[1:, 0].tolist()[:8]} after {offsets[:-1, -1].tolist()[:8]}"
        raise ValueError(f"{name}_offsets are absolute: every list set must start where the one before ends, {found}")
    if indices.numel() == 0:
        return
    rows = row_of_entry(offsets, indices.numel())
    low, high = map(int, indices.aminmax())
    if low < 0 or high >= tiles:
        position = int(((indices < 0) | (indices >= tiles)).nonzero()[0])
        raise ValueError(
            f"{name}_indices must lie in 0..{tiles - 1} (NK = {tiles} key tiles), found {int(indices[position])} at "
            f"position {position}, {spelled(rows[position], offsets)}"
        )
    keys = rows * tiles + indices
    repeats = keys[1:] <= keys[:-1]
    if bool(repeats.any()):
        position = int(repeats.nonzero()[0]) + 1
        raise ValueError(
            f"{name}_indices must ascend strictly in every query tile, found {int(indices[position])} after "
            f"{int(indices[position - 1])} at position {position}, {spelled(rows[position], offsets)}: sort them, "
            "remove repeats"
        )


def spelled(row: Tensor | int, offsets: Tensor) -> str:
    """A row of lists in words."""
    group, tile = divmod(int(row), offsets.shape[1] - 1)
    return f"in query tile {tile} of list set {group}"
