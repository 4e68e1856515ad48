"""The grid of kernel calls that are checked against the float64 specification, on a card or in Triton's interpreter.

Every kind of call that the methods make (calls.json), and the usual kinds over head dims, dtypes, tile sizes, layouts
and sharing of lists, always with batch 3, query heads that share key heads and ragged ends; wide heads; chunks that
come by descriptors beside chunks that come by pointers; and what fa4 takes. The tests run the same grid
(tests/kernels/test_grid.py), gpu.py runs it on a card: a case is added in `cases`, a feature to calls.py.

Errors are in maximum and in root mean square over the truth's, allowed twice what the specification itself errs in the
low dtype, plus one rounding step. A selection chooses tiles: the share of tiles on which it differs from the float64
specification is held to twice the specification's own in the low dtype plus one tile, and its output is compared with
that of the lists that it chose.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from calls import DTYPES, PRECISIONS, Call, Setting, kinds, make
from dit_accel_kernels import (
    EXACT,
    POOLED,
    SKIPPED,
    Selection,
    TileLists,
    fa4_requirement,
    triton_requirement,
    unpack_bits,
)
from dit_accel_kernels.problem import by_head
from recorded import Recorded, launches_of
from torch import Tensor

USUAL = (
    "plain", "pooled", "decay", "mask", "order", "keep+maxgap", "keep+mass", "keep+budget", "pinned+route", "backward",
    "pooled+backward", "decay+backward",
)  # fmt: skip
EXTRA = (
    "scale",
    "decay+scale",
    "scale+backward",
    "pinned+route-exact",
    "keep+maxgap+reverse",
    "decay+mass+reverse",
    "pooled+decay+mask+scale+order+backward",
    "int8",
    "pooled+mask+scale+order+int8",
    "decay+int8",
    "keep+maxgap+int8",
    "fp8",
    "pooled+order+fp8",
    "partial",
    "partial+mask+scale",
    "decay+partial+pooled",
    "partial+backward",
    "decay+partial+pooled+mask+scale+order+backward",
    "narrow",
    "narrow+partial+pooled",
    "narrow+pooled+backward",
)
WIDE = ("plain", "pooled", "decay", "keep+maxgap", "backward", "pooled+backward", "decay+backward")
FA4 = (
    "plain", "pooled", "mask", "decay", "scale", "pooled+decay+mask+scale", "backward", "pooled+backward", "partial",
    "partial+pooled+backward",
)  # fmt: skip
SHAPE = Setting(batch=3, heads=2, key_heads=1)
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of the grid by one of our backends; `bulk`: descriptors are compared with pointers, bit for bit."""

    kind: str
    at: Setting
    bulk: bool = False
    backend: str = "triton"
    ours = True
    seconds = 2  # on a card at most, compiling included

    @property
    def name(self) -> str:
        """Such as "bf16-d64-b128-bhsd-g2-pooled+backward"."""
        more = "-bulk" * self.bulk + "-fa4" * (self.backend == "fa4")
        return f"{self.at.name}-{self.at.layout}-g{self.at.groups}-{self.kind}{more}"

    @property
    def group(self) -> str:
        """The cases that it shares a process with: those of its sizes, or of what is special about it."""
        at = self.at
        if self.bulk or self.backend == "fa4":
            return "bulk" if self.bulk else "fa4"
        if at == SHAPE:
            return "methods"
        return f"d{at.dim}" if at.dim > 128 else f"{at.dtype}-d{at.dim}"

    def missing(self, device: str) -> str | None:
        """What the backend needs and does not find here, or None."""
        at = self.at
        for precision in set(PRECISIONS) & set(self.kind.split("+")):
            return triton_requirement(torch.device(device), DTYPES[at.dtype], at.dim, precision)
        if self.backend != "fa4":
            return None
        return fa4_requirement(torch.device(device), DTYPES[at.dtype], at.dim, (at.tile, at.tile))

    def launches(self, target: str) -> dict[str, Recorded]:
        """What it launches on a target, by identity; of fa4 what Triton compiles."""
        into: dict[str, Recorded] = {}
        for bulk in (True, False) if self.bulk else (None,):
            with nullcontext() if bulk is None else descriptors(bulk):
                launches_of(self.kind, self.at, target, into, self.backend)
        return into

    def run(self, device: str) -> list[Record]:
        """Its findings."""
        return check(self, device)


def cases() -> list[Case]:
    """The grid, the most telling first: what the methods call at the models' sizes, then the usual kinds over sizes."""
    grid = [Case(kind=kind, at=SHAPE) for kind in kinds()] + [Case(kind=kind, at=SHAPE) for kind in EXTRA]
    sharing = itertools.cycle(itertools.product(("bhsd", "bshd"), (1, 2, 6)))
    for dim, dtype, tile in itertools.product((64, 96, 128), ("bf16", "fp16"), (128, 64)):
        for kind in USUAL:
            layout, groups = next(sharing)
            grid.append(
                Case(kind=kind, at=replace(SHAPE, dim=dim, dtype=dtype, tile=tile, layout=layout, groups=groups))
            )
        next(sharing)  # another layout for the next size's first kind
    grid += [Case(kind=kind, at=replace(SHAPE, dtype="fp32")) for kind in USUAL]
    grid += [
        Case(kind=kind, at=replace(SHAPE, dim=dim, dtype=dtype))
        for dim, dtype, kind in itertools.product((192, 256), ("bf16", "fp32"), WIDE)
    ]
    grid = list(dict.fromkeys(grid))
    for kind, dim, layout in itertools.product(("plain", "decay", "keep+maxgap"), (64, 128), ("bshd", "bhsd")):
        grid.append(Case(kind=kind, at=replace(SHAPE, dim=dim, layout=layout), bulk=True))
    return grid + [
        Case(kind=kind, at=replace(SHAPE, dim=dim), backend="fa4") for dim, kind in itertools.product((64, 128), FA4)
    ]


