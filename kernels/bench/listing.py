"""Read compiled kernels: hot loops and instruction mixes from Triton IR, NVIDIA SASS and AMD assembly text.

The hot loop of machine code: a loop is a branch to an earlier address together with everything from that address to the
branch; it counts if it holds tensor-core instructions and no program exit (blocks that wait on barriers are laid out
behind the exit and jump back: those are no loops), and only if no other such loop lies inside it. The hot loop of IR:
an `scf.for` or `scf.while` with a `tt.dot` and no loop with one inside. A kernel with several (pooled columns apart
from exact tiles) has its full tiles in the one with the fewest masked loads, then the fewest selects, then the most
work. A kernel without any tensor-core instruction (fp32 products) is read by its fused multiply-adds instead.

Why IR as well: the software pipeliner guards every asynchronous copy with the loop's bound, so that in SASS even a
plain load carries a predicate. In IR a masked load is one with a mask operand and nothing else is. In SASS the
difference still shows: all copies of one plain load share one guard, those of a masked load have one each; hence
`guards`, the distinct predicates on loads, which must not exceed the number of IR loads, list entries included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

READING = 3  # to be raised when a listing is read in another way: records made before count no more


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: position in the text, address or label-free index, guard predicate, opcode, operands."""

    address: int
    guard: str
    opcode: str
    operands: str
    target: int | None = None


_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")


def read_sass(text: str) -> list[Instruction]:
    """Instructions of `cuobjdump -sass` output, in order; addresses in bytes."""
    found = []
    for line in text.splitlines():
        match = _SASS.match(line)
        if match is None:
            continue
        address, guard, opcode, operands = match.groups()
        target = None
        if opcode.split(".")[0] == "BRA":
            destination = _SASS_TARGET.search(operands.strip())
            target = int(destination.group(1), 16) if destination else None
        found.append(Instruction(int(address, 16), guard or "", opcode, operands.strip(), target))
    return found


_AMD_LABEL = re.compile(r"^(\.L\w+):")
_AMD = re.compile(r"^\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+|flat_\w+)\s*([^;]*)")


def read_amdgcn(text: str) -> list[Instruction]:
    """Instructions of AMD assembly text, in order; the address is the instruction's index."""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = _AMD_LABEL.match(line)
        if label:
            labels[label.group(1)] = len(lines)
        match = _AMD.match(line)
        if match:
            lines.append((match.group(1), match.group(2).strip()))
    jumps = ("s_cbranch", "s_branch")
    return [
        Instruction(i, "", opcode, operands, labels.get(operands) if opcode.startswith(jumps) else None)
        for i, (opcode, operands) in enumerate(lines)
    ]


def is_tensor(instruction: Instruction) -> str:
    """The tensor-core family of an instruction: wgmma, mma, tcgen05, mfma; empty for any other."""
    head = instruction.opcode.split(".")[0]
    if head in ("HGMMA", "QGMMA", "IGMMA"):
        return "wgmma"
    if head in ("HMMA", "QMMA", "IMMA", "DMMA"):
        return "mma"
    if head in ("UTCHMMA", "UTCQMMA", "UTCIMMA"):
        return "tcgen05"
    return "mfma" if head.startswith("v_mfma") else ""


def is_spill(instruction: Instruction) -> bool:
    """Whether an instruction moves a register to or from a thread's own memory."""
    return instruction.opcode.startswith(("STL", "LDL", "scratch_store", "scratch_load"))


def _is_fma(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("FFMA", "v_fma", "v_pk_fma", "v_fmac", "v_pk_fmac"))


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Innermost loops that hold tensor-core instructions, by the module's rule, in order of address."""
    is_product = is_tensor if any(map(is_tensor, code)) else _is_fma
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = []
    for i, instruction in enumerate(code):
        if instruction.target is None or instruction.target > instruction.address or instruction.target not in index:
            continue
        body = code[index[instruction.target] : i + 1]
        if any(map(is_product, body)) and not any(x.opcode in ("EXIT", "s_endpgm") and not x.guard for x in body):
            spans.append((index[instruction.target], i + 1))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [code[start:end] for start, end in sorted(inner)]


Rule = Callable[[Instruction], int]


def _opcode(*heads: str) -> Rule:
    return lambda x: x.opcode.split(".")[0] in heads


def _amd(*heads: str) -> Rule:
    return lambda x: x.opcode.startswith(heads)


# Operations of a lane by instruction, packed pairs being two; on AMD every vector instruction takes the lanes' turn.
FP32 = {"FADD": 1, "FMUL": 1, "FFMA": 1, "FADD2": 2, "FMUL2": 2, "FFMA2": 2}

