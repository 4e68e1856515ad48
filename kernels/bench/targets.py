"""Compile targets of the Triton kernels: what their compilers are given and how much shared memory a block has."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One compile target: Triton's backend, architecture and warp size, bytes of shared memory that a block may take.

    `tensor` is the instruction family of its tensor cores (compiled.py). Sources: CUDA C++ Programming Guide,
    "Technical Specifications per Compute Capability"; AMD CDNA3 ISA guide.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_block: int
    tensor: str


def _nvidia(arch: int, shared_kilobytes: int, tensor: str) -> Target:
    shared = shared_kilobytes * 1024
    return Target(name=f"sm_{arch}", backend="cuda", arch=arch, warp=32, shared_block=shared, tensor=tensor)


TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 163, "mma"),
        _nvidia(89, 99, "mma"),
        _nvidia(90, 227, "wgmma"),
        _nvidia(100, 227, "tcgen05"),
        _nvidia(120, 99, "mma"),
        Target(name="gfx942", backend="hip", arch="gfx942", warp=64, shared_block=65536, tensor="mfma"),
    )
}
MEMBERS = {  # other cards that the rows of a target serve (launch.FAMILY)
    target.name: target
    for target in (
        replace(TARGETS["sm_89"], name="sm_86", arch=86),
        replace(TARGETS["sm_80"], name="sm_87", arch=87),
        replace(TARGETS["sm_100"], name="sm_103", arch=103),
        replace(TARGETS["sm_120"], name="sm_121", arch=121),
    )
}
EVERY = TARGETS | MEMBERS
