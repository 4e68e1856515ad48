"""Gradient of the torch backend: every batch of block rows is recomputed, and gradients of shared tiles add up."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel_kernels.backends.torch.attend import Operands, chunks, gather, logits_of, raw_logits
from dit_accel_kernels.backends.torch.schedule import Unit
from dit_accel_kernels.backends.torch.tiled import Tiled, cut, units_of
from dit_accel_kernels.features import wide_dtype
from dit_accel_kernels.problem import Problem


def attend_backward(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of the output [B, H, S_q, D] and of the LSE [B, H, S_q] (None: not used)."""
    tiled = cut(problem)
    wide = wide_dtype(problem.q.dtype)
    sums = {
        name: torch.zeros(x.shape, dtype=wide, device=x.device)
        for name in ("q", "k", "v", "k_mean", "v_mean")
        if (x := getattr(tiled, name)) is not None
    }
    grad_out = _rows(grad_out, tiled, problem.block_q)
    if grad_lse is not None:
        grad_lse = _rows(grad_lse[..., None], tiled, problem.block_q)
    for unit, lanes in chunks(tiled, units_of(problem), torch.get_num_threads()):
        go = grad_out[lanes].index_select(1, unit.rows)
        gl = None if grad_lse is None else grad_lse[lanes].index_select(1, unit.rows)
        x = gather(tiled, unit, lanes)
        _scatter(tiled, unit, lanes, _softmax_backward(x, go, gl), sums)
    return _uncut(problem, tiled, sums)


def _rows(x: Tensor, tiled: Tiled, block: int) -> Tensor:
    """[B, H, S_q, D] laid out like the tiled queries, [N, R, block_q, D], zero in padded rows."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))
    return x.reshape(*tiled.q.shape[:3], x.shape[-1])


def _softmax_backward(x: Operands, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gathered q, k and v, in the wide dtype where sums over many rows follow."""
    wide = wide_dtype(x.q.dtype)
    raw = raw_logits(x)
    logits, dead = logits_of(raw, x)
    p = torch.softmax(logits, -1)
    if dead is not None:
        p = p.masked_fill(dead, 0.0)
    grad_v = p.to(x.q.dtype).mT @ grad_out
    grad_p = (grad_out @ x.v.mT).to(wide)
    delta = (grad_p * p).sum(-1, keepdim=True)
    grad_s = p * (grad_p - (delta if grad_lse is None else delta - grad_lse))
    if x.t is not None:
        grad_s = torch.where(raw > raw * x.t, grad_s * x.t, grad_s)
    grad_s = (grad_s * x.scale).to(x.q.dtype)
    return (grad_s @ x.k).to(wide), (grad_s.mT @ x.q).to(wide), grad_v.to(wide)


def _scatter(
    tiled: Tiled, unit: Unit, lanes: slice, grads: tuple[Tensor, Tensor, Tensor], sums: dict[str, Tensor]
) -> None:
    """Add the gradients of one batch into `sums`."""
    sums["q"][lanes].index_add_(1, unit.rows, grads[0])
    rows, exact = unit.exact.shape
    pooled = unit.pooled.shape[1]
    block, dim = tiled.k.shape[2:]
    for name, grad in (("k", grads[1]), ("v", grads[2])):
        columns = grad.shape[2] - pooled
        tokens = torch.nn.functional.pad(grad[:, :, :columns], (0, 0, 0, exact * block - columns))
        sums[name][lanes].index_add_(1, unit.exact.flatten(), tokens.reshape(grad.shape[0], rows * exact, block, dim))
        if pooled:
            sums[f"{name}_mean"][lanes].index_add_(1, unit.pooled.flatten(), grad[:, :, columns:].flatten(1, 2))


def _uncut(problem: Problem, tiled: Tiled, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """From tiles back to tokens: the adjoint of `cut`."""
    q, k, valid = problem.q, problem.k, problem.key_valid
    grad_q = sums["q"].reshape(*q.shape[:2], -1, q.shape[3])[:, :, : q.shape[2]]
    if problem.head_scale is not None:
        grad_q = grad_q * problem.head_scale[:, :, None, None]
    grads = [grad_q.to(q.dtype)]
    for name in ("k", "v"):
        grad = sums[name]
        if f"{name}_mean" in sums and tiled.log_length is not None:
            share = sums[f"{name}_mean"] * (-tiled.log_length.clamp(min=0)).exp()[..., None]
            grad = grad + share[..., None, :]
        grad = grad.reshape(k.shape[0], -1, problem.key_tiles * problem.block_k, k.shape[3])[:, :, : k.shape[2]]
        if grad.shape[1] != k.shape[1]:
            grad = grad.unflatten(1, (k.shape[1], -1)).sum(2)
        if valid is not None:
            grad = grad.masked_fill(~valid[:, None, :, None], 0)
        grads.append(grad.to(k.dtype))
    return grads[0], grads[1], grads[2]
