"""Shared by all tests: one thread a worker, no network, few cases of large matrices, a reason for skipped GPU tests.

Of a matrix marked `sample`, `make test` runs a few cases that have every value of every parameter, the slow tests a few
others that have them again, and what is left is rare.
"""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIT_ACCEL_MEASURE", "0")  # what computes a call must not hang on a busy machine's timing
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # must be known before anything imports triton; 0 to test on a GPU

from collections import defaultdict
from collections.abc import Generator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers in every run and order."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "sample(n=None): of this test's cases, the fewest that have every value of its parameters, n at most"
    )


def covering(cases: list[dict[str, str]], most: int | None) -> list[int]:
    """Positions of cases, picked one by one, each the first with the most values that none before it has."""
    chosen: list[int] = []
    seen: set[tuple[str, str]] = set()
    while most is None or len(chosen) < most:
        new = [len(set(case.items()) - seen) for case in cases]
        if not max(new, default=0):
            break
        chosen.append(new.index(max(new)))
        seen |= set(cases[chosen[-1]].items())
    return chosen


def leave_most_of_matrices(items: list[pytest.Item]) -> None:
    """Mark as slow what of sampled matrices is not among the fewest cases that have every value, and most as rare."""
    matrices: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            matrices[item.nodeid.split("[")[0]].append(item)
    for cases in matrices.values():
        mark = cases[0].get_closest_marker("sample")
        values = [{k: repr(v) for k, v in case.callspec.params.items()} for case in cases]
        keep = covering(values, *(mark.args or [None]))
        left = [place for place in range(len(cases)) if place not in keep]
        again = {left[place] for place in covering([values[place] for place in left], None)}
        for place in left:
            cases[place].add_marker(pytest.mark.slow)
            if place not in again:
                cases[place].add_marker(pytest.mark.rare)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage in what is imported: it stays, and looking takes seconds, now and in every later search."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


def pytest_unconfigure() -> None:
    gc.unfreeze()  # at the end of the process all is freed, else a library counts what it made as leaked


@pytest.hookimpl(tryfirst=True)  # before what is slow is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_most_of_matrices(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU, this machine has none"))