SASS_RULES: dict[str, Rule] = {
    "tensor": lambda x: bool(is_tensor(x)),
    "loads": _opcode("LDG", "LDGSTS", "UTMALDG", "UBLKCP"),
    "shared": _opcode("LDS", "LDSM", "STS", "STSM", "LDTM", "STTM"),
    "selects": _opcode("FSEL"),
    "exp2": lambda x: x.opcode.startswith("MUFU.EX2"),
    "fp32": lambda x: FP32.get(x.opcode.split(".")[0], 0),
    "converts": _opcode("F2FP", "F2F", "F2I", "I2F", "HADD2"),
    "atomics": _opcode("ATOM", "ATOMG", "RED", "REDG", "ATOMS"),
    "barriers": _opcode("BAR", "WARPSYNC", "SYNCS", "WARPGROUP"),
}

AMD_RULES: dict[str, Rule] = {
    "tensor": lambda x: bool(is_tensor(x)),
    "loads": _amd("global_load", "buffer_load"),
    "shared": _amd("ds_"),
    "selects": _amd("v_cndmask"),
    "exp2": _amd("v_exp_f32"),
    "fp32": lambda x: x.opcode.startswith("v_") and not x.opcode.startswith(("v_mfma", "v_exp_f32")),
    "converts": _amd("v_cvt_"),
    "atomics": _amd("global_atomic", "buffer_atomic", "ds_add"),
    "barriers": _amd("s_barrier"),
}


def mix(body: list[Instruction], rules: dict[str, Rule]) -> dict[str, int]:
    """How often every rule holds in one loop, its instructions in all, and `guards`: distinct predicates on loads.

    "fp32" counts operations of the fp32 lanes.
    """
    counts = {name: sum(map(rule, body)) for name, rule in rules.items()}
    return {**counts, "instructions": len(body), "guards": len(_guards(body, rules["loads"]))}


def is_store(instruction: Instruction) -> bool:
    """Whether an instruction writes to memory."""
    return instruction.opcode.startswith(("STG", "global_store", "buffer_store"))


def by_depth(
    body: list[Instruction], code: list[Instruction], is_rare: Callable[[Instruction], bool] = is_store
) -> list[int]:
    """Instructions of a loop that run in every turn, those behind one branch, behind two ...: code that stores.

    What lies between a forward branch and its target is behind it, where it holds a store to memory (what `is_rare`
    tells): Blackwell's products, too, stand behind a branch that one warp doesn't take, in every turn. A compiler may
    lay such code out after the loop, with a jump back to its head: longer loops around this one, without an exit or a
    product.
    """
    found = [0] * len(body)
    index = {x.address: i for i, x in enumerate(body)}
    for i, x in enumerate(body):
        skipped = range(i + 1, 0 if x.target is None else index.get(x.target, 0))
        if any(is_rare(body[j]) for j in skipped):
            for j in skipped:
                found[j] += 1
    layers = _around(body, code)
    if layers and any(map(is_rare, layers[-1])):
        found += [depth for depth, layer in enumerate(layers, 1) for _ in layer]
    return [found.count(depth) for depth in range(max(found) + 1)]


def _around(body: list[Instruction], code: list[Instruction]) -> list[list[Instruction]]:
    """What each loop around `body` adds to the one before, shortest first, for those without a product or an exit."""
    is_product = is_tensor if any(map(is_tensor, code)) else _is_fma
    index, added = {x.address: i for i, x in enumerate(code)}, []
    start, end = index[body[0].address], index[body[-1].address] + 1
    for i, x in enumerate(code[end:], end):
        first = len(code) if x.target is None or x.target > x.address else index.get(x.target, len(code))
        if is_product(x) or x.opcode in ("EXIT", "s_endpgm"):
            break
        if first <= start:
            layer = code[first:start] + code[end : i + 1]
            if any(map(is_product, layer)):
                break
            added.append(layer)
            start, end = first, i + 1
    return added


def every_turn(depths: list[int], turns: tuple[int, ...]) -> float:
    """Instructions of a turn on average, where what lies behind n branches runs once in turns[n - 1]."""
    return depths[0] + sum(count / turns[min(n, len(turns) - 1)] for n, count in enumerate(depths[1:]))


def _guards(body: list[Instruction], is_load: Rule) -> set[str]:
    """Distinct predicates on loads; on AMD the places where a branch on an empty execution mask skips one."""
    guards = set()
    for i, x in enumerate(body):
        if is_load(x):
            trailing = re.search(r",\s*(!?P\d)$", x.operands)
            guards |= {x.guard} if x.guard else set()
            guards |= {trailing.group(1)} if trailing else set()
        if x.opcode == "s_cbranch_execz":
            skipped = [y for y in body[i + 1 :] if x.target is not None and y.address < x.target]
            guards |= {f"execz {x.address}"} if any(map(is_load, skipped)) else set()
    return guards


_LOOP = re.compile(r"\bscf\.(for|while)\b")
_OPERATION = re.compile(r"(?:^|=)\s*\"?([a-z_]+\.[a-z_0-9]+)")
_WIDE = re.compile(r"\btt\.dot .*:\s*tensor<[0-9x]+xf32>")
_SCALAR = re.compile(r"= tt\.load\b")
_MASKED = re.compile(r"\btt\.load\s+%\w+(?:#\d+)?\s*,\s*%")


