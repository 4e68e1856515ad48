"""The processes that `accelerate launch` started, which share the parts of one run; or the one there is."""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dit_accel.errors import DitAccelError

Value = TypeVar("Value")

PATIENCE = datetime.timedelta(days=14)
"""How long a process waits for the others, which may have longer clips."""


class Ranks:
    """The processes of one run, of which the first, rank 0, alone writes and prints.

    With ``cpu`` they compute on CPUs, whatever else the machine has.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        self._state: Any = None
        self.rank, self.count = 0, 1
        if launched() > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=cpu, timeout=PATIENCE)
            self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def first(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def own(self, items: Sequence[Value]) -> Sequence[Value]:
        """Return this process's part of a list: every process's part is another, and together they are all."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Wait until all processes have called this; if one fails, the launcher ends the others."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def shared(self, work: Callable[[], Value]) -> Value:
        """Do some work in the first process, and hand its result to all of them."""
        result = self._gathered(_tried(work) if self.first else (None, None))[0]
        return _require(result)

    def together(self, work: Callable[[], Value]) -> Value:
        """Do some work in every process, and return what this one's made; it must not wait for the others inside."""
        attempt = _tried(work)
        for _, error in self._gathered((None, attempt[1])):
            _require((None, error))
        return _require(attempt)

    def spread(self, jobs: Sequence[Any], work: Callable[[Any], Value], done: Callable[[Any, Value], None]) -> None:
        """Do some jobs, each in one process, and hand every result to all of them, in the same order, by ``done``.

        After as many jobs as there are processes they wait for one another, so that a run which is stopped loses no
        more than these.
        """
        for begin in range(0, len(jobs), self.count):
            part = jobs[begin : begin + self.count]
            mine = part[self.rank] if self.rank < len(part) else None
            results = self._gathered((None, None) if mine is None else _tried(lambda job=mine: work(job)))
            for job, result in zip(part, results, strict=False):
                done(job, _require(result))

    def close(self) -> None:
        """Part: nothing is shared any more."""
        if self._state is not None:
            self._state.destroy_process_group()
            self._state = None

    def _gathered(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


def launched() -> int:
    """Count the processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _tried(work: Callable[[], Any]) -> tuple[Any, DitAccelError | None]:
    """Do some work; return its result or its error, of which the other processes must hear, or they would wait."""
    try:
        return work(), None
    except DitAccelError as error:
        return None, error


def _require(attempt: tuple[Any, DitAccelError | None]) -> Any:
    if attempt[1] is not None:
        raise attempt[1]
    return attempt[0]
