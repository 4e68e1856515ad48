"""How several processes share the tokens and heads of one attention call, under Ulysses or ring attention.

Under Ulysses a process has all tokens of some heads inside attention; under ring attention it has the queries of its
own tokens, and gathers all keys and values. Either way it plans the call as one process would.

diffusers' hooks split each stream of tokens by itself, so that its all-to-all gathers the parts of the streams in turn:
text, video, text, video. Tiles, frames and masks count tokens in the sequence's own order, into which they are brought
here, and back. Ulysses' exchange itself is diffusers'.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Grid
from ..errors import ConfigError
from ..plan.call import Call
from ..plan.heads import HeadShare
from ..plan.layout import length_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceShards(ABC):
    """How the tokens of one forward are shared between processes."""

    group: Any  # the processes
    rank: int  # this one's position among them
    counts: tuple[int, ...]  # tokens that each of them holds outside attention
    # int64 [S], position among the gathered tokens -> token; None: that is the sequence's own order
    gathered: Tensor | None
    positions: Tensor | None  # int64 [S], the inverse
    # int64 [S'], the tokens whose queries this process has inside attention, rising; None: all
    rows: Tensor | None = None

    @property
    def local(self) -> int:
        """Tokens that this process holds outside attention, S'."""
        return self.counts[self.rank]

    def share(self, total: int) -> HeadShare | None:
        """Return which of ``total`` heads this process computes; None: all."""
        return None

    def own_queries(self, call: Call, differentiate: bool) -> Call:
        """Return a call that says which tokens' queries this process has; to train, refuse one that lacks some."""
        if self.rows is None:
            return call
        if differentiate:
            raise ConfigError(
                "methods on attention have no gradient under ring attention; train with ContextParallelConfig("
                "ulysses_degree=...)"
            )
        return replace(call, rows=self.rows)

    @abstractmethod
    def gather_call(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what this process computes one attention call with, of its tokens' q, k and v, [B, S', H, D]."""

    def scatter(self, x: Tensor, heads: int) -> Tensor:
        """Return this process's tokens of all heads, [B, S', H, D], of what it computed."""
        return x

    def gathered_mask(self, mask: Any) -> Any:
        """Return a mask as diffusers' own exchange needs it."""
        return mask

    def require_local(self, x: Tensor) -> None:
        """Raise `ConfigError` if a tensor [B, S', H, D] does not hold this process's tokens."""
        if x.shape[1] != self.local:
            raise ConfigError(
                f"an attention call holds {x.shape[1]} tokens on rank {self.rank} of {len(self.counts)}, where an even "
                f"split of all {sum(self.counts)} leaves {self.local}; the cp_plan of enable_parallelism must split "
                "every stream that joins the sequence, and no other"
            )

    def whole_mask(self, mask: Any) -> Any:
        """Return a mask over all keys in the sequence's order, of such a one or of one over this process's keys."""
        if not isinstance(mask, Tensor):
            return mask
        hides_keys = mask.ndim == 2 or mask.shape[-2] == 1
        if not hides_keys or mask.shape[-1] not in (self.local, sum(self.counts)):
            raise ConfigError(
                f"the model passes a mask {list(mask.shape)} to attention over {self.local} of {sum(self.counts)} "
                "tokens; under context parallelism methods follow masks that hide keys alone; detach them"
            )
        if mask.shape[-1] == sum(self.counts):
            return mask
        most = max(self.counts)
        share = HeadShare(start=0, count=most, total=most * len(self.counts), group=self.group)
        parts = share.joined(torch.nn.functional.pad(mask, (0, most - self.local)), -1).split(most, -1)
        whole = torch.cat([part[..., :count] for part, count in zip(parts, self.counts, strict=True)], -1)
        return whole if self.positions is None else whole.index_select(-1, self.positions)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ulysses(SequenceShards):
    """How the tokens and heads of one forward are shared between processes, each of which computes some heads."""

    anything: bool  # lengths and heads need not be divisible by their number

    def share(self, total: int) -> HeadShare:
        """Return which of ``total`` heads this process computes: runs of one length, the last shorter."""
        most = -(-total // len(self.counts))
        start = min(self.rank * most, total)
        return HeadShare(start=start, count=min(most, total - start), total=total, group=self.group)

    def gather_call(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all tokens of this process's heads."""
        if self.anything and torch.is_grad_enabled() and q.requires_grad:
            raise ConfigError("diffusers' ulysses_anything has no gradient; generate under torch.no_grad()")
        return self.gather(q), self.gather(k), self.gather(v)

    def gather(self, x: Tensor) -> Tensor:
        """Return all tokens of this process's heads, [B, S, H', D] in the sequence's order, of [B, S', H, D]."""
        from diffusers.models import attention_dispatch as theirs

        self.require_local(x)
        if self.anything:
            x = theirs.all_to_all_single_any_qkv_async(x, self.group)()
        elif x.shape[2] % len(self.counts):
            raise ConfigError(
                f"ulysses_degree = {len(self.counts)} does not divide the {x.shape[2]} heads; choose one that does"
            )
        else:
            x = theirs.SeqAllToAllDim.apply(self.group, x)
        return x if self.positions is None else x.index_select(1, self.positions)

    def scatter(self, x: Tensor, heads: int) -> Tensor:
        """Return this process's tokens of all heads, [B, S', H, D], of [B, S, H', D]."""
        from diffusers.models import attention_dispatch as theirs

        x = x if self.gathered is None else x.index_select(1, self.gathered)
        if self.anything:
            return theirs.all_to_all_single_any_o_async(x, self.group, NUM_QO_HEAD=heads, Q_S_LOCAL=self.local)()
        return theirs.SeqAllToAllDim.apply(self.group, x, 1, 2)

    def gathered_mask(self, mask: Any) -> Any:
        """Return a mask as diffusers' own exchange needs it: one over all keys in the order that it gathers."""
        if self.gathered is None or not isinstance(mask, Tensor) or mask.shape[-1] != sum(self.counts):
            return mask
        return mask.index_select(-1, self.gathered)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ring(SequenceShards):
    """How the tokens of one forward are shared between processes, each of which computes the rows of its own.

    diffusers' ring attention gathers the keys and values of all processes, attends to one process's after the other,
    and merges the parts by their log-sum-exp. It gathers them at once, so that one call over all of them holds no more,
    and needs no merge: also a pooled tile may lie across two processes' tokens. What such a call needs is a plan that
    follows from the tokens' positions alone, of which a process computes its own rows.
    """

    def gather_call(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return this process's queries, and all keys and values."""
        return q, self.gather(k), self.gather(v)

    def gather(self, x: Tensor) -> Tensor:
        """Return all tokens, [B, S, H, D] in the sequence's order, of this process's, [B, S', H, D]."""
        import torch.distributed as dist

        self.require_local(x)
        most = max(self.counts)
        sent = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, most - self.local)).contiguous()
        parts = [torch.empty_like(sent) for _ in self.counts]
        dist.all_gather(parts, sent, group=self.group)
        whole = torch.cat([part[:, :count] for part, count in zip(parts, self.counts, strict=True)], 1)
        return whole if self.positions is None else whole.index_select(1, self.positions)


def shards_of(config: Any, adapter: Adapter, grid: Grid, text: int | None, device: torch.device) -> SequenceShards:
    """Share a forward as diffusers' ``ContextParallelConfig`` says; its ``text`` as in `split_tokens`."""
    counts, gathered, positions = split_tokens(config.ring_degree * config.ulysses_degree, adapter, grid, text, device)
    order = {"counts": counts, "gathered": gathered, "positions": positions}
    if config.ring_degree == 1:
        group, rank = config._ulysses_mesh.get_group(), config._ulysses_local_rank
        return Ulysses(group=group, rank=rank, anything=config.ulysses_anything, **order)
    group, rank = config._ring_mesh.get_group(), config._ring_local_rank
    tokens = torch.arange(sum(counts), device=device) if gathered is None else gathered
    return Ring(group=group, rank=rank, rows=tokens.split(counts)[rank], **order)


def split_tokens(
    degree: int, adapter: Adapter, grid: Grid, text: int | None, device: torch.device
) -> tuple[tuple[int, ...], Tensor | None, Tensor | None]:
    """Return ``counts``, ``gathered`` and ``positions`` of `SequenceShards` for so many processes.

    ``text`` is how many tokens the stream of text has; None: as the grid says.
    """
    total = length_of(grid)
    text = text or (grid[3] if adapter.split_text == "before" else grid[4])
    streams = {"before": (text, total - text), "after": (total - text, text)}
    sizes = streams.get(str(adapter.split_text), (total,))
    parts = [[part.numel() for part in torch.arange(size).tensor_split(degree)] for size in sizes]
    counts = tuple(sum(stream[rank] for stream in parts) for rank in range(degree))
    if sum(size > 0 for size in sizes) < 2:
        return counts, None, None
    gathered = _gathered(sizes, degree).to(device)
    positions = torch.empty_like(gathered).index_copy_(0, gathered, torch.arange(len(gathered), device=device))
    return counts, gathered, positions


def _gathered(sizes: tuple[int, ...], degree: int) -> Tensor:
    """Return the tokens in the order in which the processes hold them: of each the parts of all streams."""
    streams, start = [], 0
    for size in sizes:
        streams.append(torch.arange(start, start + size).tensor_split(degree))
        start += size
    return torch.cat([stream[rank] for rank in range(degree) for stream in streams])
