"""On how many threads the embedded models run: one, unless the environment sets another number."""

import contextlib
import os
from collections.abc import Iterator

CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user chooses."""


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch compute on so many threads inside the block, and afterwards on as many as before; None: as it is."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread(*, embedded: bool) -> contextlib.AbstractContextManager[None]:
    """Let torch compute on one thread inside the block where the model is an embedded one.

    They are too small to gain from a second, and on cores that others use each waits for the other: up to 60 times as
    long. What the environment chooses holds, and so does the number of threads of any other model.
    """
    chosen = any(os.environ.get(name) for name in CHOSEN_BY)
    return threads(1 if embedded and not chosen else None)
