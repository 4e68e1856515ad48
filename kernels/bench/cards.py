"""Limits and public peak figures of the GPUs that the compile table and the roofline speak of."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What one compile target allows: per SM (CU on AMD), per block and per thread.

    Bytes of shared memory, 32-bit registers, threads. `register_step` is the granule of registers per warp (NVIDIA) or
    per lane (AMD); `reserved` is what the system takes of the SM's shared memory for every block; `tensor` is the
    instruction family of its tensor cores in `listing`, `issue` the instructions that an SM's schedulers issue in a
    clock, each for a warp. Sources: CUDA C++ Programming Guide, "Technical Specifications
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
    issue: int


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
        issue=4,
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
            issue=5,  # of five kinds, one kind each, from the waves of one SIMD
        ),
    )
}

MEMBERS = {  # of families: other cards for which the rows of a target serve, launch.FAMILY
    target.name: target
    for target in (
        replace(TARGETS["sm_89"], name="sm_86", arch=86, blocks=16),
        replace(TARGETS["sm_80"], name="sm_87", arch=87, threads=1536, blocks=16),
        replace(TARGETS["sm_100"], name="sm_103", arch=103),
        replace(TARGETS["sm_120"], name="sm_121", arch=121),
    )
}
EVERY = TARGETS | MEMBERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Public figures of one card: dense 16-bit TFLOP/s with fp32 accumulation, GB/s, SMs, boost clock in GHz.

    `l2` is the bandwidth of the second-level cache in GB/s, the lowest and the highest figure known. `exp2` counts
    exponentials and `lanes` fp32 operations, per SM (CU) and clock. `dense` is the share of its peak that the best
    dense attention is published to reach with heads of 128, None where no figure is.
    """

    name: str
    target: str
    tflops: float
    bandwidth: float
    l2: tuple[float, float]
    cores: int
    clock: float
    exp2: int
    lanes: int
    dense: float | None = None


def _ports(cores: int, clock: float) -> tuple[float, float]:
    """GB/s that SMs can take from their second-level cache, 64 bytes a clock each: no more than that is known."""
    return 64 * cores * clock, 64 * cores * clock


# NVIDIA: A100, L40S, Ada (RTX 4090), H100 SXM, Blackwell (RTX 5090) and B200 (HGX) data sheets and architecture white
# papers; 16 special-function lanes an SM from the CUDA guide's table of arithmetic throughput. AMD: MI300X data sheet;
# transcendentals at a quarter of the vector rate. Second-level cache: A100 white paper, 5120 bytes a clock; H100, 5.5
# to 7 TB/s measured, no figure published; MI300X, 2 KB a clock and die (CDNA 3 white paper). Dense attention:
# FlashAttention-2 (arXiv 2307.08691), -3 (arXiv 2407.08608), -4 (its authors' report).
CARDS = {
    card.name: card
    for card in (
        Card(
            name="A100", target="sm_80", tflops=312, bandwidth=2039, l2=(7219, 7219), cores=108, clock=1.41, exp2=16,
            lanes=64, dense=0.73,
        ),
        Card(
            name="L40S", target="sm_89", tflops=362, bandwidth=864, l2=_ports(142, 2.52), cores=142, clock=2.52,
            exp2=16, lanes=128,
        ),
        Card(
            name="RTX 4090", target="sm_89", tflops=165.2, bandwidth=1008, l2=_ports(128, 2.52), cores=128, clock=2.52,
            exp2=16, lanes=128,
        ),
        Card(
            name="H100", target="sm_90", tflops=989.4, bandwidth=3350, l2=(5500, 7000), cores=132, clock=1.83, exp2=16,
            lanes=128, dense=0.75,
        ),
        Card(
            name="B200", target="sm_100", tflops=2250, bandwidth=8000, l2=_ports(148, 1.85), cores=148, clock=1.85,
            exp2=16, lanes=128, dense=0.71,
        ),
        Card(
            name="RTX 5090", target="sm_120", tflops=209.5, bandwidth=1792, l2=_ports(170, 2.41), cores=170, clock=2.41,
            exp2=16, lanes=128,
        ),
        Card(
            name="MI300X", target="gfx942", tflops=1307.4, bandwidth=5300, l2=(34406, 34406), cores=304, clock=2.1,
            exp2=16, lanes=64,
        ),
    )
}  # fmt: skip


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
