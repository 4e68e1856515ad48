"""Every feature of the Triton kernels against the float64 specification, on the device at hand: a record each.

Output, LSE and gradients: root mean square error over the truth's, allowed twice what the specification itself errs in
the low dtype, plus one rounding step. A selection chooses tiles: the share of tiles on which it differs from the
float64 specification is held to twice the specification's own in the low dtype plus one tile, and its output is
compared with that of the lists that it chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED, Routing, Selection, TileLists, Vote, block_sparse_attention_eager
from dit_accel_kernels import block_sparse_attention as attention
from dit_accel_kernels.selection import pack_bits, unpack_bits
from inputs import decay, keep_bits, lists
from torch import Tensor

PARTS = ("out", "lse", "grad_q", "grad_k", "grad_v")
DIM = 64
Record = dict[str, Any]


def check(dtype: torch.dtype, device: str, block: int, selecting: str) -> Iterator[Record]:
    """All checks, in tiles of `block`; `selecting` is the backend that those of selections are about."""
    tokens = 5 * block - 3
    features: dict[str, dict[str, Any]] = {
        "plain": {},
        "decay": {"frame_decay": decay(tokens, device)},
        "head scale": {"head_scale": torch.tensor([0.7, 1.4], device=device)},
        "key length": {"key_length": torch.tensor([tokens - block], device=device)},
        "token order": {"token_order": torch.randperm(tokens).to(device)},
    }
    for name, arguments in features.items():
        for rest in (SKIPPED, POOLED):
            tiles = lists(tokens, block, 0.5, rest, device)
            leaves = [torch.randn(1, heads, tokens, DIM).to(device, dtype) for heads in (2, 1, 1)]
            grad = torch.randn(1, 2, tokens, DIM).to(device, dtype)
            found = _all_of(leaves, grad, tiles, "triton", arguments)
            yardstick = _all_of(leaves, grad, tiles, "reference", arguments)
            truth = _all_of([x.double() for x in leaves], grad.double(), tiles, "reference", arguments)
            yield from _compared(f"{name}, {('skipped', 'pooled')[rest]}", found, yardstick, truth, dtype)
    yield from _selections(dtype, device, block, selecting)


def _compared(
    feature: str, found: list[Tensor], yardstick: list[Tensor], truth: list[Tensor], dtype: torch.dtype
) -> Iterator[Record]:
    for part, a, b, c in zip(PARTS, found, yardstick, truth, strict=False):
        scale = float(c.square().mean().sqrt())
        error, own = (float((x.double() - c).square().mean().sqrt()) / scale for x in (a, b))
        yield _record(feature, part, error, 2 * own + torch.finfo(dtype).eps)


def _record(feature: str, part: str, error: float, allowed: float) -> Record:
    return {
        "kind": "check",
        "feature": feature,
        "part": part,
        "error": error,
        "allowed": allowed,
        "ok": error <= allowed,
    }


def _all_of(
    leaves: list[Tensor], grad: Tensor, tiles: TileLists, backend: str, arguments: dict[str, Any]
) -> list[Tensor]:
    """Output, LSE (0 where infinite) and gradients of one call."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = attention(*leaves, tiles, layout="bhsd", return_lse=True, backend=backend, **arguments)
    grads = torch.autograd.grad((out * grad).sum(), leaves)
    return [out.detach(), lse.detach().masked_fill(lse.isinf(), 0.0), *grads]


def _selections(dtype: torch.dtype, device: str, block: int, backend: str) -> Iterator[Record]:
    """Routing, kept tiles and votes: tiles chosen and voted, output and LSE of the tiles chosen."""
    tokens = 9 * block - 3
    tiles = TileLists.full(tokens, tokens, block_q=block, block_k=block).to(device)
    count = tiles.key_tiles
    pinned = pack_bits(torch.eye(count, dtype=torch.bool, device=device))
    keep = keep_bits(1, 2, count, 0.5, device)
    selections = {
        "routing": Selection(routing=Routing(beta=0.5), pinned=pinned),
        "kept tiles, skipped": Selection(keep=keep, pinned=pinned),
        "kept tiles, pooled": Selection(keep=keep, pinned=pinned, rest="pooled"),
        "votes": Selection(keep=keep, pinned=pinned, vote=Vote(threshold=-1.0)),
    }
    for name, selection in selections.items():
        q, k, v = (torch.randn(1, heads, tokens, DIM).to(device, dtype) for heads in (2, 1, 1))

        def call(
            backend: str, dtype: torch.dtype, tiles: TileLists = tiles, inputs: tuple[Tensor, ...] = (q, k, v),
            **arguments: Any,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            wide = (x.to(dtype) for x in inputs)
            return tuple(
                block_sparse_attention_eager(*wide, tiles, layout="bhsd", return_lse=True, backend=backend, **arguments)
            )

        asked = {"selection": selection, "return_tiles": True}
        found, own, truth = (
            call(*at, **asked) for at in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
        )
        for part, a, b, c in zip(("tiles", "votes"), found[2:], own[2:], truth[2:], strict=False):
            a, b, c = (unpack_bits(x, count) for x in (a, b, c))
            yield _record(name, part, *(float(x) for x in _disagreement(a, b, c)))
        rest = POOLED if selection.routing is not None or selection.rest == "pooled" else SKIPPED
        states = torch.where(unpack_bits(found[2], count), EXACT, rest).to(torch.uint8).flatten(0, 1)
        chosen = TileLists.from_states(states, block_q=block, block_k=block, num_q=tokens, num_k=tokens)
        yardstick, wide = (call("reference", x, chosen) for x in (dtype, torch.float64))
        yield from _compared(name, list(found[:2]), list(yardstick), list(wide), dtype)


def _disagreement(found: Tensor, own: Tensor, truth: Tensor) -> tuple[float, float]:
    """Share of bits that differ from the truth, and the share allowed: twice the specification's own, plus one bit."""
    share, yardstick = ((x != truth).double().mean().item() for x in (found, own))
    return share, 2 * yardstick + 1 / truth.numel()
