"""What one of two processes runs to test that they decide alike; here, so that a process that is started finds it."""

from typing import Any

import torch
import torch.distributed as dist
from cache_calls import Driven, run_through
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dit_accel import EasyCache


def work(rank: int, port: int, found: Any) -> None:
    """Put under its rank what it computed of a model that is spread over both, and of one of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
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

    found[rank] = drawn(spread, rank), drawn(own, rank)
    dist.destroy_process_group()
