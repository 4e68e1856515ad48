"""The error of a launch for which a card has too little: the row of the launch table, what it takes, what there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from triton.runtime.errors import OutOfResources

from dit_accel_kernels.backends.triton.launch import architecture, row_of
from dit_accel_kernels.errors import BackendUnavailableError
from dit_accel_kernels.problem import Problem


@contextmanager
def fitting(kernel: str, problem: Problem, features: Iterable[str], tile: int = 128) -> Iterator[None]:
    """Within it a launch of a kernel by the launch table runs, or raises BackendUnavailableError with its row.

    Every row fits the cards that it was compiled for (bench/aot.py); others may have less.
    """
    try:
        yield
    except OutOfResources as error:
        q = problem.q
        arch = architecture(q.device)
        row = row_of(arch, q.dtype, q.shape[-1], tile, kernel, features)
        named = ", ".join(f"{name} {value!r}" for name, value in row._asdict().items())
        raise BackendUnavailableError(
            f"backend 'triton' needs {error.required} of {error.name} for the row of launch_table.json with {named} "
            f"(found {error.limit} on {arch}): use backend='torch'"
        ) from error
