"""The machine on which something was measured, in words."""

import os
import platform
from pathlib import Path

import torch


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
