"""Times arms in turn, so that what else the machine does falls on all alike."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from dit_accel.errors import DitAccelError

from ..runs.conditions import device_name

Made = TypeVar("Made")


class OutOfMemoryError(DitAccelError):
    """An arm had too little memory, or would have."""


def in_turn(
    arms: Mapping[str, Callable[[], Made]], rounds: int, *, deadline: float = math.inf
) -> Iterator[dict[str, Made]]:
    """Give what the arms made in each round, in turn; after the first none begins that would end past `deadline`."""
    taken = 0.0
    for number in range(rounds):
        started = time.perf_counter()
        if number and started + taken > deadline:
            return
        results = {name: arm() for name, arm in arms.items()}
        taken = time.perf_counter() - started
        yield results


def reason_of(error: Exception) -> DitAccelError:
    """Return why something can't run here, as an error of ours: backends that are missing have each their own."""
    if isinstance(error, DitAccelError):
        return error
    line = str(error).strip().partition("\n")[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in line:
        return OutOfMemoryError("ran out of memory")
    return DitAccelError(f"{type(error).__name__}: {line}")


def device_time(device: torch.device) -> float:
    """Return the time in seconds, after all that the device has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def quartiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return the median and the quartiles; nan where nothing ran."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) if len(values) else [math.nan] * 3
    return {"median": float(middle), "low": float(low), "high": float(high)}


def timed_on(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what every line says of where it was timed; the load is that of the last minute, of all processes."""
    return {
        "dtype": str(dtype)[6:], "device": device_name(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "load": os.getloadavg()[0],
    }  # fmt: skip
