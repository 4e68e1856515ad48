"""Tile lists: which key tiles every query tile of queries visits exactly, visits as one pooled key, or skips.

Tokens are cut into tiles of `block_q` queries and `block_k` keys; the last tile of each side may be ragged. The lists
are CSR: one row of ascending key-tile indices for each query tile, shared by all batches and heads (G = 1) or one set
each (G = H or B*H).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .cache import StorageCache, changed, count_writes

SKIPPED, POOLED, EXACT = 0, 1, 2

_INT32_MAX = 2**31 - 1
PARTS = ("exact_offsets", "exact_indices", "pooled_offsets", "pooled_indices")


def _csr(selected: Tensor) -> tuple[Tensor, Tensor]:
    """CSR of a boolean [G, NQ, NK]: absolute offsets int32 [G, NQ + 1] and ascending indices int32 [nnz]."""
    groups, rows, _ = selected.shape
    indices = selected.nonzero()[:, 2].to(torch.int32)
    if indices.numel() > _INT32_MAX:
        raise ValueError(f"tile lists hold at most {_INT32_MAX} entries, found {indices.numel()}: use larger tiles")
    ends = selected.sum(-1, dtype=torch.int64).flatten().cumsum(0).view(groups, rows)
    starts = torch.cat([ends.new_zeros(1), ends[:-1, -1]])
    return torch.cat([starts[:, None], ends], 1).to(torch.int32), indices


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class TileLists:
    """Exact and pooled key tiles of every query tile; what is in neither list is skipped.

    `exact_offsets` and `pooled_offsets` are int32 [G, NQ + 1], absolute positions in `exact_indices` and
    `pooled_indices` (int32 [nnz], ascending within a row). `num_q` and `num_k` count tokens. Creation checks shapes and
    dtypes only and never reads the values (no device sync); `validate` reads them. Raises ValueError or TypeError where
    the parts don't fit. Tensors made under `torch.inference_mode` are copied, since nothing could tell that they
    changed.

    What backends derive from lists lives as long as these tensors do. Writes by torch's own operations are followed,
    and on a CPU all others too. On a GPU, kernels of one's own (Triton, CUDA, CuPy) write unseen: call `changed` after
    them. A captured CUDA graph goes on with the lists as they were at its capture, whatever is written to them between
    replays, also by `copy_`: capture it again. Lists that were captured stay in memory until `release_captured()`.
    """

    block_q: int
    block_k: int
    num_q: int
    num_k: int
    exact_offsets: Tensor
    exact_indices: Tensor
    pooled_offsets: Tensor | None = None
    pooled_indices: Tensor | None = None

    def __post_init__(self) -> None:
        count_writes(self, PARTS)
        for name in ("block_q", "block_k", "num_q", "num_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if (self.pooled_offsets is None) != (self.pooled_indices is None):
            raise ValueError("pooled_offsets and pooled_indices come together: give both or neither")
        _check_csr("exact", self.exact_offsets, self.exact_indices, self.query_tiles)
        if self.pooled_offsets is not None and self.pooled_indices is not None:
            _check_csr("pooled", self.pooled_offsets, self.pooled_indices, self.query_tiles)
            if self.pooled_offsets.shape != self.exact_offsets.shape:
                raise ValueError(
                    f"pooled_offsets must have the shape of exact_offsets, {tuple(self.exact_offsets.shape)}, "
                    f"found {tuple(self.pooled_offsets.shape)}"
                )

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
        exact_offsets, exact_indices = _csr(states == EXACT)
        pooled_offsets, pooled_indices = _csr(states == POOLED)
        empty = pooled_indices.numel() == 0
        return cls(
            block_q=block_q,
            block_k=block_k,
            num_q=num_q,
            num_k=num_k,
            exact_offsets=exact_offsets,
            exact_indices=exact_indices,
            pooled_offsets=None if empty else pooled_offsets,
            pooled_indices=None if empty else pooled_indices,
        )

    @classmethod
    def full(
        cls, num_q: int, num_k: int, *, block_q: int, block_k: int, device: torch.device | str = "cpu"
    ) -> TileLists:
        """Lists in which every tile is exact: dense attention. The same object for the same sizes and device."""
        return _full(num_q, num_k, block_q, block_k).to(device)

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
    def tiles_pooled(self) -> int:
        """Pooled tiles of all list sets together."""
        return 0 if self.pooled_indices is None else self.pooled_indices.numel()

    @property
    def density(self) -> float:
        """Share of tiles that are exact, in [0, 1]; pooled tiles do not count."""
        return self.tiles_exact / self.tiles_total

    @property
    def device(self) -> torch.device:
        """Device of the lists."""
        return self.exact_indices.device

    def to(self, device: torch.device | str) -> TileLists:
        """The same lists on `device`, copied once; the same object if they are there already."""
        device = torch.device(device)
        if device.index is None and device.type not in ("cpu", "meta"):
            device = torch.empty(0, device=device).device  # "cuda" is the current one of them
        if device == self.device:
            return self
        parts = {name: getattr(self, name) for name in PARTS}

        def copy() -> TileLists:
            return replace(self, **{name: None if x is None else x.to(device) for name, x in parts.items()})

        return _COPIES.get(parts.values(), (device, self.block_q, self.block_k, self.num_q, self.num_k), copy)

    def states(self) -> Tensor:
        """Tile states uint8 [G, NQ, NK]: the inverse of `from_states`."""
        states = torch.zeros(self.groups, self.query_tiles, self.key_tiles, dtype=torch.uint8, device=self.device)
        for value, offsets, indices in (
            (POOLED, self.pooled_offsets, self.pooled_indices),
            (EXACT, self.exact_offsets, self.exact_indices),
        ):
            if offsets is not None and indices is not None:
                states.view(-1)[row_of_entry(offsets, indices.numel()) * self.key_tiles + indices] = value
        return states

    def changed(self) -> None:
        """Tell that the lists were written to by a kernel that torch knows nothing of; see above."""
        changed(getattr(self, name) for name in PARTS)

    def validate(self) -> TileLists:
        """Read every value: offsets rise to nnz, indices ascend in range, no tile is exact and pooled; returns self.

        Calls on a CPU do this by themselves, once until the lists change; elsewhere they do where the environment
        variable DIT_ACCEL_VALIDATE is 1, each time, since it waits for the device.

        Raises:
            ValueError: values that don't fit, with their position and what they may be.
        """
        _check_values("exact", self.exact_offsets, self.exact_indices, self.key_tiles)
        if self.pooled_offsets is not None and self.pooled_indices is not None:
            _check_values("pooled", self.pooled_offsets, self.pooled_indices, self.key_tiles)
            exact = row_of_entry(self.exact_offsets, self.tiles_exact) * self.key_tiles + self.exact_indices
            pooled = row_of_entry(self.pooled_offsets, self.tiles_pooled) * self.key_tiles + self.pooled_indices
            both = exact[torch.isin(exact, pooled)]
            if both.numel():
                row, tile = divmod(int(both[0]), self.key_tiles)
                raise ValueError(
                    f"a tile is exact or pooled, not both: found tile {tile} twice {_spelled(row, self.exact_offsets)}"
                )
        return self


_COPIES: StorageCache[TileLists] = StorageCache()


@lru_cache(maxsize=16)
def _full(num_q: int, num_k: int, block_q: int, block_k: int) -> TileLists:
    if min(num_q, num_k, block_q, block_k) < 1:
        raise ValueError(f"sizes must be at least 1, found {num_q} x {num_k} tokens in tiles of {block_q} x {block_k}")
    states = torch.full((-(-num_q // block_q), -(-num_k // block_k)), EXACT, dtype=torch.uint8)
    return TileLists.from_states(states, block_q=block_q, block_k=block_k, num_q=num_q, num_k=num_k)


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


def _check_csr(name: str, offsets: Tensor, indices: Tensor, rows: int) -> None:
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


def _check_values(name: str, offsets: Tensor, indices: Tensor, tiles: int) -> None:
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
            f"position {position}, {_spelled(rows[position], offsets)}"
        )
    keys = rows * tiles + indices
    repeats = keys[1:] <= keys[:-1]
    if bool(repeats.any()):
        position = int(repeats.nonzero()[0]) + 1
        raise ValueError(
            f"{name}_indices must ascend strictly in every query tile, found {int(indices[position])} after "
            f"{int(indices[position - 1])} at position {position}, {_spelled(rows[position], offsets)}: sort them, "
            "remove repeats"
        )


def _spelled(row: Tensor | int, offsets: Tensor) -> str:
    """A row of lists in words."""
    group, tile = divmod(int(row), offsets.shape[1] - 1)
    return f"in query tile {tile} of list set {group}"
