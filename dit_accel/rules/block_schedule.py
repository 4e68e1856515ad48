"""Schedules of caches of blocks: which steps store anew what the cached blocks add."""

from collections.abc import Sequence


def rescaled_steps(listed: Sequence[int], measured: int, steps: int) -> tuple[int, ...]:
    """Return steps of a run of ``measured`` as those of a run of ``steps``, rounded, each once."""
    return tuple(sorted({min(round(step * steps / measured), steps - 1) for step in listed}))


def runs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Return the runs (first, last) of consecutive blocks, of block numbers in any order."""
    runs: list[tuple[int, int]] = []
    for index in sorted({*blocks}):
        if runs and runs[-1][1] == index - 1:
            runs[-1] = runs[-1][0], index
        else:
            runs.append((index, index))
    return runs
