"""Which of a layer's heads one process computes where several share them, and what these know together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadShare:
    """A run of a layer's heads, whose other heads the further processes of a group compute."""

    start: int  # the first of them
    count: int  # how many they are
    total: int  # heads of the layer, H
    group: Any = None  # the processes that share them, in the order of their heads

    @property
    def own(self) -> slice:
        """The heads' place among all."""
        return slice(self.start, self.start + self.count)

    def joined(self, x: Tensor, dim: int) -> Tensor:
        """Gather all processes' heads along ``dim``, in the heads' order; all must call it alike."""
        import torch.distributed as dist

        size = dist.get_world_size(self.group)
        most = -(-self.total // size)
        x = x.movedim(dim, 0).contiguous()
        sent = x.to(torch.uint8) if x.dtype == torch.bool else x  # not every backend sends booleans
        if self.count < most:
            sent = torch.cat([sent, sent.new_zeros(most - self.count, *sent.shape[1:])])
        parts = [torch.empty_like(sent) for _ in range(size)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts)[: self.total].to(x.dtype).movedim(0, dim)

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of what all processes have; all must call it alike."""
        import torch.distributed as dist

        x = x.contiguous().clone()
        dist.all_reduce(x, group=self.group)
        return x
