"""Runs pieces of work side by side on Python threads whose operations use one core each.

Operations that stay in a core's cache are too short to be split over cores: waking the others costs as much as they
save. Whole pieces side by side leave every core alone with its own.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from threading import Barrier, local
from typing import TypeVar

import torch

MOST_WORKERS = 16  # more would wait for Python's lock; from there on, each worker gets several torch threads
KEPT_BYTES = 16 << 20  # that a torch thread keeps for the next call: new memory costs a page fault every 4 KB
Piece = TypeVar("Piece")
_LOCAL = local()


def worker_threads(threads: int) -> tuple[int, int]:
    """How many workers share so many torch threads, and how many each of them has."""
    workers = min(threads, MOST_WORKERS)
    return workers, threads // workers


def run_all(work: Callable[[Piece, dict[str, torch.Tensor]], None], pieces: Iterable[Piece], workers: int) -> None:
    """Call `work(piece, buffers)` once for every piece, in any order, `workers` at a time, without gradients.

    `buffers` is a dict of the worker's own, for memory that its pieces and later calls reuse; see `buffer`. The first
    error is raised once all workers have stopped.
    """
    waiting, inference = deque(pieces), torch.is_inference_mode_enabled()

    def drain() -> None:
        buffers = thread_buffers()
        with torch.inference_mode(inference), torch.no_grad():  # both hold for one thread only
            while waiting:
                try:
                    piece = waiting.popleft()
                except IndexError:  # another worker was faster
                    return
                try:
                    work(piece, buffers)
                except BaseException:
                    waiting.clear()
                    raise

    workers = min(workers, len(waiting))
    if workers <= 1:
        drain()
        return
    threads = torch.get_num_threads()
    pool = _pool(threads)
    torch.set_num_threads(worker_threads(threads)[1])  # MKL knows one setting for all threads
    try:
        futures = [pool.submit(drain) for _ in range(workers)]
        while wait(futures, timeout=0.5).not_done:  # a signal that comes just before a wait without end is not seen
            pass
    finally:
        waiting.clear()  # empty already, unless Ctrl-C ended the wait
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


def buffer(
    buffers: dict[str, torch.Tensor], name: str, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A view of a reused flat buffer on the device of `like`; grown when too small."""
    size, key = math.prod(shape), f"{name} {dtype} {like.device}"
    flat = buffers.get(key)
    if flat is None or flat.numel() < size:
        with torch.inference_mode(False):  # what is made in it can't be written outside
            flat = buffers[key] = like.new_empty(size, dtype=dtype)
    return flat[:size].view(shape)


def thread_buffers() -> dict[str, torch.Tensor]:
    """This thread's buffers; of an earlier call only if they are small and on the CPU."""
    kept, most = getattr(_LOCAL, "buffers", {}), KEPT_BYTES * torch.get_num_threads()
    if any(x.device.type != "cpu" for x in kept.values()) or sum(x.nbytes for x in kept.values()) > most:
        kept = {}
    _LOCAL.buffers = kept
    return kept


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    """The workers for a number of torch threads; they start once and wait for work."""
    workers, each = worker_threads(threads)
    everybody = Barrier(workers)

    def settle(count: int) -> None:
        torch.set_num_threads(count)  # OpenMP's setting is a thread's own
        everybody.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="dit-accel")
    list(pool.map(settle, [each] * workers))
    torch.set_num_threads(threads)  # threads that start later inherit the last setting
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads
