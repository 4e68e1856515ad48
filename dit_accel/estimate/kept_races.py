"""The cost of sparse attention as it was measured on this machine, by `dit-accel doctor` or by a run."""

import math
from typing import Any

import torch
from dit_accel_kernels.choice.race import measures, races

from .hardware import card_called, find_hardware


def own_device() -> torch.device:
    """Return the device that runs go to where none is named: the accelerator, or the CPU."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return there or torch.device("cpu")


def usual_dtype(device: torch.device) -> torch.dtype:
    """Return the number format in which models run on a device where none is named."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def measured_cost(head_dim: int, tokens: int, density: float) -> tuple[float, str] | None:
    """Return the time per kept FLOP over the dense kernel's, and in words where it was measured; None: nowhere.

    It is that of the race nearest in tokens and density: one over the share of the ideal, dense time x density / time.
    """
    if not measures():
        return None
    device = own_device()
    dtype = str(usual_dtype(device)).removeprefix("torch.")

    def distance(race: dict[str, Any]) -> float:
        return abs(math.log(race["tokens"] / tokens)) + abs(math.log(race["density"] / max(density, 1e-3)))

    kept = [race for race in races(device) if (race["dtype"], race["dim"]) == (dtype, head_dim)]
    race = min(kept, key=distance, default=None)
    if race is None:
        return None
    at = f"{race['tokens']:,} tokens and a density of {race['density']:.2f}, in {dtype}"
    words = (
        f"sparse attention counts as measured on this machine by doctor: {race['share']:.0%} of the ideal at {at}; for "
        "another machine name its hardware or a kernel cost"
    )
    return 1 / race["share"], words


def elsewhere(hardware: str | None) -> bool:
    """Tell whether hardware is named that is not this machine's own card, so that nothing measured here counts."""
    device = own_device()
    return hardware is not None and (device.type != "cuda" or card_called(device) != find_hardware(hardware))
