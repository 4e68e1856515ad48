"""Attention calls by kind: calls.json lists the kinds that the methods make, and `make` makes one on random tensors.

A kind is the features of a call joined by +, such as "order+keep+maxgap"; "plain" has none. calls.json is recorded by
running the methods on tiny models (tests/support/method_calls.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from dit_accel_kernels import (
    POOLED,
    SKIPPED,
    Routing,
    Selection,
    TileLists,
    Vote,
    block_sparse_attention,
    block_sparse_attention_backward,
    block_sparse_attention_eager,
    pack_bits,
)
from inputs import decay, keep_bits, lists
from torch import Tensor

FILE = Path(__file__).with_name("calls.json")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = ("int8", "fp8")
VOTES = {
    "maxgap": Vote(threshold=-6.0),
    "mass": Vote(criterion="mass", threshold=0.02),
    "budget": Vote(criterion="budget", threshold=0.05),
}


def kinds() -> dict[str, list[str]]:
    """The kinds of calls that the methods make, each with the methods that make it."""
    return json.loads(FILE.read_text())


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a call is made at beside its kind: dtype's name, head dim, tile side; batch, heads, key heads, tokens."""

    dtype: str = "bf16"
    dim: int = 128
    tile: int = 128
    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    tokens: int = 0  # two and a half tiles
    groups: int = 1  # list sets: 1, heads or batch * heads
    layout: str = "bshd"
    density: float | None = None  # share of exact tiles; None: of a call to be checked, half of them or more

    @property
    def name(self) -> str:
        """Such as "bf16-d128-b64"."""
        return f"{self.dtype}-d{self.dim}-b{self.tile}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call: tensors, lists, other arguments of `block_sparse_attention`, and `grad_out` where it is a backward."""

    inputs: tuple[Tensor, Tensor, Tensor]
    tiles: TileLists
    arguments: dict[str, Any]
    grad_out: Tensor | None = None

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """What the call gives: output and what else was asked for, or gradients of q, k and v.

        The gradient of "reference", the specification, is autograd's; that of "fa4" is too, so that it starts from
        fa4's output and LSE.
        """
        if self.grad_out is not None and backend in ("reference", "fa4"):
            leaves = [x.detach().requires_grad_() for x in self.inputs]
            out = block_sparse_attention(*leaves, self.tiles, **self.arguments, backend=backend)
            return torch.autograd.grad(out, leaves, self.grad_out)
        if self.grad_out is not None:
            return block_sparse_attention_backward(
                self.grad_out, *self.inputs, self.tiles, **self.arguments, backend=backend
            )
        results = block_sparse_attention_eager(*self.inputs, self.tiles, **self.arguments, backend=backend)
        return results if isinstance(results, tuple) else (results,)

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with tensors of another dtype."""
        scale = self.arguments.get("head_scale")
        return Call(
            inputs=tuple(x.to(dtype) for x in self.inputs),  # pyright: ignore
            tiles=self.tiles,
            arguments=self.arguments if scale is None else {**self.arguments, "head_scale": scale.double()},
            grad_out=None if self.grad_out is None else self.grad_out.to(dtype),
        )


def make(kind: str, at: Setting, device: str, *, empty: bool = False) -> Call:
    """A call of a kind on random tensors, on a device the same ones every time; `empty`: on what memory holds."""
    words = set(kind.split("+")) - {"plain"}
    unknown = words - set(WORDS)
    if unknown:
        raise ValueError(f"a kind joins {', '.join(WORDS)} by +: found {', '.join(sorted(unknown))} in {kind!r}")
    tokens = at.tokens or 2 * at.tile + at.tile // 2
    generator, on_device = torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        if empty:
            return torch.empty(shape, dtype=DTYPES[at.dtype], device=device)
        return torch.randn(shape, generator=on_device, device=device).to(DTYPES[at.dtype])

    q = random(at.batch, tokens, at.heads, at.dim)
    k = random(at.batch, tokens, at.key_heads, at.dim)
    v = random(at.batch, tokens, at.key_heads, at.dim * 2 // 3 // 16 * 16 if "narrow" in words else at.dim)
    if "fused" in words:
        v = random(at.batch, tokens, 3, at.key_heads, at.dim)[:, :, 2]
    elif at.layout == "bhsd":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    layout = "bshd" if "fused" in words else at.layout
    rest = POOLED if "pooled" in words else SKIPPED
    selects = bool(words & {"keep", "pinned", "route", "route-exact", "routed", "reverse", *VOTES})
    density = 1.0 if selects and rest == SKIPPED else at.density or 0.5
    tiles = lists(tokens, at.tile, density, rest, device, groups=at.groups)
    if "partial" in words:
        tiles = _partial(tiles, generator)
    arguments: dict[str, Any] = {"layout": layout}
    arguments["return_lse"] = "backward" not in words and (selects or at.density is None)
    if "mask" in words:
        arguments["key_mask"] = (torch.rand(at.batch, tokens, generator=generator) < 0.9).to(device)
    if "decay" in words:
        arguments["frame_decay"] = decay(tokens, device)
    if "scale" in words:
        arguments["head_scale"] = torch.linspace(0.5, 1.5, at.heads, device=device)
    if "order" in words:
        arguments["token_order"] = torch.randperm(tokens, generator=generator).to(device)
    for precision in words & set(PRECISIONS):
        arguments["precision"] = precision
    if selects:
        arguments["selection"] = _selection(words, at, tiles.query_tiles, tiles.key_tiles, device)
        arguments["return_tiles"] = "backward" not in words
    return Call(
        inputs=(q, k, v),
        tiles=tiles,
        arguments=arguments,
        grad_out=random(*q.shape[:3], v.shape[3]) if "backward" in words else None,
    )


def _partial(tiles: TileLists, generator: torch.Generator) -> TileLists:
    """Lists of which every second exact tile has one of two random masks."""
    entries = torch.arange(tiles.tiles_exact, dtype=torch.int32)
    shape = (2, tiles.block_q, -(-tiles.block_k // 32))
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    ids = torch.where(entries % 2 == 0, entries // 2 % 2, -1)
    return replace(tiles, mask_ids=ids.to(tiles.device), mask_bits=bits.to(tiles.device))


def _selection(words: set[str], at: Setting, q_tiles: int, k_tiles: int, device: str) -> Selection:
    """The selection that the words of a kind ask for."""
    kept = keep_bits(at.batch, at.heads, k_tiles, at.density or 0.7, device)
    beta = 0.5 if at.density is None else -NormalDist().inv_cdf(at.density)  # of random inputs it keeps that share
    routes = words & {"route", "route-exact"}
    vote = words & set(VOTES)
    return Selection(
        keep=kept if "keep" in words else None,
        rest="pooled" if "rest" in words else "skip",
        pinned=pack_bits(torch.eye(q_tiles, k_tiles, dtype=torch.bool)).to(device) if "pinned" in words else None,
        routing=Routing(beta=beta, threshold="exact" if "route-exact" in words else "diag") if routes else None,
        routed=kept if "routed" in words else None,
        vote=VOTES[vote.pop()] if vote else None,
        reverse="reverse" in words,
    )


WORDS = (
    "fused", "narrow", "partial", "pooled", "mask", "decay", "scale", "order", "keep", "rest", "pinned", "route",
    "route-exact", "routed", *VOTES, "reverse", "backward", *PRECISIONS,
)  # fmt: skip
