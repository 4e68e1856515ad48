"""Masks inside tiles: which tiles a rule for pairs of tokens leaves whole, and the distinct bit masks of the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .bits import pack_bits, words_of
from .csr import EXACT, PARTIAL, SKIPPED
from .features import split_tiles

Rows = Callable[[int, int, int], Tensor]
"""Which keys the queries of a range see: of list set, first query and one past the last, bool [queries, S_k]."""


def tiles_of_rows(
    rows: Rows, groups: int, block_q: int, block_k: int, num_q: int, num_k: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tile states uint8 [G, NQ, NK] (skipped, exact, partial) of a rule, and `mask_ids` and `mask_bits` of TileLists.

    One row of tiles is looked at at a time, so that memory is linear in the tokens. Masks are None where no tile is
    partial; each distinct one is kept once.
    """
    known: dict[bytes, int] = {}
    masks: list[Tensor] = []
    states, ids = [], []
    for group in range(groups):
        for first in range(0, num_q, block_q):
            seen = rows(group, first, min(first + block_q, num_q))
            whole = split_tiles(seen, 1, block_k, True).all(2).all(0)
            tiled = split_tiles(torch.nn.functional.pad(seen, (0, 0, 0, block_q - len(seen))), 1, block_k, False)
            state = torch.where(tiled.any(2).any(0), torch.where(whole, EXACT, PARTIAL), SKIPPED)
            states.append(state.to(torch.uint8))
            listed = state[state != SKIPPED]
            packed = pack_bits(tiled[:, state == PARTIAL]).transpose(0, 1).contiguous().cpu()
            own = []
            for mask in packed:
                found = known.setdefault(mask.numpy().tobytes(), len(masks))
                if found == len(masks):
                    masks.append(mask)
                own.append(found)
            entry = torch.full(listed.shape, -1, dtype=torch.int32, device=device)
            entry[listed == PARTIAL] = torch.tensor(own, dtype=torch.int32, device=device)
            ids.append(entry)
    all_states = torch.stack(states).view(groups, -1, states[0].shape[0])
    if not masks:
        return all_states, None, None
    return all_states, torch.cat(ids), torch.stack(masks).to(device)


def check_masks(ids: Tensor | None, bits: Tensor | None, entries: int, block_q: int, block_k: int) -> None:
    """Shapes, dtypes and devices of the masks of so many exact entries, without reading values."""
    if ids is None or bits is None:
        if ids is not bits:
            raise ValueError("mask_ids and mask_bits come together: give both or neither")
        return
    for name, tensor in (("mask_ids", ids), ("mask_bits", bits)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, found {tensor.dtype}")
    if tuple(ids.shape) != (entries,):
        raise ValueError(f"mask_ids must be [{entries}] like exact_indices, found {list(ids.shape)}")
    words = words_of(block_k)
    if bits.dim() != 3 or tuple(bits.shape[1:]) != (block_q, words) or len(bits) == 0:
        raise ValueError(
            f"mask_bits must be [M, {block_q}, {words}] (block_q rows of ceil(block_k / 32) words) with M >= 1, found "
            f"{list(bits.shape)}"
        )
    if ids.device != bits.device:
        raise ValueError(f"mask_ids and mask_bits must share a device, found {ids.device} and {bits.device}")


def check_mask_ids(ids: Tensor | None, bits: Tensor | None) -> None:
    """Values of the ids: -1 or the number of a mask."""
    if ids is None or bits is None or ids.numel() == 0:
        return
    low, high = map(int, ids.aminmax())
    if low < -1 or high >= len(bits):
        position = int(((ids < -1) | (ids >= len(bits))).nonzero()[0])
        raise ValueError(
            f"mask_ids must lie in -1..{len(bits) - 1} ({len(bits)} masks), found {int(ids[position])} at position "
            f"{position}"
        )
