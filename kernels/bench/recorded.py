"""Records the kernel launches of real calls for a GPU that need not be there: what they are compiled from.

Triton believes that its device is the target's, and its launcher hands over what it would compile, instead of doing so.
The calls themselves run on the CPU, on whatever memory holds.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import calls
import torch
from dit_accel_kernels.backends.triton.launch import Key, Launch, launch_table, row_of
from targets import EVERY

BACKEND = "dit_accel_kernels.backends.triton"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """One launch of a kernel, as its JIT compiles it: everything that may go to another process.

    `kernel` is "module:function", `gpu` the arguments of Triton's GPUTarget; `signature`, `constexprs` and `attrs` are
    those of `triton.compiler.ASTSource`, `options` all of the backend's, `row` that of the launch table which gave its
    sizes.
    """

    name: str
    kernel: str
    target: str
    gpu: tuple[str, int | str, int]
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    options: dict[str, Any]
    row: Key | None = None

    @property
    def function(self) -> Any:
        """The kernel."""
        module, _, name = self.kernel.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def kernel_name(self) -> str:
        """The kernel's name, such as "fwd"."""
        return self.name.split("-")[0]

    @property
    def identity(self) -> str:
        """The same text for launches of the same row that compile to the same."""
        sizes = (self.num_warps, self.num_stages)
        return repr((self.kernel, self.signature, self.constexprs, self.attrs, *sizes, self.row))

    def source(self) -> Any:
        """What `triton.compile` takes."""
        from triton.compiler import ASTSource

        return ASTSource(fn=self.function, signature=self.signature, constexprs=self.constexprs, attrs=self.attrs)

    def compiled(self) -> Any:
        """What Triton makes of it, from its cache on disk if it is there; a launch then finds it there too."""
        import triton
        from triton.backends.compiler import GPUTarget

        return triton.compile(self.source(), target=GPUTarget(*self.gpu), options=self.options)


class _Pretended:
    """A driver for a device that isn't there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:  # the key of Triton's caches
        return repr(self.target)

    def get_current_stream(self, device: Any) -> int:
        return 0


def gpu_target(target: str) -> Any:
    """Triton's description of a target; of the GPU at hand, where it is none of those."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    if target not in EVERY:
        return driver.active.get_current_target()
    of = EVERY[target]
    return GPUTarget(of.backend, of.arch, of.warp)


@contextmanager
def recording(target: str, into: dict[str, Recorded], name: str) -> Iterator[None]:
    """Put what is launched within `into`, by identity, as launches of the call `name` on this target."""
    from triton import knobs
    from triton.runtime import driver

    gpu, rows = gpu_target(target), {}

    def looked_up(
        arch: str, dtype: torch.dtype, dim: int, tile: int = 128, kernel: str = "fwd", features: Iterable[str] = ()
    ) -> Launch:
        rows[kernel] = row_of(arch, dtype, dim, tile, kernel, features)
        return launch_table()[rows[kernel]]

    def launched(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        short = fn.name.strip("_").removesuffix("_kernel")
        record = Recorded(
            name=f"{short}-{name}",
            kernel=f"{fn.jit_function.__module__}:{fn.name}",
            target=target,
            gpu=(gpu.backend, gpu.arch, gpu.warp_size),
            signature=dict(compile["signature"]),
            constexprs={tuple(path): value for path, value in compile["constants"].items()},
            attrs={tuple(path): value for path, value in compile["configs"][0].items()},
            num_warps=compile["num_warps"],
            num_stages=compile["num_stages"],
            options={name: tuple(x) if isinstance(x, list) else x for name, x in options.items()},
            row=rows.get("pooled" if short == "pooled_dkdv" else short),
        )
        if any(x.name == record.name for key, x in into.items() if key != record.identity):  # twice in one call
            record = replace(record, name=f"{record.name}+again")
        into.setdefault(record.identity, record)
        return True  # known already, says this to the JIT: it neither compiles nor launches

    attend, support = (importlib.import_module(f"{BACKEND}.{name}") for name in ("attend", "support"))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(attend, "architecture", return_value=target))
        stack.enter_context(mock.patch.object(attend, "launch_of", looked_up))
        stack.enter_context(mock.patch.object(support, "missing_requirement", return_value=None))
        stack.enter_context(mock.patch.object(knobs.runtime, "jit_cache_hook", launched))
        stack.callback(driver.set_active, getattr(driver, "_active", None))
        driver.set_active(_Pretended(gpu))
        yield


@contextmanager
def without_flash_attention() -> Iterator[None]:
    """Give the fa4 backend zeros for what FlashAttention-4 computes: it then needs neither a card nor the package."""
    fa4 = importlib.import_module("dit_accel_kernels.backends.fa4")

    def exact_tiles(problem: Any, *, need_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, tokens, _ = problem.q.shape
        out = problem.v.new_zeros(batch, tokens, heads, problem.v.shape[3]).transpose(1, 2)
        return out, torch.zeros(batch, heads, tokens)

    with (
        mock.patch.object(fa4, "missing_requirement", return_value=None),
        mock.patch.object(fa4, "_exact_tiles", exact_tiles),
    ):
        yield


def launches_of(kind: str, at: calls.Setting, target: str, into: dict[str, Recorded], backend: str = "triton") -> None:
    """Record what one call of a kind launches on a target; by fa4 what adds to the output and LSE of exact tiles."""
    call = calls.make(kind, at, "cpu", empty=True)
    name = f"{at.name}-{kind}" + "+started" * (backend == "fa4")
    with recording(target, into, name), without_flash_attention():
        call.run(backend)
