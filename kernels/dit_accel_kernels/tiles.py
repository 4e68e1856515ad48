"""Tile lists: which key tiles every query tile of queries visits exactly, visits as one pooled key, or skips.

Tokens are cut into tiles of `block_q` queries and `block_k` keys; the last tile of each side may be ragged. The lists
are CSR: one row of ascending key-tile indices for each query tile, shared by all batches and heads (G = 1) or one set
each (G = H or B*H).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import csr, masks
from .bits import word_count
from .cache import StorageCache, changed, count_writes
from .csr import EXACT, PARTIAL, POOLED

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

PARTS = ("exact_offsets", "exact_indices", "pooled_offsets", "pooled_indices", "mask_ids", "mask_bits")


class Grid:
    """What follows from tile sides, tokens and lists, for TileLists and for the Problem of a call by them."""

    __slots__ = ()
    block_q: int
    block_k: int
    num_q: int
    num_k: int
    exact_offsets: Tensor
    exact_indices: Tensor

    @property
    def parts(self) -> dict[str, Any]:
        """The lists' tensors by name, None for those that are not there."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def sizes(self) -> dict[str, Any]:
        """Tile sides and tokens by name."""
        return {"block_q": self.block_q, "block_k": self.block_k, "num_q": self.num_q, "num_k": self.num_k}

    @property
    def groups(self) -> int:
        """Number of list sets, G: 1 (shared), H (per head) or B*H."""
        return self.exact_offsets.shape[0]

    @property
    def query_tiles(self) -> int:
        """Number of query tiles, NQ."""
        return -(-self.num_q // self.block_q)

    @property
    def key_tiles(self) -> int:
        """Number of key tiles, NK."""
        return -(-self.num_k // self.block_k)

    @property
    def tiles_total(self) -> int:
        """Tiles of all G list sets together, G * NQ * NK."""
        return self.groups * self.query_tiles * self.key_tiles

    @property
    def tiles_exact(self) -> int:
        """Exact tiles of all list sets together."""
        return self.exact_indices.numel()

    @property
    def density(self) -> float:
        """Share of tiles that are exact, in [0, 1]; pooled tiles do not count."""
        return self.tiles_exact / self.tiles_total


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class TileLists(Grid):
    """Exact and pooled key tiles of every query tile; what is in neither list is skipped.

    `exact_offsets` and `pooled_offsets` are int32 [G, NQ + 1], absolute positions in `exact_indices` and
    `pooled_indices` (int32 [nnz], ascending within a row). `num_q` and `num_k` count tokens. Creation checks shapes and
    dtypes, with ValueError or TypeError, and never reads the values (no device sync); `validate` reads them.

    An exact tile may have a mask, and is a *partial* tile then: `mask_ids` int32 [nnz], beside `exact_indices`, is -1
    where every pair of a tile counts, else the number of a mask in `mask_bits` int32 [M, block_q, ceil(block_k / 32)],
    where bit j % 32 of word [m, r, j // 32] is set if the tile's query r sees its key j. `from_mask` makes them.

    Tensors made under `torch.inference_mode` are copied, since nothing could tell that they changed. What backends
    derive from lists lives as long as these tensors do. Writes by torch's own operations are followed, and on a CPU all
    others too. On a GPU, kernels of one's own (Triton, CUDA, CuPy) write unseen: call `changed` after them. A captured
    CUDA graph goes on with the lists as they were at its capture, whatever is written to them between replays, also by
    `copy_`: capture it again. Lists that were captured stay in memory until `release_captured()`.
    """

    block_q: int
    block_k: int
    num_q: int
    num_k: int
    exact_offsets: Tensor
    exact_indices: Tensor
    pooled_offsets: Tensor | None = None
    pooled_indices: Tensor | None = None
    mask_ids: Tensor | None = None
    mask_bits: Tensor | None = None

    def __post_init__(self) -> None:
        count_writes(self, PARTS)
        _check_sizes(**self.sizes)
        if (self.pooled_offsets is None) != (self.pooled_indices is None):
            raise ValueError("pooled_offsets and pooled_indices come together: give both or neither")
        csr.check_csr("exact", self.exact_offsets, self.exact_indices, self.query_tiles)
        if self.pooled_offsets is not None:
            assert self.pooled_indices is not None
            csr.check_csr("pooled", self.pooled_offsets, self.pooled_indices, self.query_tiles)
            if self.pooled_offsets.shape != self.exact_offsets.shape:
                raise ValueError(
                    f"pooled_offsets must have the shape of exact_offsets, {tuple(self.exact_offsets.shape)}, "
                    f"found {tuple(self.pooled_offsets.shape)}"
                )
        masks.check_masks(self.mask_ids, self.mask_bits, self.tiles_exact, self.block_q, self.block_k)

    @classmethod
    def from_states(cls, states: Tensor, *, block_q: int, block_k: int, num_q: int, num_k: int) -> TileLists:
        """Lists from tile states uint8 [NQ, NK] or [G, NQ, NK], each SKIPPED (0), POOLED (1) or EXACT (2)."""
        if states.dtype != torch.uint8:
            raise TypeError(f"states must be torch.uint8, found {states.dtype}")
        if states.dim() == 2:
            states = states[None]
        expected = (-(-num_q // block_q), -(-num_k // block_k))
        if states.dim() != 3 or tuple(states.shape[1:]) != expected:
            raise ValueError(
                f"states must be [G, {expected[0]}, {expected[1]}] for {num_q} x {num_k} tokens in tiles of "
                f"{block_q} x {block_k}, found {list(states.shape)}"
            )
        if states.numel() and int(states.max()) > EXACT:
            raise ValueError(f"states must be 0 (skipped), 1 (pooled) or 2 (exact), found {int(states.max())}")
        return cls._of_states(states, None, None, block_q=block_q, block_k=block_k, num_q=num_q, num_k=num_k)

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_q: int, block_k: int) -> TileLists:
        """Lists of the tiles that a mask leaves, exactly: whole ones, and partial ones with their part of the mask.

        `mask` is bool [S_q, S_k], [G, S_q, S_k] or [B, H, S_q, S_k] (G = B * H), True where a query sees a key, else
        TypeError or ValueError is raised; `block_q` and `block_k` are a tile's queries and keys.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool, True where a query sees a key; found {mask.dtype}")
        if mask.dim() not in (2, 3, 4):
            raise ValueError(f"mask must be [S_q, S_k], [G, S_q, S_k] or [B, H, S_q, S_k], found {list(mask.shape)}")
        mask = mask.reshape(-1, *mask.shape[-2:])
        sizes = (block_q, block_k, *mask.shape[1:])
        return cls._of_rows(lambda g, first, end: mask[g, first:end], len(mask), mask.device, *sizes)

    @classmethod
    def from_mask_mod(
        cls, mask_mod: Callable[..., Tensor], *, block_q: int, block_k: int, num_q: int, num_k: int,
        batch: int | None = None, heads: int | None = None, device: torch.device | str = "cpu",
    ) -> TileLists:  # fmt: skip
        """Lists of what a FlexAttention mask_mod lets through, exactly, in memory linear in the tokens.

        Args:
            mask_mod: function of 0-d tensors b, h, q_idx, kv_idx, of positions in the tiled order; bool (else TypeError
                is raised), True where the query sees the key. It is mapped over them row of tiles by row of tiles.
            block_q: queries of a tile; `block_k` are keys of a tile, `num_q` and `num_k` tokens.
            batch: as FlexAttention's B and H, so are `heads`: None where the mask is one for all. A mask by batch needs
                `heads` too, else ValueError is raised.
            device: where the mask is evaluated, on which its tensors are, and the lists.
        """
        batch = batch or 1
        if heads is None and batch > 1:
            raise ValueError(f"a mask by batch needs the number of heads too, found batch={batch} and heads=None")
        heads, device = heads or 1, torch.device(device)
        rows = masks.rows_of_mask_mod(mask_mod, heads, num_k, device)
        return cls._of_rows(rows, batch * heads, device, block_q, block_k, num_q, num_k)

    @classmethod
    def from_block_mask(
        cls, block_mask: BlockMask, *, block_q: int | None = None, block_k: int | None = None
    ) -> TileLists:
        """Lists of what FlexAttention would see by a BlockMask, exactly: its full blocks, and partial ones by mask_mod.

        The lists will be on its device, with `block_q` queries and `block_k` keys a tile: the BlockMask's own by
        default, any others are converted. Raises TypeError or ValueError for what is no BlockMask, blocks that don't
        fit its lengths, a mask by batch and not by head.
        """
        if not hasattr(block_mask, "seq_lengths"):
            raise TypeError(f"block_mask must be FlexAttention's BlockMask, found {type(block_mask).__name__}")
        own_q, own_k = block_mask.BLOCK_SIZE
        batch, heads = block_mask.kv_num_blocks.shape[:2]
        if batch > 1 and heads == 1:
            raise ValueError(f"a mask by batch must be one by head too, found a block_mask of {batch} x 1: repeat it")
        rows, sizes = masks.rows_of_block_mask(block_mask), (block_q or own_q, block_k or own_k)
        return cls._of_rows(rows, batch * heads, block_mask.kv_indices.device, *sizes, *block_mask.seq_lengths)

    @classmethod
    def from_cu_seqlens(
        cls, cu_q: Tensor, cu_k: Tensor | None = None, *, block_q: int, block_k: int, causal: bool = False,
        window: tuple[int, int] | None = None,
    ) -> TileLists:  # fmt: skip
        """Lists of sequences packed into one, [1, total, H, D], each of which sees itself alone; flash-attn's varlen.

        Args:
            cu_q: int32 or int64 [N + 1], where each sequence's queries begin, from 0 to their total.
            cu_k: the same for keys; those of the queries by default.
            block_q: queries of a tile, and `block_k` keys.
            causal: no key after the query. With unequal lengths the last query stands at the last key, as in
                flash-attn; a query before the first key sees none, and its output is 0.
            window: so many keys to the left and to the right of the query, -1 for all of them.

        Raises TypeError or ValueError for offsets that are none.
        """
        cu_k = cu_q if cu_k is None else cu_k
        masks.check_offsets("cu_q", cu_q)
        masks.check_offsets("cu_k", cu_k)
        if len(cu_q) != len(cu_k) or cu_q.device != cu_k.device:
            raise ValueError(
                f"cu_q and cu_k must be of the same sequences on one device, found {len(cu_q) - 1} on {cu_q.device} "
                f"and {len(cu_k) - 1} on {cu_k.device}"
            )
        left, right = window or (masks.ALL, masks.ALL)
        rows = masks.rows_of_sequences(cu_q, cu_k, left, 0 if causal else right)
        return cls._of_rows(rows, 1, cu_q.device, block_q, block_k, int(cu_q[-1]), int(cu_k[-1]))

    @classmethod
    def _of_rows(cls, rows: masks.Rows, groups: int, device: torch.device, *numbers: int) -> TileLists:
        sizes = dict(zip(("block_q", "block_k", "num_q", "num_k"), numbers, strict=True))
        _check_sizes(**sizes)
        return cls._of_states(*masks.tiles_of_rows(rows, groups, device=device, **sizes), **sizes)

    @classmethod
    def _of_states(cls, states: Tensor, mask_ids: Tensor | None, mask_bits: Tensor | None, **sizes: int) -> TileLists:
        pooled = csr.csr_of(states == POOLED)
        parts = (*csr.csr_of(states >= EXACT), *(pooled if len(pooled[1]) else (None, None)), mask_ids, mask_bits)
        named: dict[str, Any] = {**sizes, **dict(zip(PARTS, parts, strict=True))}
        return cls(**named)

    @classmethod
    def full(
        cls, num_q: int, num_k: int, *, block_q: int, block_k: int, device: torch.device | str = "cpu"
    ) -> TileLists:
        """Lists in which every tile is exact: dense attention. The same object for the same sizes and device."""
        return _full(num_q, num_k, block_q, block_k).to(device)

    @property
    def tiles_pooled(self) -> int:
        """Pooled tiles of all list sets together."""
        return 0 if self.pooled_indices is None else self.pooled_indices.numel()

    @property
    def device(self) -> torch.device:
        """Device of the lists."""
        return self.exact_indices.device

    def to(self, device: torch.device | str) -> TileLists:
        """The same lists on `device`, copied once; the same object if they are there already."""
        device = torch.empty((), device=device).device  # "cuda" is the current one of them
        if device == self.device:
            return self
        parts = self.parts

        def copy() -> TileLists:
            return replace(self, **{name: None if x is None else x.to(device) for name, x in parts.items()})

        return _COPIES.get(parts.values(), (device, *self.sizes.values()), copy)

    def states(self) -> Tensor:
        """Tile states uint8 [G, NQ, NK]: the inverse of `from_states`, but for partial tiles, which are 3."""
        states = torch.zeros(self.groups, self.query_tiles, self.key_tiles, dtype=torch.uint8, device=self.device)
        exact = EXACT if self.mask_ids is None else (self.mask_ids >= 0).to(torch.uint8) + EXACT
        for value, offsets, indices in (
            (POOLED, self.pooled_offsets, self.pooled_indices),
            (exact, self.exact_offsets, self.exact_indices),
        ):
            if offsets is not None:
                assert indices is not None
                states.view(-1)[csr.row_of_entry(offsets, indices.numel()) * self.key_tiles + indices] = value
        return states

    def mask_table(self) -> tuple[Tensor, Tensor]:
        """The number of each exact tile's mask, int64 [G, NQ, NK], and the masks, int32 [M', block_q, W].

        The last masks hide nothing. M' is a power of 2, so that what is compiled for a number of masks serves others.
        """
        bits = self.exact_indices.new_empty(0, self.block_q, word_count(self.block_k))
        bits = bits if self.mask_bits is None else self.mask_bits
        size = 1 << len(bits).bit_length()
        bits = torch.nn.functional.pad(bits, (0, 0, 0, 0, 0, size - len(bits)), value=-1)
        table = self.exact_indices.new_zeros(self.groups * self.query_tiles, self.key_tiles, dtype=torch.int64)
        if self.mask_ids is not None:
            row = csr.row_of_entry(self.exact_offsets, self.tiles_exact)
            table[row, self.exact_indices.long()] = self.mask_ids.long() % size
        return table.view(self.groups, self.query_tiles, self.key_tiles), bits

    def to_block_mask(self, heads: int | None = None) -> BlockMask:
        """The lists as a BlockMask of FlexAttention, which masks exactly what they mask.

        `heads` is H where the lists are those of every batch and head; all G list sets are heads by default. Raises
        ValueError for pooled tiles, which FlexAttention has not, and heads that don't divide the list sets.
        """
        from torch.nn.attention.flex_attention import BlockMask

        heads = self.groups if heads is None else heads
        if self.tiles_pooled:
            raise ValueError(
                f"a BlockMask has no pooled tiles, found {self.tiles_pooled}: make them exact or skip them"
            )
        if heads < 1 or self.groups % heads:
            raise ValueError(f"heads must divide the {self.groups} list sets, found {heads}")
        table, bits = self.mask_table()
        states, table = (x.view(-1, heads, *x.shape[1:]) for x in (self.states(), table))

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            place = (b % states.shape[0], h % heads, q_idx // self.block_q, kv_idx // self.block_k)
            inside = masks.seen_by_mask(bits, table[place], q_idx % self.block_q, kv_idx % self.block_k)
            return (states[place] >= EXACT) & inside

        return BlockMask.from_kv_blocks(
            *csr.padded_rows(states == PARTIAL),
            *csr.padded_rows(states == EXACT),
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=mask_mod,
            seq_lengths=(self.num_q, self.num_k),
        )

    def changed(self) -> None:
        """Tell that the lists were written to by a kernel that torch knows nothing of; see above."""
        changed(self.parts.values())

    def validate(self) -> TileLists:
        """Read every value: offsets rise to nnz, indices ascend in range, no tile is exact and pooled; returns self.

        Calls on a CPU do this by themselves, once until the lists change; elsewhere they do where the environment
        variable DIT_ACCEL_VALIDATE is 1, each time, since it waits for the device. Raises ValueError with the position
        of a value that doesn't fit and what it may be.
        """
        if self.mask_ids is not None:
            assert self.mask_bits is not None
            count = len(self.mask_bits)
            csr.check_range("mask_ids", self.mask_ids, -1, count - 1, f"{count} masks")
        exact = csr.check_lists("exact", self.exact_offsets, self.exact_indices, self.key_tiles)
        if self.pooled_offsets is not None:
            assert self.pooled_indices is not None
            pooled = csr.check_lists("pooled", self.pooled_offsets, self.pooled_indices, self.key_tiles)
            both = exact[torch.isin(exact, pooled)]
            if both.numel():
                row, tile = divmod(int(both[0]), self.key_tiles)
                where = csr.spelled(row, self.exact_offsets)
                raise ValueError(f"a tile is exact or pooled, not both: found tile {tile} twice {where}")
        return self


_COPIES: StorageCache[TileLists] = StorageCache()


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, found {size}")


@lru_cache(maxsize=16)
def _full(num_q: int, num_k: int, block_q: int, block_k: int) -> TileLists:
    _check_sizes(num_q=num_q, num_k=num_k, block_q=block_q, block_k=block_k)
    states = torch.full((-(-num_q // block_q), -(-num_k // block_k)), EXACT, dtype=torch.uint8)
    return TileLists.from_states(states, block_q=block_q, block_k=block_k, num_q=num_q, num_k=num_k)
