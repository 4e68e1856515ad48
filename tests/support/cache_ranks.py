"""What one of two processes runs to test that they decide alike; here, so that a process that is started finds it."""

import torch
from cache_calls import Driven, run_through
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dit_accel import EasyCache


def work(rank: int, world: int) -> tuple[str, str]:
    """Return what it computed of a model that is spread over both, and of one of its own."""
    spread, own = nn.Linear(4, 4), nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (2,))
    spread.weight = nn.Parameter(distribute_tensor(spread.weight.detach(), mesh, [Shard(0)]))

    def drawn(model, fast):
        def output(step, branch):
            return (torch.full((1, 2, 3), 1 + (0.02 if fast else 0.002) * step),)

        driven = Driven(EasyCache(threshold=0.05, warmup_steps=3), output, model=model)
        with torch.no_grad():
            run_through(driven, lambda step: torch.full((1, 2, 3), float(step)), 16)
        return driven.drawn(steps=16)

    return drawn(spread, rank), drawn(own, rank)
