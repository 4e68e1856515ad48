"""The kernels that a call may be handed to: what each needs for it, and how it is run.

A candidate's own file says what it can do. None but torch is a dependency: each is found by import, and accepted by
the self check, not by its version.
"""

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import cudnn, fa4, flashinfer, flex, reference
from ..backends.library import version_of
from ..backends.torch import attend as torch_backend
from ..backends.torch import fused
from ..backends.triton import support as triton_support
from ..errors import BackendUnavailableError
from ..problem import Problem

Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Output [B, H, S_q, D], LSE [B, H, S_q], exact tiles, kept bits of a call; what it doesn't give is empty or None."""


class Candidate(NamedTuple):
    """One kernel: what a call lacks here, as "backend 'x' needs ..." or None; how it runs; its package, if not ours.

    "auto" tries it on the device types `on`, on all where it is empty. `in_order`: it follows the caller's order of
    tokens by itself, others get calls in tiled order. `waits`: it takes seconds to compile, so that it is tried where
    nothing else passes, or by name.
    """

    refusal: Callable[[Problem], str | None]
    attend: Callable[[Problem], Results]
    package: str | None = None
    on: tuple[str, ...] = ()
    in_order: bool = False
    waits: bool = False

    def takes(self, problem: Problem) -> bool:
        """Whether "auto" may hand a call to it."""
        return (not self.on or problem.q.device.type in self.on) and self.refusal(problem) is None

    def run(self, problem: Problem) -> Results:
        """The results of a call, in its own order of tokens if the kernel follows that, else in the tiled one."""
        return self.attend(problem if self.in_order else problem.tiled())

    @property
    def version(self) -> str:
        """The version of the package that the kernel comes from, or "" for ours and torch's."""
        return version_of(self.package) if self.package else ""


def _triton(problem: Problem) -> Results:
    """A call by our Triton kernel, imported on first use: importing this package must not import triton."""
    triton_support.check(problem)
    return importlib.import_module("..backends.triton.attend", __package__).attend(problem)


def _checked(check: Callable[[Problem], None]) -> Callable[[Problem], str | None]:
    """A check that raises, as a sentence."""

    def refusal(problem: Problem) -> str | None:
        try:
            check(problem)
        except BackendUnavailableError as error:
            return str(error)
        return None

    return refusal


def _loop_refusal(problem: Problem) -> str | None:
    device, dtype = problem.q.device, problem.q.dtype
    return None if fused.takes(device, dtype) else f"the compiled loop takes no such call: {fused.way(device, dtype)}"


CANDIDATES: dict[str, Candidate] = {
    "triton": Candidate(_checked(triton_support.check), _triton, "triton", ("cuda", "xpu"), in_order=True),
    "cudnn": Candidate(_checked(cudnn.check), cudnn.attend, cudnn.PACKAGE, ("cuda",)),
    "fa4": Candidate(_checked(fa4.check), fa4.attend, fa4.PACKAGE, ("cuda",)),
    "flashinfer": Candidate(_checked(flashinfer.check), flashinfer.attend, flashinfer.PACKAGE, ("cuda",)),
    "torch": Candidate(_loop_refusal, torch_backend.attend),
    # what is left on other devices, where it is too slow to be raced
    "gather": Candidate(lambda x: None, partial(torch_backend.attend, by_loop=False), on=("cpu",)),
    "flex": Candidate(_checked(flex.check), flex.attend, waits=True),
    "reference": Candidate(lambda x: None, reference.attend),
}  # fmt: skip
"""Name -> candidate, the likeliest to win first."""

OURS = ("triton", "torch", "gather")
"""Taken without a race, in this order."""


@lru_cache(maxsize=16)
def machine(device: torch.device) -> str:
    """What measurements on a device hold for: its name and count of threads, torch, the packages of candidates."""
    versions = [f"{name} {one.version}" for name, one in CANDIDATES.items() if one.package and one.version]
    if device.type == "cpu":
        from ..backends.torch.compiled import processor_text

        name = f"{processor_text()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "; ".join((name, f"torch {torch.__version__}", *versions, version_of("dit-accel-kernels")))
