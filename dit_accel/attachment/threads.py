"""Keeps two threads from running one attachment at the same time, whose methods follow one run."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import AttachError
from .layers import TransformerState
from .running import PipelineRun


class OneThread:
    """Lets forwards of one attachment run in one thread at a time, and pipelines' runs after one another.

    A run may begin in another thread than the last one, and a loop written by hand may move between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: int | None = None  # the thread in which a forward runs
        self._depth = 0
        self._run: PipelineRun | None = None
        self._threads: set[int] = set()  # in which forwards of this run ran
        self._crossed = False

    def begin_run(self) -> None:
        """Note that a run begins: no forward of it has run yet."""
        self._threads.clear()

    def require(self, state: TransformerState, run: PipelineRun | None) -> None:
        """Raise `AttachError` if a denoising call begins while another thread is in one, or in a pipeline's run."""
        with self._lock:
            self._require(state, run)

    @contextmanager
    def forward(self, state: TransformerState, run: PipelineRun | None) -> Iterator[None]:
        """Hold the attachment while a forward runs in this thread; raise `AttachError` if another thread is in one."""
        me = threading.get_ident()
        with self._lock:
            self._require(state, run)
            self._running, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._lock:
                self._threads.add(me)
                self._depth -= 1
                if self._depth == 0:
                    self._running = None
                crossed, self._crossed = self._crossed, False
        if crossed:
            raise AttachError(_refusal(state, "a forward"))

    def _require(self, state: TransformerState, run: PipelineRun | None) -> None:
        me = threading.get_ident()
        if self._running not in (None, me) or any(branch.thread != me for branch in state.branches):
            self._crossed |= self._running is not None and me in self._threads
            raise AttachError(_refusal(state, "a forward"))
        if self._run is not None and self._run.thread != me and self._run.goes_on():
            raise AttachError(_refusal(state, f"a run of {type(self._run.pipe).__name__}"))
        self._run = run


def _refusal(state: TransformerState, what: str) -> str:
    return (
        f"{what} of {state.name} is in progress in another thread, and what is attached to it follows one run at a "
        "time; run one after the other, or give each thread a transformer with an attachment of its own"
    )
