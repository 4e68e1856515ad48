"""Masks inside tiles: which tiles a rule for pairs of tokens leaves whole, and the distinct bit masks of the others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .bits import pack_bits, word_count
from .csr import EXACT, PARTIAL, SKIPPED, check_int32
from .features import split_tiles

ALL = -1
"""Side of a window that has no end."""

Rows = Callable[[int, int, int], Tensor]
"""Which keys the queries of a range see: of list set, first query and one past the last, bool [queries, S_k]."""


def tiles_of_rows(
    rows: Rows, groups: int, block_q: int, block_k: int, num_q: int, num_k: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tile states uint8 [G, NQ, NK] (skipped, exact, partial) of a rule, and `mask_ids` and `mask_bits` of TileLists.

    One row of tiles is looked at at a time, so that memory is linear in the tokens. Masks are None where no tile is
    partial; each distinct one is kept once.
    """
    states, masks = [], []
    for group in range(groups):
        for first in range(0, num_q, block_q):
            seen = rows(group, first, min(first + block_q, num_q))
            whole = split_tiles(seen, 1, block_k, True).all(2).all(0)
            tiled = split_tiles(torch.nn.functional.pad(seen, (0, 0, 0, block_q - len(seen))), 1, block_k, False)
            state = torch.where(tiled.any(2).any(0), torch.where(whole, EXACT, PARTIAL), SKIPPED)
            states.append(state.to(torch.uint8))
            masks.append(pack_bits(tiled[:, state == PARTIAL]).transpose(0, 1))
    all_states = torch.stack(states).view(groups, -1, states[0].shape[0])
    partial = all_states[all_states >= EXACT] == PARTIAL
    if not bool(partial.any()):
        return all_states, None, None
    bits, numbers = torch.cat(masks).unique(dim=0, return_inverse=True)
    ids = torch.full(partial.shape, -1, dtype=torch.int32, device=device)
    ids[partial] = numbers.to(torch.int32)
    return all_states, ids, bits


def rows_of_mask_mod(mask_mod: Callable[..., Tensor], heads: int, num_k: int, device: torch.device) -> Rows:
    """The rule of a FlexAttention mask_mod (b, h, q_idx, kv_idx), evaluated by FlexAttention's own `create_mask`."""
    from torch.nn.attention.flex_attention import create_mask

    def rows(group: int, first: int, end: int) -> Tensor:
        batch, head = divmod(group, heads)

        def from_here(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b + batch, h + head, q_idx + first, kv_idx)

        seen = create_mask(from_here, 1, 1, end - first, num_k, device)[0, 0]
        if seen.dtype != torch.bool:
            raise TypeError(f"mask_mod must return torch.bool, True where a query sees a key; found {seen.dtype}")
        return seen

    return rows


def rows_of_block_mask(block_mask: Any) -> Rows:
    """The rule of a FlexAttention BlockMask: full blocks as they are listed, partial ones by its mask_mod."""
    (block_q, block_k), (num_q, num_k) = block_mask.BLOCK_SIZE, block_mask.seq_lengths
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    expected = [-(-num_q // block_q), -(-num_k // block_k)]
    if list(partial.shape[1:]) != expected:
        raise ValueError(
            f"block_mask must have {expected} blocks of {block_q} x {block_k} for its {num_q} queries and {num_k} "
            f"keys, found {list(partial.shape[1:])}"
        )
    device = partial.device
    by_rule = rows_of_mask_mod(block_mask.mask_mod, block_mask.kv_num_blocks.shape[1], num_k, device)
    k_block = torch.arange(num_k, device=device) // block_k

    def rows(group: int, first: int, end: int) -> Tensor:
        q_block = torch.arange(first, end, device=device) // block_q
        seen, ruled = (x[group, q_block][:, k_block] for x in (full, partial))
        return seen | (ruled & by_rule(group, first, end))

    return rows


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Padded rows counts [B, H, NQ] and indices [B, H, NQ, NK] as bool [B * H, NQ, NK]."""
    tiles = indices.shape[-1]
    used = torch.arange(tiles, device=indices.device) < counts[..., None]
    listed = torch.zeros(*counts.shape, tiles + 1, dtype=torch.bool, device=indices.device)
    return listed.scatter_(-1, indices.long().where(used, tiles), True)[..., :tiles].flatten(0, 1)


def rows_of_sequences(cu_q: Tensor, cu_k: Tensor, left: int, right: int) -> Rows:
    """The rule of packed sequences: a query sees so many keys of its own left and right of it (-1: all)."""
    q_ends = cu_q[1:].long()
    queries = torch.arange(int(cu_q[-1]), device=cu_q.device)
    sequence = torch.searchsorted(q_ends, queries, right=True)
    low, high = cu_k[:-1].long()[sequence], cu_k[1:].long()[sequence]
    own = queries - q_ends[sequence] + high  # the key at the same distance from the sequence's end
    low = low if left < 0 else torch.maximum(low, own - left)
    high = high if right < 0 else torch.minimum(high, own + right + 1)
    keys = torch.arange(int(cu_k[-1]), device=cu_q.device)
    return lambda _, first, end: (keys >= low[first:end, None]) & (keys < high[first:end, None])


def seen_by_mask(bits: Tensor, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether queries of a tile see keys of it by masks in `bits`, bool of the indices' shape."""
    return bits[mask, query, key // 32] >> key % 32 & 1 == 1


def check_offsets(name: str, offsets: Tensor) -> None:
    """Offsets of packed sequences: int32 or int64 [N + 1], from 0, never falling."""
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be torch.int32 or torch.int64, found {offsets.dtype}")
    if offsets.dim() != 1 or len(offsets) < 2:
        raise ValueError(f"{name} must be [N + 1] for N >= 1 sequences, found {list(offsets.shape)}")
    if int(offsets[0]) != 0 or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{name} must rise from 0 to the number of tokens, found {offsets.tolist()[:8]}")


def check_masks(ids: Tensor | None, bits: Tensor | None, entries: int, block_q: int, block_k: int) -> None:
    """Shapes, dtypes and devices of the masks of so many exact entries, without reading values."""
    if ids is None or bits is None:
        if ids is not bits:
            raise ValueError("mask_ids and mask_bits come together: give both or neither")
        return
    check_int32(mask_ids=ids, mask_bits=bits)
    if tuple(ids.shape) != (entries,):
        raise ValueError(f"mask_ids must be [{entries}] like exact_indices, found {list(ids.shape)}")
    words = word_count(block_k)
    if bits.dim() != 3 or tuple(bits.shape[1:]) != (block_q, words) or len(bits) == 0:
        raise ValueError(
            f"mask_bits must be [M, {block_q}, {words}] (block_q rows of ceil(block_k / 32) words) with M >= 1, found "
            f"{list(bits.shape)}"
        )
