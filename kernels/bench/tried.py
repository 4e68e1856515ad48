"""Compile what was tried and is not in the kernels, and count its instructions beside what is there.

`python kernels/bench/tried.py --out kernels/bench/results/tried.jsonl` compiles each variant of the forward kernel for
the targets that it is about, without a card, and writes a JSON line each. A variant is an edit of the package's text,
or the package as a commit had it. "behind" counts instructions of the hot loop behind a branch that is rarely taken.

lazy: the accumulator is rescaled only where some row's maximum grew by more than 8 in log2 (FlashAttention-4's rule).
specialised: the hot loop asks Triton for warps of their own for copies and products.
gathered: pooled tiles come from a list of theirs, as they did before all columns of a row were walked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
PACKAGE = "dit_accel_kernels"
FORWARD = f"{PACKAGE}/backends/triton/forward.py"
ALL = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
LOOP = "    for n in tl.range(0, end_plain * SUBS_K):\n"
SOFTMAX = """\
        m_new = tl.maximum(m, top)
        p, alpha = tl.exp2(x * scale - m_new[:, None]), tl.exp2(m - m_new)
        total, acc1, acc2, mass = _add(p, alpha, total, acc1, acc2, v1, v2, D2, PRECISION)
        if VOTE is not None:
            word, state, left = _vote(
                word, state, left, 0, n,"""
LAZY = """\
        if tl.max(top - m, 0) > 8.0:
            alpha = tl.exp2(m - tl.maximum(m, top))
            m = tl.maximum(m, top)
            total *= alpha
            acc1 *= alpha[:, None]
            if D2 > 0:
                acc2 *= alpha[:, None]
        m_new, alpha = m, 1.0
        p = tl.exp2(x * scale - m[:, None])
        mass = tl.sum(p, 1)
        total += mass
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1, input_precision=PRECISION)
        if D2 > 0:
            acc2 = tl.dot(p.to(v1.dtype), v2, acc2, input_precision=PRECISION)
        if VOTE is not None:
            word, state, left = _vote(
                word, state, left, 0, n,"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """An edit (old text, new text) of the forward kernel, or a commit; its targets and calls; tile sides."""

    targets: tuple[str, ...]
    kind: str = "plain"
    edit: tuple[str, str] | None = None
    commit: str | None = None
    tiles: tuple[int, ...] = (128, 64)


VARIANTS = {
    "lazy": Variant(targets=ALL, edit=(SOFTMAX, LAZY)),
    "specialised": Variant(targets=("sm_90", "sm_100"), edit=(LOOP, LOOP.replace("):", ", warp_specialize=True):"))),
    "gathered": Variant(
        targets=("sm_80", "sm_89", "sm_90", "sm_100"), kind="pooled", commit="132f2a2cc6b07d36f2d910602469530d53fa2dfa",
        tiles=(128,),
    ),
}  # fmt: skip


def lay_out(variant: Variant, into: Path) -> None:
    """Write the package as a variant has it.

    Raises ValueError where its edit no longer fits the kernel's text.
    """
    if variant.commit is None:
        shutil.copytree(BENCH.parent / PACKAGE, into / "kernels" / PACKAGE)
    else:
        command = ["git", "-C", str(BENCH.parents[1]), "archive", variant.commit, f"kernels/{PACKAGE}"]
        packed = subprocess.run(command, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(packed)) as archive:
            archive.extractall(into, filter="data")
    if variant.edit is not None:
        old, new = variant.edit
        text = (BENCH.parent / FORWARD).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{FORWARD} must hold the edited text once, found it {text.count(old)} times: {old!r}")
        (into / "kernels" / FORWARD).write_text(text.replace(old, new))


def compiled(name: str) -> list[dict[str, Any]]:
    """Records of a variant's launches, by the package that this process imports."""
    import aot
    import listing
    from calls import Setting
    from cards import TARGETS
    from compiled import machine_code
    from recorded import Recorded, launches_of

    def multiplies(x: listing.Instruction) -> bool:
        return x.opcode.startswith(("FMUL", "v_mul_f32", "v_pk_mul_f32"))

    found = []
    variant = VARIANTS[name]
    for target in variant.targets:
        into: dict[str, Recorded] = {}
        for tile in variant.tiles:
            launches_of(variant.kind, Setting(tile=tile), target, into)
        for launch in (x for x in into.values() if x.kernel_name == "fwd"):
            record = aot.compile_one(launch)
            if record.get("mix"):
                code, _ = machine_code(launch.compiled().asm, TARGETS[target])
                ir = listing.read_ir(launch.compiled().asm["ttir"])
                bodies = listing.loops(code)
                depths = listing.by_depth(bodies[listing.machine_hot(bodies, ir, listing.hot(ir))], code, multiplies)
                record["mix"] |= {"every": depths[0], "behind": sum(depths[1:])}
            found.append({"variant": name, **record})
    return found


def run(name: str, out: Path) -> None:
    """Compile a variant in a process that imports it, and add its records to a file."""
    with tempfile.TemporaryDirectory() as folder:
        lay_out(VARIANTS[name], Path(folder))
        paths = (str(Path(folder) / "kernels"), str(BENCH), os.environ.get("PYTHONPATH", ""))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_DEFAULT_FP_FUSION": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(BENCH / "tried.py"), "--inside", name, "--out", str(out)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:  # a compiler's failure is a record; its report, pages of IR, is not shown
            raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")


def main() -> None:
    """Compile the variants, one process each, and write their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default=",".join(VARIANTS), help="comma list (default %(default)s)")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; those of other variants stay")
    args = parser.parse_args()
    if args.inside:
        with args.out.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in compiled(args.inside))
        return
    names = args.variant.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"--variant takes {', '.join(VARIANTS)}: found {', '.join(unknown)}")
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    kept = [line for line in lines if json.loads(line)["variant"] not in names]
    args.out.write_text("".join(line + "\n" for line in kept))
    for name in names:
        run(name, args.out)


if __name__ == "__main__":
    main()
