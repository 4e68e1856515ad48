"""The calls that gpu.py times: ours at several densities and features, dense attention, FlexAttention; and their check.

Some query tiles of every timed call, and some key tiles of a backward, are computed again by the specification: what
is fast and wrong must not pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from calls import Call
from dit_accel_kernels import (
    EXACT,
    POOLED,
    SKIPPED,
    Routing,
    Selection,
    TileLists,
    Vote,
    count_bits,
    pack_bits,
    unpack_bits,
)
from dit_accel_kernels.checks import problem_of
from grid import errors, left_by
from inputs import decay, keep_bits, lists
from predictions import Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
RADIAL = 0.27  # RadialAttention's density at Wan 720p, 81 frames
BETA = 1.2816  # routes a tenth of the tiles of random inputs to exact ones: 1 - Phi(BETA) = 0.1
Errors = tuple[float, float]  # measured and allowed


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A call to be timed: `run` makes it, `check` compares some of what it gave, `density_of` tells what it visited."""

    run: Callable[[], Any]
    check: Callable[[Any], Errors]
    density_of: Callable[[Any], float]


def calls_of(shape: Shape, dtype: torch.dtype, device: str) -> dict[tuple[str, float], Callable[[], Timed]]:
    """What to time for one shape: (candidate, density) -> a function that prepares it, the telling ones first."""
    q, k, v = (
        torch.randn(shape.batch, shape.heads, shape.tokens, shape.dim, device=device, dtype=dtype) for _ in range(3)
    )

    def tiles_of(density: float, rest: int = SKIPPED) -> TileLists:
        return lists(shape.tokens, shape.block, density, rest, device)

    def ours(density: float, rest: int = SKIPPED, backend: str = "triton", **arguments: Any) -> Timed:
        call = Call(inputs=(q, k, v), tiles=tiles_of(density, rest), arguments={"layout": "bhsd", **arguments})
        return timed_call(call, backend, density)

    def selected(kept: float, votes: bool = False, routes: bool = False) -> Timed:
        """LiteAttention: kept tiles of every head, with votes or without. SolAttention: routing, diagonal pinned."""
        tiles = TileLists.full(shape.tokens, shape.tokens, block_q=shape.block, block_k=shape.block).to(device)
        selection = Selection(
            keep=None if routes else keep_bits(shape.batch, shape.heads, tiles.key_tiles, kept, device),
            pinned=pack_bits(torch.eye(tiles.key_tiles, dtype=torch.bool, device=device)),
            routing=Routing(beta=BETA) if routes else None,
            vote=Vote() if votes else None,
        )
        arguments = {"layout": "bhsd", "selection": selection, "return_tiles": True, "return_lse": True}
        return timed_call(Call(inputs=(q, k, v), tiles=tiles, arguments=arguments), "triton", kept)

    def dense(name: str) -> Timed:
        def run() -> tuple[Tensor, ...]:
            with sdpa_kernel(SDPA[name]):
                return (scaled_dot_product_attention(q, k, v),)

        call = Call(inputs=(q, k, v), tiles=tiles_of(1.0), arguments={"layout": "bhsd"})
        return Timed(run=run, check=lambda results: sampled(call, results), density_of=lambda results: 1.0)

    prepared: dict[tuple[str, float], Callable[[], Timed]] = {}
    prepared["triton", RADIAL] = lambda: ours(RADIAL)
    for name in SDPA:
        prepared[name, 1.0] = lambda name=name: dense(name)
    prepared["triton", 1.0] = lambda: ours(1.0)
    prepared["flex", RADIAL] = lambda: ours(RADIAL, backend="flex")
    prepared["triton", 0.1] = lambda: ours(0.1)
    prepared["triton-backward", RADIAL] = lambda: gradients((q, k, v), tiles_of(RADIAL), RADIAL)
    prepared["triton-decay", RADIAL] = lambda: ours(RADIAL, frame_decay=decay(shape.tokens, device))
    prepared["triton-pooled", 0.1] = lambda: ours(0.1, POOLED)
    prepared["triton-routed", 0.1] = lambda: selected(0.1, routes=True)
    prepared["triton-kept", RADIAL] = lambda: selected(RADIAL)
    prepared["triton-votes", RADIAL] = lambda: selected(RADIAL, votes=True)
    for density in (0.25, 0.5):
        prepared["triton", density] = lambda density=density: ours(density)
    return prepared


def timed_call(call: Call, backend: str, density: float) -> Timed:
    """One of our calls by a backend."""

    def density_of(results: tuple[Tensor, ...]) -> float:
        if not call.arguments.get("return_tiles"):
            return density
        exact = results[2]
        return float(count_bits(exact).sum()) / (exact[..., 0].numel() * call.tiles.key_tiles)

    return Timed(run=lambda: call.run(backend), check=lambda results: sampled(call, results), density_of=density_of)


