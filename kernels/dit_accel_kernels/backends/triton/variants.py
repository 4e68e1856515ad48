"""What every Triton kernel module exports for ahead-of-time compilation: one record for each kernel the methods use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as it is launched for some method, dtype and head dim, ready to be compiled without a GPU.

    Args:
        name: unique within its module, such as "fwd-bf16-d128-plain".
        kernel: the module-level @triton.jit function.
        signature: Triton type of every runtime argument, in the kernel's order; a suffix ":16" says that the pointer or
            integer is divisible by 16, as it is at run time ("*bf16:16", "i64:16", "i32", "fp32").
        constexprs: value of every constexpr argument.
        num_warps: warps a program.
        num_stages: stages of the software pipeline.
        hot_loop: True where the kernel's first loop must show tensor-core instructions and neither a predicated load
            nor a select.
        targets: the architectures that launch it like this, out of TARGETS.
        turns: turns of the hot loop from one run of what lies behind a branch in it to the next, then of what lies
            behind two, where that isn't every turn.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    hot_loop: bool = True
    targets: tuple[str, ...] = TARGETS
    turns: tuple[int, ...] = ()

    def source_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `triton.compiler.ASTSource`: fn, signature, constexprs and attrs (divisibility)."""
        names = list(self.kernel.arg_names)
        missing = [n for n in names if n not in self.signature and n not in self.constexprs]
        unknown = [n for n in (*self.signature, *self.constexprs) if n not in names]
        if missing or unknown:
            raise ValueError(f"variant {self.name!r} must fit its kernel: missing {missing}, unknown {unknown}")
        signature, attrs = {}, {}
        for index, name in enumerate(names):
            kind, _, divisor = self.signature.get(name, "constexpr").partition(":")
            signature[name] = kind
            if divisor:
                attrs[(index,)] = [["tt.divisibility", int(divisor)]]
        return {"fn": self.kernel, "signature": signature, "constexprs": dict(self.constexprs), "attrs": attrs}
