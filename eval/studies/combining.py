"""Attaches every pair of methods and runs it: `python eval/studies/combining.py`, the table of docs/combining.md.

One small clip of wan-plain in 8 steps, attached in either order. What a pair computes is counted in blocks and
attention pairs, as suites count it, and held against the dense run; a pair that is refused says why.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.counting import work
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.model import Run
from dit_accel_eval.runs.results import Line, markdown_table
from study import study

import dit_accel
from dit_accel import DitAccelError
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.registry import methods

STEPS = 8
SIZE = {"height": 32, "width": 32}
LONGER: dict[str, Any] = dict(trained_frames=5)
TILES: dict[str, Any] = dict(block_size=16, dense_layers=0)
CACHED: dict[str, Any] = dict(warmup_steps=2, predictor="taylor")
METHODS: dict[str, MethodConfig] = {
    "rope": dit_accel.RoPE(kind="riflex", **LONGER),
    "lvsa": dit_accel.LVSA(window=2, block_size=16, **LONGER),
    "radial": dit_accel.RadialAttention(decay_factor=0.2, near="half", **TILES),
    "ultraimage": dit_accel.UltraImage(trained_height=6, trained_width=6),
    "ultravico": dit_accel.UltraViCo(**LONGER),
    "sparsed": dit_accel.SparseD(density=0.5, **TILES),
    "lite": dit_accel.LiteAttention(threshold=-3.0, **TILES),
    "sol": dit_accel.SolAttention(beta=0.5, **TILES),
    "delta": dit_accel.DeltaAttention(stride=16),
    "dbcache": dit_accel.DBCache(first_blocks=2, threshold=0.6, **CACHED),
    "dbprune": dit_accel.DBPrune(threshold=0.6, **CACHED),
    "dfa": dit_accel.DFA(every=2, warmup_steps=2),
    "easycache": dit_accel.EasyCache(threshold=0.2, **CACHED),
    "firstblockcache": dit_accel.FirstBlockCache(threshold=0.6, **CACHED),
    "magcache": dit_accel.MagCache(threshold=0.2, family="wan2.1-1.3b", **CACHED),
    "profilingcache": dit_accel.ProfilingCache(blocks="1-3", every=2, **CACHED),
    "seacache": dit_accel.SeaCache(threshold=1.0, **CACHED),
    "staticcache": dit_accel.StaticCache(every=2, **CACHED),
    "teacache": dit_accel.TeaCache(threshold=0.2, family="wan2.1-1.3b", **CACHED),
    "nag": dit_accel.NAG(negative_prompt="a blurry clip"),
    "pag": dit_accel.PAG(layers="L2"),
    "seg": dit_accel.SEG(layers="L2"),
    "slg": dit_accel.SLG(layers="L2"),
    "softpag": dit_accel.SoftPAG(heads="L2H1", u=0.5),
}
"""Each method as it is attached, so that it acts on wan-plain; AutoGuidance takes wan-tiny's transformer besides."""


def settings(model: EmbeddedModel) -> dict[str, MethodConfig]:
    """Return all methods by name, in the registry's order."""
    from diffusers import WanTransformer3DModel
    from dit_accel_assets import model_path

    weak = WanTransformer3DModel.from_pretrained(model_path("wan-tiny") / "transformer").eval()
    return {**METHODS, "autoguidance": dit_accel.AutoGuidance(weak_transformer=weak)}


def measure(options: argparse.Namespace, lines: Sequence[Line]) -> Iterator[Line]:
    """Give a line a pair, a method with itself being that method alone."""
    model = EmbeddedModel("wan-plain", SIZE)
    known = settings(model)
    done = {tuple(line["pair"]) for line in lines}
    dense = model.run(options.clip, steps=STEPS, solver="unipc")
    for pair in itertools.combinations_with_replacement(known, 2):
        if pair not in done:
            yield {"model": model.name, "clip": options.clip, "steps": STEPS, "pair": pair,
                   **_measured(model, options.clip, [known[name] for name in dict.fromkeys(pair)], dense)}  # fmt: skip


def _measured(model: EmbeddedModel, clip: int, methods: list[MethodConfig], dense: Run) -> dict[str, Any]:
    try:
        made, again = (
            model.run(clip, steps=STEPS, solver="unipc", methods=order) for order in (methods, methods[::-1])
        )
    except DitAccelError as error:
        return {"refused": str(error)}
    step = dense.counts / STEPS
    return {
        "work": round(work(made.counts, step, made.attended, model.own_share) / STEPS, 4),
        "psnr": round(min(psnr(made.frames, dense.frames), 99.0), 2),
        "orders_agree": bool(np.array_equal(made.frames, again.frames)),
    }


def table(lines: Sequence[Line]) -> str:
    """Return the square of pairs, then why pairs are refused."""
    cells = {tuple(line["pair"]): line for line in lines}
    names = [name for name in methods() if any(name in line["pair"] for line in lines)]
    firsts: dict[str, Line] = {}
    for line in lines:
        if "refused" in line:
            firsts.setdefault(_kind(line), line)
    marks = {kind: place for place, kind in enumerate(firsts, 1)}

    def cell(one: str, other: str) -> str:
        line = cells.get((one, other)) or cells.get((other, one)) or {}
        if "refused" in line:
            return f"[{marks[_kind(line)]}]"
        return f"{line['work']:.2f}".lstrip("0") if line else ""

    rows = [[f"{place} {name}", *(cell(name, other) for other in names)] for place, name in enumerate(names, 1)]
    square = markdown_table(" | ".join(["method", *map(str, range(1, len(names) + 1))]), rows)
    why = [[f"[{place}]", " + ".join(dict.fromkeys(firsts[kind]["pair"])), firsts[kind]["refused"].replace("|", "\\|")]
           for kind, place in marks.items()]  # fmt: skip
    ran = [line for line in lines if "work" in line]
    apart = [" + ".join(line["pair"]) for line in ran if not line["orders_agree"]]
    head = (
        f"{len(ran)} pairs and single methods ran, {len(lines) - len(ran)} are refused; attached in either order they "
    )
    head += (
        f"gave the same frames bit for bit, but for {', '.join(apart)}."
        if apart
        else "gave the same frames bit for bit."
    )
    return f"{head}\n\n{square}\n\n{markdown_table('mark | first such pair | why', why)}"


def _kind(line: Line) -> str:
    """Return why a pair is refused without the names of its methods."""
    names = {word for name in line["pair"] for word in (name, methods()[name].__name__)}
    return re.sub("|".join(sorted(names, key=len, reverse=True)), "", line["refused"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    return study(__doc__, arguments, measure, table, out="combining.jsonl", resumes=True, clip=16)


if __name__ == "__main__":
    sys.exit(main())
