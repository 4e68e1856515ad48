"""Describe what the compilers made of one launch: resources, occupancy, and the instructions of its loops.

A record's `mix` is of the hot loop, over exact tiles, and its `pooled` is of the loop over pooled tiles, where there is
one. Both hold `rows` and `columns`, the logits of a turn, and `shared_bytes`, what a block moves in one.
"""

from __future__ import annotations

import subprocess
import tempfile
from typing import Any

import listing
from cards import Target, occupancy
from recorded import Recorded
from shared import Turn, shared_bytes

COLD = ("expand", "expand_columns", "fold", "pool", "pooled_dkdv", "query_mean", "key_statistics", "route", "delta")
PRODUCTS = {"fwd": 2, "dq": 3, "dkdv": 4}  # of a logit with a head dim, by kernel


def has_hot_loop(launch: Recorded) -> bool:
    """Whether its first loop must show tensor-core instructions and neither a predicated load nor a select.

    Gradients of wider heads take blocks too small for wgmma and tcgen05; decay selects between two factors by element.
    """
    kernel = launch.kernel_name
    if kernel in ("dq", "dkdv"):
        return launch.constants.get("entry_t_ptr", 0) is None and launch.constants["DIM"] <= 128
    return kernel not in COLD


def turns(launch: Recorded) -> tuple[int, ...]:
    """Turns of the hot loop from one run of what lies behind a branch in it to the next, then behind two.

    A vote settles a tile, and stores a word, that often; empty where everything runs in every turn.
    """
    constants = launch.constants
    if constants.get("VOTE") is None:
        return ()
    chunks = constants["TILE_K"] // constants["BLOCK_K"]
    return (chunks, 32 * chunks) if chunks > 1 else (32,)


def machine_code(asm: dict[str, Any], target: Target) -> tuple[list[listing.Instruction], dict[str, int]]:
    """Instructions of a compiled kernel, and its registers, spills and stack, from its texts."""
    if target.backend != "cuda":
        return listing.read_amdgcn(asm["amdgcn"]), listing.read_amd_resources(asm["amdgcn"])
    text = _disassemble(asm["cubin"])
    code = listing.read_sass(text)
    return code, listing.read_resources(text) | {"spills": sum(map(listing.is_spill, code))}


def describe(asm: dict[str, Any], shared: int, launch: Recorded, target: Target) -> dict[str, Any]:
    """Resources, occupancy and loops of one compiled kernel, from its texts; `shared` in bytes."""
    ir = listing.read_ir(asm["ttir"])
    chosen = listing.hot(ir)
    code, resources = machine_code(asm, target)
    rules = listing.SASS_RULES if target.backend == "cuda" else listing.AMD_RULES
    bodies = listing.loops(code)
    at = listing.machine_hot(bodies, ir, chosen)
    hot_spills = resources["spills"] if at < 0 else sum(map(listing.is_spill, bodies[at]))
    blocks, bound = occupancy(target, resources["registers"], shared, launch.num_warps)
    mix = None if at < 0 else _mix(bodies[at], rules, launch, "BLOCK_K")
    if mix and turns(launch):
        depths = listing.by_depth(bodies[at], code)
        mix |= {"rare": depths[1:], "every": round(listing.every_turn(depths, turns(launch)), 1)}
    pools = launch.kernel_name == "fwd" and launch.constants.get("pooled_bits_ptr", 0) is not None
    last = listing.machine_last(bodies, ir) if pools else -1
    pooled = "BLOCK_P" if "BLOCK_P" in launch.constants else "BLOCK_S"  # as it was when tiles were gathered (tried.py)
    return {
        **resources,
        **({"hot_spills": hot_spills} if resources["spills"] else {}),
        "shared": shared,
        "shared_limit": target.shared_block,
        "blocks": blocks,
        "bound": bound,
        "tensor": "" if at < 0 else "+".join(sorted({listing.is_tensor(x) for x in bodies[at]} - {""})),
        "loops": len(bodies),
        "ir": chosen,
        "mix": mix,
        **({"pooled": _mix(bodies[last], rules, launch, pooled)} if last >= 0 else {}),
    }


def _mix(
    body: list[listing.Instruction], rules: dict[str, listing.Rule], launch: Recorded, columns: str
) -> dict[str, Any]:
    """Counts of one loop, with the logits of a turn and the bytes of shared memory that a block moves in one."""
    found: dict[str, Any] = listing.mix(body, rules)
    constants = launch.constants
    if "BLOCK_Q" not in constants or columns not in constants:
        return found
    rows, keys, width = constants["BLOCK_Q"], constants[columns], constants["DIM"]
    turn = Turn(
        warps=launch.num_warps,
        copy=keys * width * launch.element_bytes,
        products=PRODUCTS.get(launch.kernel_name, 0) * rows * keys * width,
        rows=min(rows, 128),
    )
    return found | {"rows": rows, "columns": keys, "shared_bytes": shared_bytes(body, turn)}


def _disassemble(cubin: bytes) -> str:
    """SASS and resource usage of a cubin, by a tool in Triton's wheel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