def gradients(inputs: tuple[Tensor, Tensor, Tensor], tiles: TileLists, density: float) -> Timed:
    """The backward alone, of a plain call."""
    from dit_accel_kernels.backends.triton.attend import attend
    from dit_accel_kernels.backends.triton.backward import attend_backward

    problem = problem_of(*inputs, tiles, layout="bhsd")
    out, lse, *_ = attend(problem, need_lse=True)
    grad_out = torch.randn_like(out)
    call = Call(inputs=inputs, tiles=tiles, arguments={"layout": "bhsd"}, grad_out=grad_out)

    def check(results: tuple[Tensor, ...]) -> Errors:
        return worst([sampled(call, results[:1]), key_gradients(call, out, lse, results)])

    return Timed(
        run=lambda: attend_backward(problem, out, lse, grad_out, None), check=check, density_of=lambda results: density
    )


def worst(pairs: list[Errors]) -> Errors:
    """The error that exceeds what is allowed most, or comes nearest."""
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30))


def sampled(call: Call, results: tuple[Tensor, ...]) -> Errors:
    """The first result's error in some query tiles of the first and the last head, in layout "bhsd"."""
    q, k, v = call.inputs
    tiles, block, result = call.tiles, call.tiles.block_q, ([], [], [])
    exact = results[2] if call.arguments.get("return_tiles") else None
    for h in {0, q.shape[1] - 1}:
        for i in {0, tiles.query_tiles // 2, tiles.query_tiles - 1}:
            rows = slice(i * block, min((i + 1) * block, tiles.num_q))
            at = (slice(0, 1), slice(h, h + 1))
            states, frames = _states_of(call, exact, h, i), call.arguments.get("frame_decay")
            frames = None if frames is None else replace(frames, q_frames=frames.q_frames[rows])
            part = Call(
                inputs=(q[at][:, :, rows], k[at], v[at]),
                tiles=TileLists.from_states(
                    states, block_q=block, block_k=tiles.block_k, num_q=rows.stop - rows.start, num_k=tiles.num_k
                ),
                arguments={"layout": "bhsd"} if frames is None else {"layout": "bhsd", "frame_decay": frames},
                grad_out=None if call.grad_out is None else call.grad_out[at][:, :, rows],
            )
            yardstick, truth = part.run("reference")[0], part.to(torch.float64).run("reference")[0]
            for x, into in zip((results[0][at][:, :, rows], yardstick, truth), result, strict=True):
                into.append(x.flatten())
    return worst(list(errors(*map(torch.cat, result), q.dtype).values()))


def _states_of(call: Call, exact: Tensor | None, head: int, q_tile: int) -> Tensor:
    """Tile states uint8 [1, NK] of one query tile in the first batch, selection applied; lists are shared."""
    states, count = call.tiles.states()[0, q_tile], call.tiles.key_tiles
    if exact is None:
        return states[None]
    selection: Selection = call.arguments["selection"]
    keep = None if selection.keep is None else unpack_bits(selection.keep[0, head, q_tile], count)
    return left_by(selection, states, unpack_bits(exact[0, head, q_tile], count), keep)[None]


def key_gradients(call: Call, out: Tensor, lse: Tensor, grads: tuple[Tensor, ...]) -> Errors:
    """Errors of grad_k and grad_v in the middle key tile of the last head, by the formula, from output and LSE."""
    assert call.grad_out is not None
    (q, k, v), tiles, h = call.inputs, call.tiles, call.inputs[0].shape[1] - 1
    j = tiles.key_tiles // 2
    keys = slice(j * tiles.block_k, min((j + 1) * tiles.block_k, tiles.num_k))
    seen = (tiles.states()[0, :, j] == EXACT).repeat_interleave(tiles.block_q)[: tiles.num_q]

    def of(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows, grad, value = (x[0, h, seen].to(dtype) for x in (q, call.grad_out, out))
        k_j, v_j, scale = k[0, h, keys].to(dtype), v[0, h, keys].to(dtype), q.shape[-1] ** -0.5
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        p = ((rows @ k_j.T).to(wide) * scale - lse[0, h, seen, None].to(wide)).exp()
        delta = (grad.to(wide) * value.to(wide)).sum(-1, keepdim=True)
        grad_x = p * ((grad @ v_j.T).to(wide) - delta) * scale
        return grad_x.to(dtype).T @ rows, p.to(dtype).T @ grad

    results = []
    for got, yardstick, truth in zip((x[0, h, keys] for x in grads[1:]), of(q.dtype), of(torch.float64), strict=True):
        results += errors(got, yardstick, truth, q.dtype).values()
    return worst(results)
