"""Gradient of the torch backend: every chunk of query tiles is recomputed, and gradients of shared tiles add up."""

import torch
from torch import Tensor

from ...features import wide_dtype
from ...problem import Problem
from .attend import chunk_sizes, softmax_weights, transform
from .chunks import Chunk, chunks_of
from .memory import buffer, taken
from .tiled import Tiled, in_tiles, tiles_in_order

TEMPORARIES = 4  # as large as a chunk's logits: the memory of larger ones goes back to the system each time


@torch.no_grad()
def attend_backward(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output [B, H, S_q, Dv] and of the LSE [B, H, S_q] (None: not used)."""
    tiled = in_tiles(problem)
    wide = wide_dtype(problem.q.dtype)
    parts = {"q": tiled.q, "k": tiled.k, "v": tiled.v}
    if tiled.means is not None:
        parts |= {"k_mean": tiled.means.k, "v_mean": tiled.means.v}
    sums = {name: torch.zeros(x.shape, dtype=wide, device=x.device) for name, x in parts.items()}
    grad_out = tiles_in_order(grad_out.to(tiled.q.dtype), problem.block_q)
    grad_lse = None if grad_lse is None else tiles_in_order(grad_lse[..., None], problem.block_q)
    columns, multiple = chunk_sizes(problem)
    for chunk in chunks_of(problem, columns // TEMPORARIES, multiple, remember=True):
        of_lse = None if grad_lse is None else grad_lse[chunk.q_tiles]
        _add_chunk(tiled, chunk, grad_out[chunk.q_tiles], of_lse, sums)
    return _uncut(problem, tiled, sums)


def _add_chunk(tiled: Tiled, chunk: Chunk, grad_out: Tensor, grad_lse: Tensor | None, sums: dict[str, Tensor]) -> None:
    """Add the gradients of one chunk into `sums`, in the wide dtype."""
    columns = chunk.exact.shape[1] * tiled.k.shape[1]
    exact, pooled, weights = chunk.exact.flatten(), chunk.pooled.flatten(), softmax_weights(tiled, chunk)
    q = tiled.q[chunk.q_tiles]
    wide, shape = wide_dtype(q.dtype), (*q.shape[:2], columns + chunk.pooled.shape[1])

    def columns_of(name: str, tokens: Tensor, means: Tensor | None) -> Tensor:
        near = taken(name, tokens, chunk.exact).flatten(1, 2)
        return near if means is None else torch.cat([near, means[chunk.pooled]], 1)

    def product(name: str, a: Tensor, b: Tensor) -> Tensor:
        x = torch.bmm(a, b.mT, out=buffer(f"{name} product", q, shape))
        return x if x.dtype == wide else buffer(name, q, shape, wide).copy_(x)

    k_mean, v_mean, _ = tiled.means or (None, None, None)
    k, v = columns_of("k", tiled.k, k_mean), columns_of("v", tiled.v, v_mean)
    raw = product("logits", q, k).mul_(tiled.scale)
    x = buffer("weights", q, shape, wide).copy_(raw)
    t, empty, hidden = transform(x, tiled, chunk, columns, weights)
    p = torch.softmax(x, -1, out=x)
    if empty is not None:
        p.masked_fill_(empty[:, :, None], 0.0)
    grad_v = p.to(q.dtype).mT @ grad_out
    grad_p = product("gradient", grad_out, v)
    if hidden is not None:  # may hold anything, and 0 times NaN is not 0
        grad_p[:, :, :columns].masked_fill_(hidden, 0.0)
        k = k.nan_to_num(0.0, 0.0, 0.0)
    delta = torch.mul(grad_p, p, out=buffer("delta", q, shape, wide)).sum(-1, keepdim=True)
    grad_x = grad_p.sub_(delta if grad_lse is None else delta - grad_lse).mul_(p)
    if t is not None:
        grad_x = torch.where(raw > raw * t, grad_x * t, grad_x)
    grad_x = grad_x.mul_(tiled.scale).to(q.dtype)
    sums["q"].index_add_(0, chunk.q_tiles, (grad_x @ k).to(wide))
    for name, grad in (("k", (grad_x.mT @ q).to(wide)), ("v", grad_v.to(wide))):
        sums[name].index_add_(0, exact, grad[:, :columns].reshape(-1, *sums[name].shape[1:]))
        if pooled.numel():
            sums[f"{name}_mean"].index_add_(0, pooled, grad[:, columns:].flatten(0, 1))


def _uncut(problem: Problem, tiled: Tiled, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """From tiles back to tokens: the adjoint of `cut`."""
    q, k, valid = problem.q, problem.k, problem.key_valid
    grad_q = sums["q"].reshape(*q.shape[:2], -1, q.shape[3])[:, :, : q.shape[2]]
    if problem.head_scale is not None:
        grad_q = grad_q * problem.head_scale[:, :, None, None]
    grads = [grad_q.to(q.dtype)]
    for name in ("k", "v"):
        grad = sums[name]
        if tiled.means is not None:  # beside an empty tile, whose tokens are all masked below
            of_each_token = sums[f"{name}_mean"] * (-tiled.means.log_length).exp()[:, None]
            grad = grad + of_each_token[:, None]
        grad = grad.reshape(*k.shape[:2], -1, grad.shape[-1])[:, :, : k.shape[2]]
        if valid is not None:
            grad = grad.masked_fill(~valid[:, None, :, None], 0)
        grads.append(grad.to(k.dtype))
    return grads[0], grads[1], grads[2]
