"""Runs a bench's arms in turn, in a process of its own: one killed for want of memory ends a row, not the bench."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from dit_accel.errors import DitAccelError

from ..runs.loaded import device_name
from ..runs.pool import end_with_parent

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


SHARE = 0.9  # of the memory that is free, the most that the process may take


class Beside:
    """A shape's bench in a process of its own; a context manager, and called with an arm and the steps of a run."""

    def __init__(
        self, plan: Any, make: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device, dtype: torch.dtype,
        free: int | None,
    ) -> None:  # fmt: skip
        self.plan, self.device, self.dtype, self.free = plan, device, dtype, free
        limit = None if free is None or device.type != "cpu" else round(SHARE * free)
        self._given = make, (*arguments, device, dtype), torch.get_num_threads(), limit
        self._process: Any = None

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def __call__(self, arm: Any, steps: int) -> Any:
        """Run an arm; `OutOfMemoryError` if it had too little memory, `DitAccelError` with any other reason."""
        process = self._process = self._process or self._started()
        try:
            self._ours.send((arm, steps))
            answer = self._ours.recv()
        except (EOFError, OSError):
            process.join()
            code, self._process = process.exitcode, None
            if code == -signal.SIGKILL:
                raise OutOfMemoryError("ran out of memory: the system killed its process") from None
            raise DitAccelError(f"its process ended with exit code {code}") from None
        if isinstance(answer, DitAccelError):
            raise answer
        return answer

    def _started(self) -> Any:
        context = get_context("spawn")
        self._ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._given), daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it is for this process alone
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        return process


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...], threads: int, limit: int | None) -> None:
    end_with_parent()
    _stay_under(limit)
    torch.set_num_threads(threads)
    bench = None
    while True:
        arm, steps = pipe.recv()
        try:
            bench = bench or make(*arguments)
            pipe.send(bench(arm, steps))
        except Exception as error:
            pipe.send(reason_of(error))


def _stay_under(limit: int | None) -> None:
    """Let allocations beyond a limit fail in this process, and the system end it before any other that is in want."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{os.getpid()}/oom_score_adj").write_text("1000")
    if limit is not None:
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
