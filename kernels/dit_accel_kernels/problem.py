"""One attention call as the backends receive it: everything resolved but the token order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache import StorageCache
from .selection import Selection
from .tiles import Grid, TileLists

_FRAMES: StorageCache[tuple[Tensor, Tensor]] = StorageCache()
_VALID: StorageCache[Tensor] = StorageCache()


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Problem(Grid):
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
    heads_first: bool
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
    def num_q(self) -> int:
        """Number of queries, S_q."""
        return self.q.shape[2]

    @property
    def num_k(self) -> int:
        """Number of keys, S_k."""
        return self.k.shape[2]

    @property
    def votes(self) -> bool:
        """Whether the call's tiles vote for the next call."""
        return self.selection is not None and self.selection.vote is not None

    @property
    def routes(self) -> bool:
        """Whether scores decide which tiles stay exact."""
        return self.selection is not None and self.selection.routing is not None

    @property
    def may_pool(self) -> bool:
        """Whether the call can have pooled tiles: those of its lists, or what its selection may make of exact ones."""
        selection = self.selection
        if self.pooled_indices is not None or selection is None:
            return self.pooled_indices is not None
        return self.routes or selection.routed is not None or selection.rest == "pooled"

    def in_layout(self, x: Tensor) -> Tensor:
        """[B, H, S, D] as the caller's layout has it, or back."""
        return x if self.heads_first else x.transpose(1, 2)

    def empty_like(self, x: Tensor, dim: int | None = None) -> Tensor:
        """Memory for a [B, H, S, D] like x, or with so many columns, laid out like the call's output."""
        batch, heads, tokens, dim = (*x.shape[:3], dim or x.shape[3])
        if self.heads_first:
            return x.new_empty(batch, heads, tokens, dim)
        return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)

    def empty_output(self) -> Tensor:
        """Memory for the output, [B, H, S_q, Dv]."""
        return self.empty_like(self.q, self.v.shape[3])

    def features_in_tiled_order(self) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        """Valid keys, bool [B, S_k] or None, and decay (table, q_frames, k_frames) or None, in tiled order."""
        decay, order = self.decay, self.token_order
        if order is not None and decay is not None:  # kept, since what is derived from frames is kept with them
            table, q_frames, k_frames = decay
            frames = _FRAMES.get((q_frames, k_frames), (), lambda: (q_frames[order], k_frames[order]), loose=[order])
            decay = (table, *frames)
        if self.key_length is None and self.key_mask is None:
            return self.key_valid, decay
        keys = [self.key_length, self.key_mask, order]
        return _VALID.get((), (self.num_k,), self._valid_in_tiled_order, loose=keys), decay

    def _valid_in_tiled_order(self) -> Tensor:
        length = self.num_k if self.key_length is None else self.key_length[:, None]
        valid = torch.arange(self.num_k, device=self.k.device) < length
        if self.key_mask is not None:
            valid = self.key_mask & valid
        return valid if self.token_order is None else valid.index_select(1, self.token_order)

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


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B or 1, H or 1, ...] of what list sets hold, [G, ...]."""
    return x[None] if x.shape[0] in (1, heads) else x.unflatten(0, (-1, heads))


def lists_of(problem: Problem) -> TileLists:
    """The lists of a call, selection left out."""
    return TileLists(**problem.parts, **problem.sizes)


def mix_weight(problem: Problem, dtype: torch.dtype) -> Tensor | None:
    """Identity weight w, broadcastable to [B, H, S, D], 0 outside the chosen rows."""
    if problem.identity_mix is None:
        return None
    w = problem.identity_mix.to(dtype).reshape(-1, problem.q.shape[1])[:, :, None, None]
    return w if problem.identity_rows is None else w * problem.identity_rows[:, None]
