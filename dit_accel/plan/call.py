"""One attention call as all methods see it: q, k and v as [B, H, S, D], whatever the model's processor hands over."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.adapter import Grid
from ..errors import ConfigError
from .masks import key_validity, visible_row


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """What one attention call computes with. The tensors are views of the model's own."""

    q: Tensor  # queries after norm and RoPE, [B, H, S, D]
    k: Tensor  # keys, likewise; their number of heads divides H
    v: Tensor  # values, like the keys
    mask: Tensor | None = None  # None, or the model's attention mask
    scale: float | None = None  # factor on the logits; None: 1 / sqrt(D)
    backend: str = "auto"  # the kernel backend's name
    tokens_first: bool = False  # the model holds its tensors as [B, S, H, D] in memory, and expects its output so
    # int64 [S'], the tokens that q holds, rising, S' in place of S; None: all. Under ring attention a process has the
    # queries of its own tokens, and the keys of all.
    rows: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Length S of the sequence."""
        return self.k.shape[2]

    def values(self) -> Tensor:
        """Return V with a head for every query head, of the tokens that q holds, [B, H, S, D]: a copy."""
        v = self.v if self.rows is None else self.v.index_select(2, self.rows)
        return v.repeat_interleave(self.q.shape[1] // v.shape[1], 1)

    def queries(self, tokens: Tensor) -> Tensor:
        """Return the queries of some tokens, int64 [G]; zeros for those that q does not hold. [B, H, G, D]: a copy."""
        if self.rows is None:
            return self.q.index_select(2, tokens)
        position = torch.full((self.tokens,), len(self.rows), device=tokens.device)
        position[self.rows] = torch.arange(len(self.rows), device=tokens.device)
        queries = F.pad(self.q, (0, 0, 0, 1)).index_select(2, position[tokens])
        return self.as_held(self.as_held(queries)[0].contiguous())[0]

    def completed(self, sizes: Grid, outer_masks: bool) -> tuple["Call", slice | None]:
        """Return the call with a query for every token, and which of them are the model's own; None: all, or `rows`.

        Where only some tokens have queries (the image, all before kept keys, or all behind them), the others get zeros.
        ``outer_masks``: as `Adapter` has it.
        """
        frames, height, width, before, _ = sizes
        call = self
        if self.mask is not None and outer_masks:
            call = replace(self, mask=visible_row(self.mask, before))
        queries, tokens = self.q.shape[2], self.k.shape[2]
        missing = tokens - queries
        if missing <= 0 or self.rows is not None:
            return call, None
        image = frames * height * width
        start = before if queries == image else 0 if queries == before + image else missing
        return replace(call, q=F.pad(self.q, (0, 0, start, missing - start))), slice(start, start + queries)

    def for_planning(self) -> "Call":
        """Return a call of some rows with a query for every token, zeros for others: plans follow from positions."""
        return replace(self, q=self.q.new_zeros(()).expand(*self.q.shape[:2], self.tokens, self.q.shape[3]), rows=None)

    def key_mask(self) -> Tensor | None:
        """Return key validity [B, S] of the mask, True where a key is valid; None without a mask."""
        q, k = self.q.shape, self.k.shape
        return None if self.mask is None else key_validity(self.mask, q[0], q[2], k[2])

    @property
    def hides_keys(self) -> bool:
        """Whether the mask, if there is one, hides keys alone, so that our kernels can follow it."""
        try:
            self.key_mask()
        except ConfigError:
            return False
        return True

    def with_keys(self, k: Tensor) -> "Call":
        """Return the call with other keys."""
        return replace(self, k=k)

    def of_rows(self, rows: slice) -> "Call":
        """Return the call of some rows of the batch."""
        mask = self.mask
        if mask is not None and mask.ndim > 1 and len(mask) == len(self.q) > 1:
            mask = mask[rows]
        return replace(self, q=self.q[rows], k=self.k[rows], v=self.v[rows], mask=mask)

    def as_held(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors [B, H, S, D] with their axes in the order of the model's, as views."""
        return tuple(x.transpose(1, 2) for x in tensors) if self.tokens_first else tensors

    def heads_first(self, x: Tensor) -> Tensor:
        """Return a tensor whose axes are in the model's order as [B, H, S, D], a view."""
        return x.transpose(1, 2) if self.tokens_first else x

    @property
    def kernel_layout(self) -> dict[str, Any]:
        """The kernels' name for the order of axes in the model's tensors."""
        return {"layout": "bshd" if self.tokens_first else "bhsd"}


def call_of(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, backend: str, tokens_first: bool
) -> Call:
    """Return the call of tensors that lie as a processor holds them, [B, S, H, D] or [B, H, S, D]."""
    if tokens_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return Call(q=q, k=k, v=v, mask=mask, scale=scale, backend=backend, tokens_first=tokens_first)
