"""What one of several processes runs to test offloading under context parallelism; here, so that it is found."""

import copy
from typing import Any

import torch
from dit_accel_pipelines.processes.parallel import enable_ulysses
from parallel_ranks import apart, build, denoise, run, told

import dit_accel

KINDS = ("model", "sequential", "group of leaves", "group of blocks")
ORDERS = ("offload, parallel, methods", "parallel, offload, methods", "parallel, methods, offload")


def offload(transformer: Any, how: str) -> None:
    """Offload to and from the CPU itself: the hooks are diffusers' and accelerate's own, only nothing moves."""
    from accelerate import cpu_offload
    from accelerate.hooks import CpuOffload, add_hook_to_module
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    if how == "model":
        add_hook_to_module(transformer, CpuOffload(cpu))
    elif how == "sequential":
        cpu_offload(transformer, execution_device=cpu, offload_buffers=False)
    elif how == "group of leaves":
        apply_group_offloading(transformer, cpu, cpu, offload_type="leaf_level")
    else:
        apply_group_offloading(transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def compare(rank: int, world: int, methods: tuple[Any, ...]) -> dict[str, Any]:
    """Return case -> (how far the offloaded processes' output lies from one process's, how far that from dense)."""
    transformer, inputs = build("wan")
    plain = denoise(transformer, inputs)
    alone = run(transformer, inputs, methods)
    found: dict[str, Any] = {}
    for how in KINDS:
        for order in ORDERS:
            spread = copy.deepcopy(transformer)
            try:
                for what in order.split(", "):
                    if what == "offload":
                        offload(spread, how)
                    elif what == "parallel":
                        enable_ulysses(spread, world)
                    else:
                        attachment = dit_accel.attach(spread, *methods, preset="none")
                found[f"{how}: {order}"] = apart(denoise(spread, inputs), alone), apart(alone, plain)
                attachment.detach()
            except Exception as error:
                found[f"{how}: {order}"] = told(error)
    return found
