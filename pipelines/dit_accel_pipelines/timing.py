"""Times a pipeline's steps by standing in for its progress bar, which every pipeline moves step by step."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .progress import Stages


@dataclass(slots=True)
class Timings:
    """Seconds that the stages of one generation took.

    Attributes:
        steps: seconds of each denoising step; the first includes encoding the prompt.
        denoise: all steps.
        decode: from the last step to the frames.
    """

    steps: list[float] = field(default_factory=list)
    denoise: float = 0.0
    decode: float = 0.0


@contextlib.contextmanager
def timed_steps(pipe: Any, stages: Stages) -> Iterator[Timings]:
    """Give the timings of the one call of ``pipe`` inside the block; complete when the block ends."""
    timings = Timings()
    clock = [time.perf_counter()]

    def step() -> None:
        now = time.perf_counter()
        timings.steps.append(now - clock[-1])
        clock.append(now)
        stages.advance()

    def progress_bar(iterable: Sequence[Any] | None = None, total: int | None = None) -> _StepBar:
        stages.stage("denoising", len(iterable) if iterable is not None else total)
        return _StepBar(iterable or (), step, stages)

    pipe.progress_bar = progress_bar  # on the object; its class stays as it is
    try:
        yield timings
    finally:
        del pipe.progress_bar
    timings.denoise, timings.decode = clock[-1] - clock[0], time.perf_counter() - clock[-1]


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
