"""Of large matrices of cases, `make test` runs a few that have every value of every parameter; the rest is slow."""

from collections import defaultdict

import pytest
import torch


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


@pytest.hookimpl(tryfirst=True)  # before what is slow is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    matrices: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample"):
            matrices[item.nodeid.split("[")[0]].append(item)
    for cases in matrices.values():
        mark = cases[0].get_closest_marker("sample")
        keep = covering(
            [{k: repr(v) for k, v in case.callspec.params.items()} for case in cases], *(mark.args or [None])
        )
        for position, case in enumerate(cases):
            if position not in keep:
                case.add_marker(pytest.mark.slow)


@pytest.fixture
def device() -> str:
    """Where kernels run: compiled on a card (TRITON_INTERPRET=0), else in Triton's interpreter on the CPU."""
    from dit_accel_kernels.backends.triton.support import interpreted

    return "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"


@pytest.fixture(params=["loop", "operations"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the torch backend computes float32 on a CPU: by its compiled loop, or by torch's own operations."""
    from dit_accel_kernels.backends.torch import compiled, fused

    if request.param == "operations":
        monkeypatch.setattr(fused, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("no C++ compiler is here to build the loop")
    return request.param


@pytest.fixture
def by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave float32 on a CPU to torch's own operations."""
    from dit_accel_kernels.backends.torch import fused

    monkeypatch.setattr(fused, "library", lambda: None)
