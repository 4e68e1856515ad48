"""Read what the compilers made of a kernel: registers, spilled words, stack, and the tensor cores of its hot loop.

A loop is a branch to an earlier address with all that lies between, if it holds products and neither a program exit nor
another such loop. The hot loop is the one with the fewest instructions a product: that of full tiles, which no mask
touches. Products are tensor-core instructions; where a kernel has none (float32), fused multiply-adds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from targets import Target

TENSOR = {  # instruction families of tensor cores, by the heads of their opcodes
    "wgmma": ("HGMMA", "QGMMA", "IGMMA"),
    "mma": ("HMMA", "QMMA", "IMMA", "DMMA"),
    "tcgen05": ("UTCHMMA", "UTCQMMA", "UTCIMMA"),
    "mfma": ("v_mfma",),
}
EIGHT_BITS = ("IGMMA", "QGMMA", "IMMA", "QMMA", "UTCIMMA", "UTCQMMA", "v_mfma_i32")
SPILLS = ("STL", "LDL", "scratch_store", "scratch_load")
MULTIPLY_ADDS = ("FFMA", "v_fma", "v_pk_fma", "v_fmac", "v_pk_fmac")
EXITS = ("EXIT", "s_endpgm")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its address, or its index on AMD, opcode, whether a predicate guards it, and a jump's target."""

    address: int
    opcode: str
    guarded: bool = False
    target: int | None = None

    @property
    def tensor(self) -> str:
        """The tensor-core family: wgmma, mma, tcgen05, mfma; empty for any other instruction."""
        return next((family for family, heads in TENSOR.items() if self.opcode.startswith(heads)), "")

    @property
    def eight_bits(self) -> bool:
        """Whether it multiplies numbers of eight bits on tensor cores."""
        return bool(self.tensor) and (self.opcode.startswith(EIGHT_BITS) or "fp8" in self.opcode)


_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_AMD = re.compile(r"^\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+|flat_\w+)\s*([^;]*)")


def read_sass(text: str) -> list[Instruction]:
    """Instructions of `cuobjdump -sass` output, in order; addresses in bytes."""
    code = []
    for match in filter(None, map(_SASS.match, text.splitlines())):
        address, guard, opcode, operands = match.groups()
        jump = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if opcode.split(".")[0] == "BRA" else None
        code.append(Instruction(int(address, 16), opcode, bool(guard), int(jump[1], 16) if jump else None))
    return code


def read_amdgcn(text: str) -> list[Instruction]:
    """Instructions of AMD assembly text, in order."""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            labels[label[1]] = len(lines)
        if match := _AMD.match(line):
            lines.append((match[1], match[2].strip()))
    jumps = ("s_cbranch", "s_branch")
    return [
        Instruction(i, opcode, target=labels.get(operands) if opcode.startswith(jumps) else None)
        for i, (opcode, operands) in enumerate(lines)
    ]


def hot_loop(code: list[Instruction]) -> list[Instruction] | None:
    """The loop over full tiles, by the module's rule; None where no loop holds products."""
    on_tensor_cores = any(x.tensor for x in code)

    def products(body: list[Instruction]) -> int:
        return sum(bool(x.tensor) if on_tensor_cores else x.opcode.startswith(MULTIPLY_ADDS) for x in body)

    index = {x.address: i for i, x in enumerate(code)}
    spans = []
    for i, x in enumerate(code):
        if x.target is not None and x.target <= x.address and x.target in index:
            body = code[index[x.target] : i + 1]
            if products(body) and not any(y.opcode in EXITS and not y.guarded for y in body):
                spans.append((index[x.target], i + 1))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    bodies = [code[start:end] for start, end in inner]
    return min(bodies, key=lambda body: len(body) / products(body), default=None)


def spilled_words(code: list[Instruction]) -> int:
    """How many instructions move a register to or from a thread's own memory."""
    return sum(x.opcode.startswith(SPILLS) for x in code)


def read_resources(text: str, names: dict[str, str]) -> dict[str, int]:
    """Numbers of a compiler's report, each behind its name and a colon.

    Raises ValueError where the report lacks one.
    """
    numbers = {}
    for key, name in names.items():
        match = re.search(rf"(?<!\S){re.escape(name)}:\s*(\d+)", text)
        if match is None:
            raise ValueError(f"a compiler's report must hold {name}:<number>, found {text.strip()[:80]!r}")
        numbers[key] = int(match[1])
    return numbers


def describe(asm: dict[str, Any], shared: int, target: Target) -> dict[str, Any]:
    """Registers, stack, spills, shared memory (bytes) and tensor cores of one compiled kernel, from its texts.

    `hot_spills` counts those of the hot loop; it is there only where anything spills and a loop holds products, and
    `eight_bits` where some of these are of eight bits.
    """
    if target.backend == "cuda":
        text = _disassemble(asm["cubin"])
        code = read_sass(text)
        resources = read_resources(text, {"registers": "REG", "stack": "STACK"}) | {"spills": spilled_words(code)}
    else:
        text, code = asm["amdgcn"], read_amdgcn(asm["amdgcn"])
        names = {"registers": ".vgpr_count", "stack": ".private_segment_fixed_size", "spills": ".vgpr_spill_count"}
        resources = read_resources(text, names)
    hot = hot_loop(code)
    return {
        **resources,
        **({"hot_spills": spilled_words(hot)} if resources["spills"] and hot is not None else {}),
        "shared": shared,
        "shared_limit": target.shared_block,
        **({"eight_bits": True} if any(x.eight_bits for x in hot or ()) else {}),
        "tensor": "+".join(sorted({x.tensor for x in hot or ()} - {""})),
    }


def _disassemble(cubin: bytes) -> str:
    """SASS and resource usage of a cubin, by a tool in Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
