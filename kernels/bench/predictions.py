"""The least time that block-sparse attention can take on a card, from its arithmetic and its bytes.

`python kernels/bench/predictions.py --page docs/kernel-predictions.md` writes that page's table, and gpu.py shows the
bound of each call that it times on a card known here. A call takes at least the time of its slowest
engine, and a few microseconds a kernel launch: tensor cores (products), exp2 (one a logit), the second-level cache
(every chunk of keys and values that a program visits) and memory (every tensor once). What else a loop does in between
is not in it: it is a bound to hold measurements to, not a forecast.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from dit_accel_kernels.backends.triton.launch import launch_of

LAUNCH_SECONDS = 3e-6  # between the end of one kernel and the start of the next in a stream
ENGINES = ("tensor", "exp2", "l2", "hbm")
CANDIDATES = (
    "triton",
    "triton-kept",
    "triton-decay",
    "triton-pooled",
    "triton-routed",
    "triton-votes",
    "triton-backward",
)
"""Calls of gpu.py that are predicted; kept tiles, decay and votes add nothing to these four engines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One self-attention call: batch, heads, tokens, head dim; tiles of `block` x `block` tokens, 16-bit elements."""

    name: str
    heads: int
    tokens: int
    dim: int
    batch: int = 1
    block: int = 128

    @property
    def tiles(self) -> int:
        """Tiles of a row, and rows of tiles."""
        return -(-self.tokens // self.block)


# (frames, height, width) patch grids after the VAE and patching, plus text where it is part of self-attention: Wan 2.1
# 480x832 and 720x1280 at 81 frames, HunyuanVideo 720x1280 at 129, CogVideoX1.5 768x1360 at 81, Mochi 480x848 at 163.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="wan-480p", heads=40, tokens=21 * 30 * 52, dim=128),
        Shape(name="wan-720p", heads=40, tokens=21 * 45 * 80, dim=128),
        Shape(name="hunyuan-720p", heads=24, tokens=33 * 45 * 80 + 256, dim=128),
        Shape(name="cogvideox1.5", heads=48, tokens=11 * 48 * 85 + 224, dim=64),
        Shape(name="mochi", heads=24, tokens=28 * 30 * 53 + 256, dim=128),
        Shape(name="128k", heads=24, tokens=131072, dim=128),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Public figures of one card: dense 16-bit TFLOP/s with fp32 accumulation, GB/s of memory and of the cache.

    `exp2` counts 1e12 exponentials a second: 16 an SM (CU) and clock. `dense` is the share of its peak that the best
    dense attention is published to reach with heads of 128, None where no figure is.
    """

    name: str
    target: str
    tflops: float
    bandwidth: float
    l2: float
    exp2: float
    dense: float | None = None


def _card(
    name: str, target: str, tflops: float, bandwidth: float, cores: int, clock: float, *,
    l2: float | None = None, dense: float | None = None,
) -> Card:  # fmt: skip
    """A card with so many SMs at a boost clock in GHz; without an `l2` figure, SMs take 64 bytes a clock each."""
    cache, exp2 = l2 or 64 * cores * clock, 16 * cores * clock / 1e3
    return Card(
        name=name, target=target, tflops=tflops, bandwidth=bandwidth, l2=cache, exp2=exp2, dense=dense
    )  # fmt: skip


# NVIDIA: A100, L40S, Ada (RTX 4090), H100 SXM, Blackwell (RTX 5090) and B200 (HGX) data sheets and architecture white
# papers; 16 special-function lanes an SM from the CUDA guide's table of arithmetic throughput. AMD: MI300X data sheet;
# transcendentals at a quarter of the vector rate. Second-level cache: A100 white paper, 5120 bytes a clock; H100, 5.5
# to 7 TB/s measured, no figure published; MI300X, 2 KB a clock and die (CDNA 3 white paper). Dense attention:
# FlashAttention-2 (arXiv 2307.08691), -3 (arXiv 2407.08608), -4 (its authors' report).
CARDS = {
    card.name: card
    for card in (
        _card("A100", "sm_80", 312, 2039, 108, 1.41, l2=7219, dense=0.73),
        _card("L40S", "sm_89", 362, 864, 142, 2.52),
        _card("RTX 4090", "sm_89", 165.2, 1008, 128, 2.52),
        _card("H100", "sm_90", 989.4, 3350, 132, 1.83, l2=7000, dense=0.75),
        _card("B200", "sm_100", 2250, 8000, 148, 1.85, dense=0.71),
        _card("RTX 5090", "sm_120", 209.5, 1792, 170, 2.41),
        _card("MI300X", "gfx942", 1307.4, 5300, 304, 2.1, l2=34406),
    )
}


