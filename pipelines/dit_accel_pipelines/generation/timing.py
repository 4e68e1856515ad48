"""Times a pipeline's steps by standing in for its progress bar, which every pipeline moves step by step."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .progress import Stages


@dataclass(slots=True)
class Timings:
    """Seconds that the stages of one generation took."""

    steps: list[float] = field(default_factory=list)  # seconds of each denoising step
    text: float = 0.0  # until the first step begins: encoding the prompt, and what else is prepared
    denoise: float = 0.0  # all steps
    decode: float = 0.0  # from the last step to the frames
    processor: float = 0.0  # processor seconds of the process during all steps, of all its threads

    @property
    def total(self) -> float:
        """Return the seconds of all stages."""
        return self.text + self.denoise + self.decode


@contextlib.contextmanager
def timed_steps(pipe: Any, stages: Stages, after_step: Callable[[], None] = lambda: None) -> Iterator[Timings]:
    """Give the timings of what ``pipe`` makes inside the block, of all its steps; complete when the block ends."""
    timings = Timings()
    started = time.perf_counter()
    clock: list[float] = []
    busy: list[float] = []

    def step() -> None:
        now = time.perf_counter()
        timings.steps.append(now - clock[-1])
        timings.processor += time.process_time() - busy[-1]
        after_step()
        clock.append(time.perf_counter())
        busy.append(time.process_time())
        stages.advance()

    def progress_bar(iterable: Sequence[Any] | None = None, total: int | None = None) -> _StepBar:
        stages.stage("denoising", len(iterable) if iterable is not None else total)
        clock.append(time.perf_counter())  # of a second picture too, before which the first one is decoded
        busy.append(time.process_time())
        return _StepBar(() if iterable is None else iterable, step, stages)

    pipe.progress_bar = progress_bar  # on the object; its class stays as it is
    try:
        yield timings
    finally:
        del pipe.progress_bar
    begun, ended = (clock[0], clock[-1]) if clock else (started, started)
    timings.text, timings.denoise = begun - started, sum(timings.steps)
    timings.decode = time.perf_counter() - ended


class _StepBar:
    """What pipelines use of a tqdm bar: a context manager, an iterator, and `update`."""

    def __init__(self, items: Sequence[Any], step: Any, stages: Stages) -> None:
        self._items, self._step, self._stages = items, step, stages

    def __enter__(self) -> "_StepBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self._step()
        self.close()

    def update(self, count: int = 1) -> None:
        """Count steps as done."""
        for _ in range(count):
            self._step()

    def set_description(self, *_: object) -> None:
        """Show nothing: the stages have names of their own."""

    def close(self) -> None:
        """End the steps."""
        self._stages.stage("decoding")
