"""Processes that compute beside each other, and that end with the one that started them, however it ends."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context, parent_process
from typing import Any, TypeVar

from dit_accel.files import remove_temporaries

Maker = TypeVar("Maker")

LOOK = 1.0  # seconds between two looks at what the processes have made
_maker: list[Any] = []  # what this process works with, if it is one of a pool


def run_beside(
    make: Callable[[], Maker], work: Callable[[Maker, Any], object], items: Sequence[Any], workers: int, *,
    look: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Do some work in processes, each with what it makes when it begins; what stops this one ends them at once."""
    running, ctrl_c = set(active_children()), {signal.SIGINT}
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(make,)) as pool:
        try:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, ctrl_c)  # which the processes inherit: it is for this one
            try:
                pending = {pool.submit(_do, work, item) for item in items}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            while pending:
                ready, pending = wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED)
                for future in ready:
                    future.result()
                look()
        except BaseException:
            for process in set(active_children()) - running:
                process.terminate()
            raise


def _begin(make: Callable[[], Any]) -> None:
    end_with_parent()
    _maker.append(make())


def _do(work: Callable[[Any, Any], object], item: Any) -> None:
    work(_maker[-1], item)


def end_with_parent() -> None:
    """End this process, without a word, on a SIGTERM or when the one that started it has ended, however it did."""
    parent = parent_process()
    assert parent is not None

    def end(*_: object) -> None:
        remove_temporaries()
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=lambda: end(parent.join()), daemon=True).start()
