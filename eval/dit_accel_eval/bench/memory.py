"""What memory an arm of the bench will take, and how much there is: an arm that has none is refused, and not tried."""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from accelerate import init_empty_weights

from .real_shapes import make_model

WHOLE = {"_native_math": 3.0, "flex": 4.0}  # backend of diffusers that holds every logit -> how many copies of 32 bits
PROCESS = 3 << 28  # bytes of a process that has loaded torch and diffusers
WIDTHS, HIDDEN = 16, 2  # copies of a token that a block holds at most, of the model's width and of its feed-forward's

CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where Linux tells a container's memory: the folder, its limit, what is used, and what of that it can take back."""


def memory_of_model(plan: Any, dtype: torch.dtype) -> int:
    """Return about how many bytes a forward takes at most on the device, besides logits: weights, a block's tensors."""
    family, tokens = plan.family, plan.dense.layout.tokens
    with init_empty_weights():
        transformer = make_model(plan.adapter, family, plan.dense)[0]
    weights = sum(weight.numel() for weight in transformer.parameters())
    block = tokens * (WIDTHS * family.heads * family.head_dim + HIDDEN * (family.ffn_dim or 0))
    return dtype.itemsize * (weights + block) + PROCESS


def memory_of_logits(plan: Any, backend: str | None) -> int:
    """Return about how many bytes a backend of diffusers takes for the logits of an attention call."""
    return round(4 * WHOLE.get(backend or "", 0) * plan.family.heads * plan.dense.layout.tokens**2)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, by the system and by the container; None where neither says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(filter(None, (*_of_system(), *_of_containers())), default=None) if device.type == "cpu" else None


def _of_system() -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _of_containers() -> Iterator[int]:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        groups = {PurePosixPath(line.split(":", 2)[2]) for line in lines}
        for root, limit, used, cached in CGROUPS:
            for group in {above for path in groups for above in (path, *path.parents)}:
                folder = Path(root) / str(group).lstrip("/")
                with contextlib.suppress(OSError, ValueError, KeyError):  # there is no such folder, or no limit
                    most, taken = (int((folder / name).read_text()) for name in (limit, used))
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield max(1, most - taken + int(stat[cached]))
