"""Where kernels run, and by which way of the torch backend."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Where kernels run: compiled on a card (TRITON_INTERPRET=0), else in Triton's interpreter on the CPU."""
    from dit_accel_kernels.backends.triton.support import interpreted

    return "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"


def torch_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the torch backend compute float32 on a CPU by its compiled loop, or by torch's own operations."""
    from dit_accel_kernels.backends.torch import compiled, fused

    if way == "operations":
        monkeypatch.setattr(fused, "compiled_loop", lambda: compiled.Loop(None, "left out"))
    elif fused.compiled_loop().library is None:
        pytest.skip("no C++ compiler is here to build the loop")


@pytest.fixture(params=["loop", "operations"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the torch backend."""
    torch_by(request.param, monkeypatch)


@pytest.fixture
def by_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave float32 on a CPU to torch's own operations."""
    torch_by("operations", monkeypatch)


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Fill every buffer that torch leaves uninitialised with NaN, so that nothing unwritten passes for 0."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name; that of torch stands for both of its ways on a CPU, `loop` and `operations`."""
    if request.param not in ("loop", "operations"):
        return request.param
    torch_by(request.param, monkeypatch)
    return "torch"