def check(case: Case, device: str) -> list[Record]:
    """Run one case by its backend: a record for each part of its result."""
    call = make(case.kind, case.at, device)
    if case.bulk:
        return [_compared_bits(case, call)]
    dtype, results = DTYPES[case.at.dtype], call.run(case.backend)
    selection = call.arguments.get("selection")
    records = []
    if selection is not None and call.grad_out is None:
        records += _bits(case, call, results)
        call = chosen(call, results[2])
    yardstick, truth = call.run("reference"), call.to(torch.float64).run("reference")
    parts = ("out", "lse") if call.grad_out is None else ("grad_q", "grad_k", "grad_v")
    for part, *values in zip(parts, results, yardstick, truth, strict=False):
        for norm, (error, allowed) in errors(*values, dtype).items():
            records.append(record(case.name, f"{part}, {norm}", error, allowed))
    return records


def record(name: str, part: str, error: float, allowed: float) -> Record:
    """A finding."""
    return {"kind": "check", "case": name, "part": part, "error": error, "allowed": allowed, "ok": error <= allowed}


def errors(values: Tensor, yardstick: Tensor, truth: Tensor, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Error over the truth's size and what is allowed, by norm; infinities must agree.

    The specification's largest error counts as at least four times its mean square one: with few elements it may be
    small by luck.
    """
    endless = truth.isinf()
    if not torch.equal(values.isinf(), endless):
        return {"max": (float("inf"), 0.0)}
    wide = [x.double().masked_fill(endless, 0.0) for x in (values, yardstick, truth)]
    values, yardstick, truth = wide

    def largest(x: Tensor) -> float:
        return float(x.abs().max())

    def mean(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    spread, step = mean(yardstick - truth), torch.finfo(dtype).eps
    result = {}
    for name, norm, least in (("max", largest, 4 * spread), ("rms", mean, spread)):
        size = norm(truth) or 1.0
        error = norm(values - truth)
        allowed = 2 * max(norm(yardstick - truth), least) + step * norm(truth)
        result[name] = (error / size if error == error else float("inf"), allowed / size)
    return result


def _bits(case: Case, call: Call, results: tuple[Tensor, ...]) -> Iterator[Record]:
    """Tiles that a selection left exact, and those that votes keep, against the float64 specification."""
    yardstick, truth = call.run("reference"), call.to(torch.float64).run("reference")
    tiles = call.tiles.key_tiles
    for part, *values in zip(("tiles", "votes"), results[2:], yardstick[2:], truth[2:], strict=False):
        a, b, c = (unpack_bits(x, tiles) for x in values)
        yield record(case.name, part, *disagreement(a, b, c))


def disagreement(bits: Tensor, yardstick_bits: Tensor, truth: Tensor) -> tuple[float, float]:
    """Share of bits that differ from the truth, and the share allowed: twice the specification's own, plus one bit."""
    differing, yardstick = ((x != truth).double().mean().item() for x in (bits, yardstick_bits))
    return differing, 2 * yardstick + 1 / truth.numel()


def chosen(call: Call, exact: Tensor) -> Call:
    """The call with the exact tiles that its selection chose, bits int32 [B, H, NQ, W], as lists."""
    selection: Selection = call.arguments["selection"]
    tiles, stays = call.tiles, unpack_bits(exact, call.tiles.key_tiles)
    states = by_head(tiles.states(), stays.shape[1]).expand(stays.shape)
    keep = None if selection.keep is None else unpack_bits(selection.keep, tiles.key_tiles)
    states = left_by(selection, states, stays, keep).flatten(0, 1)
    sizes = dict(block_q=tiles.block_q, block_k=tiles.block_k, num_q=tiles.num_q, num_k=tiles.num_k)
    arguments = {name: x for name, x in call.arguments.items() if name not in ("selection", "return_tiles")}
    return replace(call, tiles=TileLists.from_states(states, **sizes), arguments=arguments)


def left_by(selection: Selection, states: Tensor, stays: Tensor, keep: Tensor | None) -> Tensor:
    """Tile states uint8 that a selection left, of those of the lists, the tiles that stay exact, and the kept ones."""
    gone = (states == EXACT) & ~stays
    pools = gone & (selection.routing is not None)
    if keep is not None:
        pools = torch.where(gone & ~keep, torch.full_like(gone, selection.rest == "pooled"), pools)
    return torch.where(gone, torch.where(pools, POOLED, SKIPPED), states).to(torch.uint8)


def _compared_bits(case: Case, call: Call) -> Record:
    """Chunks by descriptors against chunks by pointers: the share of numbers that differ, of which none may."""
    outputs = []
    for bulk in (True, False):
        with descriptors(bulk):
            outputs.append(call.run("triton")[0])
    return record(case.name, "bits", float((outputs[0] != outputs[1]).double().mean()), 0.0)


@contextmanager
def descriptors(bulk: bool) -> Iterator[None]:
    """Have chunks come by descriptors wherever they can, in the interpreter too, or never."""
    from dit_accel_kernels.backends.triton import attend
    from dit_accel_kernels.backends.triton.support import interpreted

    real = attend.bulk_copies
    with mock.patch.object(attend, "bulk_copies", lambda *given: bulk and (interpreted() or real(*given))):
        yield
