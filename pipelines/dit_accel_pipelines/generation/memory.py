"""The most memory that a run took, on the host and on the accelerator, and outputs that no memory holds."""

import os
import platform
import resource
from pathlib import Path

from dit_accel.errors import ConfigError

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_PEAK = "5"
"""What resets the peak of resident memory when it is written to `_CLEAR` (Linux, proc(5))."""


def begin_peak() -> bool:
    """Let `peak_memory` count from now on; returns whether the host's can: where it can't, it is the process's."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR.write_text(_PEAK)
    except OSError:
        return False
    return True


def peak_memory() -> dict[str, int]:
    """Return the most bytes held: ``host``, resident, and ``cuda``, allocated, where there is one."""
    import torch

    peak = {"host": _resident()}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def resident_now() -> int:
    """Return the resident memory of this process on Linux, elsewhere the most that it ever had."""
    return _resident("VmRSS:")


def _resident(entry: str = "VmHWM:") -> int:
    """Return an entry of Linux's status of the process, by default the peak since `begin_peak`; elsewhere its peak."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(entry):
            return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_fits(*, height: int, width: int, num_frames: int) -> None:
    """Raise `ConfigError` for an output whose pixels alone, as 32-bit numbers, are more than this machine's memory."""
    taken, there = 12 * height * width * num_frames, _memory()
    if there is not None and taken > there:
        raise ConfigError(
            f"an output of {num_frames:,} frames, {height:,} x {width:,}, takes {taken / 2**30:,.0f} GiB for its "
            f"pixels alone, and this machine has {there / 2**30:,.0f} GiB of memory; ask for a smaller one"
        )


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
