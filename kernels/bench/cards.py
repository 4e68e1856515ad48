"""Limits and public peak figures of the GPUs that the compile table and the roofline speak of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What one compile target allows: per SM (CU on AMD), per block and per thread.

    Bytes of shared memory, 32-bit registers, threads. `register_step` is the granule of registers per warp (NVIDIA) or
    per lane (AMD); `reserved` is what the system takes of the SM's shared memory for every block; `tensor` is the
    instruction family of its tensor cores in `listing`. Sources: CUDA C++ Programming Guide, "Technical Specifications
    per Compute Capability"; AMD CDNA3 ISA guide and the LLVM AMDGPU backend's occupancy rules.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    registers: int
    register_step: int
    shared: int
    shared_block: int
    reserved: int
    threads: int
    blocks: int
    tensor: str


def _nvidia(arch: int, shared: int, shared_block: int, threads: int, blocks: int, tensor: str) -> Target:
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        warp=32,
        registers=65536,
        register_step=256,
        shared=shared * 1024,
        shared_block=shared_block * 1024,
        reserved=1024,
        threads=threads,
        blocks=blocks,
        tensor=tensor,
    )


TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 164, 163, 2048, 32, "mma"),
        _nvidia(89, 100, 99, 1536, 24, "mma"),
        _nvidia(90, 228, 227, 2048, 32, "wgmma"),
        _nvidia(100, 228, 227, 2048, 32, "tcgen05"),
        _nvidia(120, 100, 99, 1536, 24, "mma"),
        Target(
            name="gfx942",
            backend="hip",
            arch="gfx942",
            warp=64,
            registers=4 * 64 * 512,
            register_step=8,
            shared=65536,
            shared_block=65536,
            reserved=0,
            threads=2048,
            blocks=32,
            tensor="mfma",
        ),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Public peak figures of one card: dense 16-bit TFLOP/s with fp32 accumulation, GB/s, SMs, boost clock in GHz.

    `exp2` counts exponentials and `lanes` plain fp32 instructions, per SM (CU) and clock.
    """

    name: str
    target: str
    tflops: float
    bandwidth: float
    cores: int
    clock: float
    exp2: int
    lanes: int


# NVIDIA: A100, L40S, Ada (RTX 4090), H100 SXM, Blackwell (RTX 5090) and B200 (HGX) data sheets and architecture white
# papers; 16 special-function lanes an SM from the CUDA guide's table of arithmetic throughput. AMD: MI300X data sheet;
# transcendentals at a quarter of the vector rate.
CARDS = {
    card.name: card
    for card in (
        Card(name="A100", target="sm_80", tflops=312, bandwidth=2039, cores=108, clock=1.41, exp2=16, lanes=64),
        Card(name="L40S", target="sm_89", tflops=362, bandwidth=864, cores=142, clock=2.52, exp2=16, lanes=128),
        Card(name="RTX 4090", target="sm_89", tflops=165.2, bandwidth=1008, cores=128, clock=2.52, exp2=16, lanes=128),
        Card(name="H100", target="sm_90", tflops=989.4, bandwidth=3350, cores=132, clock=1.83, exp2=16, lanes=128),
        Card(name="B200", target="sm_100", tflops=2250, bandwidth=8000, cores=148, clock=1.85, exp2=16, lanes=128),
        Card(name="RTX 5090", target="sm_120", tflops=209.5, bandwidth=1792, cores=170, clock=2.41, exp2=16, lanes=128),
        Card(name="MI300X", target="gfx942", tflops=1307.4, bandwidth=5300, cores=304, clock=2.1, exp2=16, lanes=64),
    )
}


def occupancy(target: Target, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Most blocks that fit one SM, and what bounds them: registers, shared memory, threads or the block limit.

    `registers` per thread, `shared` bytes a block, `warps` a block. 0 where not even one fits.
    """
    step = target.register_step
    if target.backend == "cuda":
        warp_registers = -(-registers * target.warp // step) * step
        by_registers = target.registers // max(1, warp_registers * warps)
    else:  # waves stay on one of four SIMDs: each holds 512 registers a lane, at most 8 waves
        waves = min(8, 512 // max(step, -(-registers // step) * step))
        by_registers = 4 * waves // warps
    bounds = {
        "registers": by_registers,
        "shared memory": (target.shared // (shared + target.reserved)) if shared + target.reserved else target.blocks,
        "threads": target.threads // (warps * target.warp),
        "blocks": target.blocks,
    }
    if shared > target.shared_block:
        return 0, "shared memory"
    limit = min(bounds, key=lambda name: bounds[name])
    return bounds[limit], limit