def read_ir(text: str) -> list[dict[str, int]]:
    """Tensor operations of every hot loop of Triton IR (ttir): dots, dots of fp32, loads, masked loads, selects, exp2,
    converts.

    Only operations on tensors count, but for `scalars`, loads of one number (list entries, whose prefetch the pipeliner
    guards too): an address computed from a scalar select costs nothing per element.
    """
    found: list[dict[str, int]] = []
    stack: list[tuple[int, list[str]]] = []
    depth = 0
    for line in text.splitlines():
        code = line.split(" loc(")[0].replace("} do {", "")  # the two regions of a while loop are one loop
        opens, closes = _braces(code)
        if stack and depth - closes < stack[-1][0]:
            _close(stack, found)
        depth += opens - closes
        if _LOOP.search(code) and "{" in code:
            stack.append((depth, []))
        elif stack:
            stack[-1][1].append(code)
    return found


def _braces(code: str) -> tuple[int, int]:
    """Regions that a line opens and closes; attribute dictionaries on one line don't count."""
    bare = re.sub(r"\{[^{}]*\}", "", code)
    return bare.count("{"), bare.count("}")


def _close(stack: list[tuple[int, list[str]]], found: list[dict[str, int]]) -> None:
    """End the innermost loop: keep its counts if it holds dots and is not around a loop that does."""
    _, body = stack.pop()
    if any("tt.dot" in line for line in body):
        found.append(_ir_mix(body))
        for _, outer in stack:  # an outer loop is not innermost, whatever dots it holds itself
            outer.append("contains a hot loop")
    elif stack:
        stack[-1][1].extend(line for line in body if "contains a hot loop" in line)


def _ir_mix(body: list[str]) -> dict[str, int]:
    tensors = [line for line in body if "tensor<" in line]
    names = [match.group(1) for line in tensors if (match := _OPERATION.search(line))]
    return {
        "dots": names.count("tt.dot") + names.count("tt.dot_scaled"),
        "wide_dots": sum(bool(_WIDE.search(line)) for line in tensors),
        "loads": names.count("tt.load") + sum(name.startswith("tt.descriptor_load") for name in names),
        "scalars": sum("tensor<" not in line and bool(_SCALAR.search(line)) for line in body),
        "masked": sum(bool(_MASKED.search(line)) for line in tensors),
        "selects": names.count("arith.select"),
        "exp2": names.count("math.exp2"),
        "converts": sum(name in ("arith.truncf", "arith.extf", "tt.fp_to_fp") for name in names),
        "nested": sum("contains a hot loop" in line for line in body),
    }


def hot(loop_mixes: list[dict[str, int]]) -> dict[str, int] | None:
    """The full-tile loop among a kernel's IR loops: fewest masked loads, then selects, then most dots and loads."""
    inner = [x for x in loop_mixes if not x["nested"]]
    return min(inner, key=lambda x: (x["masked"], x["selects"], -x["dots"], -x["loads"]), default=None)


def read_resources(text: str) -> dict[str, int]:
    """Registers a thread and stack bytes from `cuobjdump -res-usage` output."""
    found = {}
    for name, key in (("REG", "registers"), ("STACK", "stack")):
        match = re.search(rf"\b{name}:(\d+)", text)
        if match is None:
            raise ValueError(f"cuobjdump -res-usage prints {name}:<number> for a kernel, found {text.strip()[:80]!r}")
        found[key] = int(match.group(1))
    return found


def read_amd_resources(text: str) -> dict[str, int]:
    """Vector registers a lane, spilled registers and scratch bytes from the metadata of AMD assembly text."""
    found = {}
    for key, name in (
        ("registers", ".vgpr_count"), ("spills", ".vgpr_spill_count"), ("scalar_spills", ".sgpr_spill_count"),
        ("stack", ".private_segment_fixed_size"),
    ):  # fmt: skip
        match = re.search(rf"^\s*(?:-\s+)?{re.escape(name)}:\s*(\d+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"AMD assembly ends with {name}: <number> in its metadata, found none: recompile it")
        found[key] = int(match.group(1))
    return found


def machine_hot(bodies: list[list[Instruction]], ir: list[dict[str, int]], chosen: dict[str, int] | None) -> int:
    """Position of the machine loop that belongs to the chosen IR loop: same rank if the counts agree, else the largest.

    Compilers keep the order of loops; where one peels or merges some, the loop with the most tensor-core instructions
    is taken. -1 if there is none.
    """
    if not bodies:
        return -1
    inner = [x for x in ir if not x["nested"]]
    if chosen in inner and len(inner) == len(bodies):
        return inner.index(chosen)
    return max(range(len(bodies)), key=lambda i: sum(bool(is_tensor(x)) or _is_fma(x) for x in bodies[i]))


def machine_last(bodies: list[list[Instruction]], ir: list[dict[str, int]]) -> int:
    """Position of the machine loop that belongs to the last IR loop; -1 where the compiler peeled or merged some."""
    return len(bodies) - 1 if len(bodies) == sum(not x["nested"] for x in ir) else -1
