"""Ring: inside attention a process has the queries of its own tokens, and gathers all keys and values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, Grid
from .ulysses import Spread, spread_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ring(Spread):
    """How the tokens of one forward are spread over processes, each of which computes the rows of its own.

    Attributes:
        own: int64 [S'], this process's tokens, rising.
    """

    own: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Return all tokens, [B, S, H, D] in the sequence's order, of this process's, [B, S', H, D]."""
        import torch.distributed as dist

        self.require_local(x)
        most = max(self.counts)
        sent = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, most - self.local)).contiguous()
        parts = [torch.empty_like(sent) for _ in self.counts]
        dist.all_gather(parts, sent, group=self.group)
        whole = torch.cat([part[:, :count] for part, count in zip(parts, self.counts, strict=True)], 1)
        return whole if self.places is None else whole.index_select(1, self.places)


def ring_of(config: Any, adapter: Adapter, grid: Grid, text: int | None, device: torch.device) -> Ring:
    """Return how a forward is spread, under diffusers' ``ContextParallelConfig``."""
    counts, gathered, places = spread_of(config.ring_degree, adapter, grid, text, device)
    rank = config._ring_local_rank
    order = torch.arange(sum(counts), device=device) if gathered is None else gathered
    return Ring(
        group=config._ring_mesh.get_group(), rank=rank, counts=counts, gathered=gathered, places=places,
        own=order.split(counts)[rank],
    )  # fmt: skip
