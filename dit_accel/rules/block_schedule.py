"""Schedules of caches of blocks: which steps store anew what the cached blocks add."""

from collections.abc import Sequence


def fixed(first: int, every: int, steps: int) -> tuple[int, ...]:
    """Return each ``every``-th step of a run of ``steps``, from ``first`` on."""
    return tuple(range(first, steps, every))


def shrinking(first: int, every: int, every_last: int, steps: int) -> tuple[int, ...]:
    """Return steps whose distances shrink linearly over the run, from ``every`` to ``every_last``.

    Source: ProfilingDiT (arXiv 2504.03140): T = T_max - (T_max - T_min) (s - s0) / (S - s0). Where we depart from it:
    it stores where s mod T = 0, which strays while T changes; here the next step lies T, rounded, behind the last.

    Args:
        first: the first of them, s0.
        every: distance there, T_max.
        every_last: distance at the run's end, T_min.
        steps: steps of the run, S.
    """
    steps_stored, step = [], first
    while step < steps:
        steps_stored.append(step)
        step += max(1, round(every - (every - every_last) * (step - first) / (steps - first)))
    return tuple(steps_stored)


def rescaled(listed: Sequence[int], measured: int, steps: int) -> tuple[int, ...]:
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
