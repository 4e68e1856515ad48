"""One attention call as the backends receive it: everything resolved but the token order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache import StorageCache
from .selection import Selection
from .tiles import TileLists

_FRAMES: StorageCache[tuple[Tensor, Tensor]] = StorageCache()
_VALID: StorageCache[Tensor] = StorageCache()


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Problem:
    """One attention call, checked and carried from the API to a backend: all arguments by their names.

    q, k, v and the output are [B, H, S, D] here, whatever the caller's layout, with a head dim of their own for v and
    the output; `heads_first` says in which order heads and tokens lie in the output's memory. The lists are those of
    TileLists. `scale` is the softmax scale; `head_scale`, [B or 1, H] in float32 (float64 for float64) or None,
    multiplies it. `decay` is (table, q_frames, k_frames) or None. With a `token_order`, q, k, v, decay, `key_length`
    and `key_mask` are in the caller's order; `tiled()` gives the call in tiled order, where valid keys are the bool
    [B, S_k] `key_valid` (None: all). A `selection` narrows the lists for this call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    exact_offsets: Tensor
    exact_indices: Tensor
    pooled_offsets: Tensor | None = None
    pooled_indices: Tensor | None = None
    mask_ids: Tensor | None = None
    mask_bits: Tensor | None = None
    block_q: int
    block_k: int
    scale: float
    heads_first: bool = True
    head_scale: Tensor | None = None
    key_length: Tensor | None = None
    key_mask: Tensor | None = None
    key_valid: Tensor | None = None
    decay: tuple[Tensor, Tensor, Tensor] | None = None
    token_order: Tensor | None = None
    identity_mix: Tensor | None = None
    identity_rows: Tensor | None = None
    selection: Selection | None = None
    return_tiles: bool = False
    return_lse: bool = False
    precision: str | None = None
    backend: str = "auto"

    @property
    def query_tiles(self) -> int:
        """Number of query tiles, NQ."""
        return -(-self.q.shape[2] // self.block_q)

    @property
    def key_tiles(self) -> int:
        """Number of key tiles, NK."""
        return -(-self.k.shape[2] // self.block_k)

    @property
    def density(self) -> float:
        """Share of the lists' tiles that are exact, in [0, 1]."""
        return self.exact_indices.numel() / (self.exact_offsets.shape[0] * self.query_tiles * self.key_tiles)

    @property
    def votes(self) -> bool:
        """Whether the call's tiles vote for the next call."""
        return self.selection is not None and self.selection.vote is not None

    @property
    def may_pool(self) -> bool:
        """Whether the call can have pooled tiles: those of its lists, or what its selection may make of exact ones."""
        selection = self.selection
        if self.pooled_indices is not None or selection is None:
            return self.pooled_indices is not None
        routes = selection.routing is not None or selection.routed is not None
        return routes or (selection.keep is not None and selection.rest == "pooled")

    def empty_like(self, x: Tensor, dim: int | None = None) -> Tensor:
        """Memory for a [B, H, S, D] like x, or with so many columns, laid out like the call's output."""
        batch, heads, tokens, dim = (*x.shape[:3], dim or x.shape[3])
        first, second = (heads, tokens) if self.heads_first else (tokens, heads)
        empty = x.new_empty(batch, first, second, dim)
        return empty if self.heads_first else empty.transpose(1, 2)

    def empty_output(self) -> Tensor:
        """Memory for the output, [B, H, S_q, Dv]."""
        return self.empty_like(self.q, self.v.shape[3])

    def features_in_tiled_order(self) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        """Valid keys, bool [B, S_k] or None, and decay (table, q_frames, k_frames) or None, in tiled order."""
        decay, order = self.decay, self.token_order
        if order is not None:
            decay = None if decay is None else (decay[0], *_frames_in_order(decay[1], decay[2], order))
        if self.key_length is None and self.key_mask is None:
            return self.key_valid, decay
        keys = [self.key_length, self.key_mask, self.key_valid]
        key = (self.k.shape[2], *(x is not None for x in keys))
        return _VALID.get((), key, self._valid_in_tiled_order, loose=[*keys, order]), decay

    def _valid_in_tiled_order(self) -> Tensor:
        tokens = torch.arange(self.k.shape[2], device=self.k.device)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        if self.key_length is not None:
            valid = tokens < self.key_length[:, None]
        if self.key_mask is not None:
            valid = self.key_mask & valid
        if self.token_order is not None:
            valid = valid.index_select(1, self.token_order)
        return valid if self.key_valid is None else valid & self.key_valid

    def tiled(self) -> Problem:
        """The same call with tensors, decay and `key_valid` in tiled order and nothing left in the caller's."""
        if self.token_order is None and self.key_length is None and self.key_mask is None:
            return self
        q, k, v = self.q, self.k, self.v
        if self.token_order is not None:
            q, k, v = (x.index_select(2, self.token_order) for x in (q, k, v))
        valid, decay = self.features_in_tiled_order()
        return replace(
            self, q=q, k=k, v=v, key_valid=valid, decay=decay, token_order=None, key_length=None, key_mask=None
        )


def _frames_in_order(q_frames: Tensor, k_frames: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The frames in tiled order, the same tensors in every call, since what is derived from them is kept with them."""
    return _FRAMES.get((q_frames, k_frames), (), lambda: (q_frames[order], k_frames[order]), loose=[order])


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B or 1, H or 1, ...] of what list sets hold, [G, ...]."""
    return x[None] if x.shape[0] in (1, heads) else x.unflatten(0, (-1, heads))


def lists_of(problem: Problem) -> TileLists:
    """The lists of a call, selection left out."""
    return TileLists(
        block_q=problem.block_q,
        block_k=problem.block_k,
        num_q=problem.q.shape[2],
        num_k=problem.k.shape[2],
        exact_offsets=problem.exact_offsets,
        exact_indices=problem.exact_indices,
        pooled_offsets=problem.pooled_offsets,
        pooled_indices=problem.pooled_indices,
        mask_ids=problem.mask_ids,
        mask_bits=problem.mask_bits,
    )


def mix_weight(problem: Problem, dtype: torch.dtype) -> Tensor | None:
    """Identity weight w, broadcastable to [B, H, S, D], 0 outside the chosen rows."""
    if problem.identity_mix is None:
        return None
    w = problem.identity_mix.to(dtype).reshape(-1, problem.q.shape[1])[:, :, None, None]
    return w if problem.identity_rows is None else w * problem.identity_rows[:, None]
