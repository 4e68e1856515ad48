"""All ranks that run one transformer together must skip the same steps, or they deadlock."""

import math
from typing import Any

import torch
from torch import Tensor


def process_groups(transformer: Any) -> list[Any]:
    """Return the process groups whose ranks compute a transformer's forwards together; none where it runs alone.

    Those of diffusers' context parallelism, and those that its parameters are spread over (FSDP2, tensor parallelism).
    Ranks that run copies of their own, each on prompts of its own, share none.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    groups: dict[tuple[int, ...], Any] = {}
    context = getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)
    meshes = [getattr(context, "_flattened_mesh", None)]
    meshes += {id(mesh): mesh for p in transformer.parameters() if (mesh := getattr(p, "device_mesh", None))}.values()
    for mesh in filter(None, meshes):
        for axis in range(mesh.ndim):
            group = mesh.get_group(axis)
            groups[tuple(torch.distributed.get_process_group_ranks(group))] = group
    return list(groups.values())


def agreed(values: list[Tensor], groups: list[Any]) -> list[float]:
    """Return numbers summed over the ranks of some groups, the same on all of them; waits for the device once.

    A rank that has no number gives none to all.
    """
    stacked = torch.stack([value.float() for value in values])
    for group in groups:
        torch.distributed.all_reduce(stacked, group=group)
    return stacked.tolist()


def ratio(over: float, under: float) -> float:
    """Return ``over / under``, and not a number where that is none."""
    return over / under if under else math.nan
