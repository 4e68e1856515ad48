"""The machine on which something runs: where, in which number format, and what it is called."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from dit_accel_pipelines.generation.loading import pick_device
from dit_accel_pipelines.generation.request import OFFLOADS, Dtype

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a model that is not embedded runs.

    Attributes:
        device: torch device; None: the accelerator if there is one.
        offload: which weights wait in main memory, one of `OFFLOADS`.

    Raises:
        ConfigError: for another offload.
    """

    device: str | None = None
    offload: str = "none"

    def __post_init__(self) -> None:
        if self.offload not in OFFLOADS:
            raise ConfigError(f"there is no offload {self.offload!r}; {did_you_mean(self.offload, OFFLOADS)}")

    def dtype(self, requested: Dtype | None) -> Dtype:
        """Return the number format of the weights: what was asked for, else float32 on a CPU and bfloat16 elsewhere."""
        return requested or ("float32" if pick_device(self.device).type == "cpu" else "bfloat16")


def processor() -> str:
    """Return the processor's name and how many cores the system shows, as far as it tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def device_name(device: torch.device) -> str:
    """Return what a device is called: of a CPU the processor."""
    if device.type == "cpu":
        return processor()
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name else str(device)