def predict(shape: Shape, candidate: str, density: float, card: Card) -> dict[str, Any]:
    """Seconds of every engine for a candidate of gpu.py, the bound, and the slowest engine (`limit`).

    `density` is the share of tiles that are exact; the others are pooled where the candidate pools them: all of a row's
    tiles are walked then, one column each. A backward makes three products and then four, each with its exponentials.
    Raises ValueError where the density is not in [0, 1].
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density is a share of tiles in [0, 1], found {density}")
    pools, routes = candidate in ("triton-pooled", "triton-routed"), candidate == "triton-routed"
    lanes, row = shape.batch * shape.heads, 2 * shape.dim  # bytes of a token of one head
    columns = shape.tokens * density + (shape.tiles if pools else 0)
    logits, dims = lanes * shape.tokens * columns, 2 * shape.dim
    kernels = (("dq", 3), ("dkdv", 4)) if candidate == "triton-backward" else (("fwd", 2),)
    passes = 13 if candidate == "triton-backward" else 4 + 2 * pools + routes  # tensors that are read or written
    seconds = {
        "tensor": sum(products for _, products in kernels) * dims * logits / (card.tflops * 1e12),
        "exp2": len(kernels) * logits / (card.exp2 * 1e12),
        "l2": sum(logits / _rows(shape, card, kernel) for kernel, _ in kernels) * 2 * row / (card.l2 * 1e9),
        "hbm": passes * lanes * shape.tokens * row / (card.bandwidth * 1e9),
    }
    if routes:
        seconds["tensor"] += dims * lanes * shape.tiles**2 / (card.tflops * 1e12)
    launches = 3 if candidate == "triton-backward" else 6 if routes else 2 if pools else 1
    limit = max(seconds, key=seconds.__getitem__)
    bound = seconds[limit] + LAUNCH_SECONDS * (launches + 2 * (candidate == "triton-votes"))
    return {**seconds, "bound": bound, "limit": limit}


def _rows(shape: Shape, card: Card, kernel: str) -> int:
    """Rows of one side that a program holds while it walks the other: queries, in the gradient of keys keys."""
    launch = launch_of(card.target, torch.bfloat16, shape.dim, shape.block, kernel)
    return min(shape.block, launch.block_k if kernel == "dkdv" else launch.block_q)


def predict_dense(shape: Shape, card: Card) -> float | None:
    """Seconds of the best dense attention by the share of the peak that it is published to reach; None without one."""
    if card.dense is None or shape.dim != 128:
        return None
    return 4 * shape.batch * shape.heads * shape.tokens**2 * shape.dim / (card.tflops * 1e12 * card.dense)


def card_of(device: str) -> Card | None:
    """The card that a device's name holds, if it is one of those known."""
    return next((card for name, card in CARDS.items() if name in device), None)


def table(calls: Iterable[tuple[Shape, Card, float, str]]) -> str:
    """Milliseconds of every engine, the bound, and dense attention over it, as a Markdown table."""
    head = ["call", *ENGINES, "bound", "by", "x dense"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for shape, card, density, candidate in calls:
        bound, dense = predict(shape, candidate, density, card), predict_dense(shape, card)
        name = f"{shape.name} at {density:g}, {card.name}, {candidate.removeprefix('triton-')}"
        name += f", tiles of {shape.block}" * (shape.block != 128)
        cells = [f"{bound[engine] * 1e3:.1f}" for engine in (*ENGINES, "bound")]
        faster = "" if dense is None or "backward" in candidate else f"{dense / bound['bound']:.1f}"
        lines.append([name, *cells, bound["limit"], faster])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(text: str) -> str:
    """The page of predictions with its table made anew.

    Raises ValueError where it lacks the marks of the table.
    """
    cards = [CARDS[name] for name in ("A100", "H100", "B200", "RTX 4090")]
    wan, routed = SHAPES["wan-720p"], ("triton-routed",)
    rows = table([
        *product([wan], cards, [0.27], ("triton", "triton-pooled", "triton-backward")),
        *product([wan, replace(wan, block=64)], cards, [0.16], routed),
        *product([SHAPES["128k"]], cards, [0.1], routed),
    ])  # fmt: skip
    marks = r"(<!-- times -->\n).*?(<!-- /times -->)"
    text, count = re.subn(marks, lambda m: f"{m[1]}{rows}\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page needs one pair of marks <!-- times --> <!-- /times -->, found {count}")
    return text


def pick(names: str, known: dict[str, Any], option: str) -> list[Any]:
    """The named entries; an unknown name ends the program with the known ones."""
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"--{option} takes {', '.join(known)}: found {', '.join(unknown)}")
    return [known[name] for name in names.split(",")]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, required=True, help="the page whose table to write anew")
    path = parser.parse_args().page
    path.write_text(page(path.read_text()))


if __name__ == "__main__":
    main()
