"""The triton backend: plan, sizes and launches; every feature in one kernel, rows read and written where they lie."""

# Launches take options that a kernel's signature doesn't show:
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dit_accel_kernels.errors import BackendUnavailableError
from dit_accel_kernels.features import Problem
from dit_accel_kernels.triton_forward import _fwd_kernel
from dit_accel_kernels.triton_launch import (
    architecture,
    column_parts,
    fp32_products,
    key_block,
    launch_of,
    query_block,
    warps,
)
from dit_accel_kernels.triton_plan import row_plan
from dit_accel_kernels.triton_pool import pool
from dit_accel_kernels.triton_support import missing_requirement

LOG2_E = math.log2(math.e)


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of the kernel's reach, saying why."""
    missing = missing_requirement(problem.q.device, problem.q.dtype, problem.q.shape[-1])
    if missing:
        raise BackendUnavailableError(f"backend 'triton' needs {missing}: use 'torch' or 'auto'")


def attend(
    problem: Problem, *, need_lse: bool, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output [B, H, S_q, D], laid out like q, and natural-log LSE float32 [B, H, S_q] (empty where not needed).

    Both in the problem's token order: with `token_order` the kernel gathers and scatters rows itself. `reverse` visits
    each section of a list from its end. Tensors are copied only where the head dim is not contiguous.
    """
    check(problem)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (problem.q, problem.k, problem.v))
    batch, heads, num_q, dim = q.shape
    out = _like(q)
    lse = q.new_empty((batch, heads, num_q) if need_lse else (0,), dtype=torch.float32)
    launch = launch_of(architecture(q.device), q.dtype, dim)
    block_q, (block_k, _) = query_block(problem.block_q, launch.block_q), key_block(problem.block_k, launch.block_k)
    plan = row_plan(problem)
    pooled: tuple[Tensor | None, ...] = (None, None, None)
    d1, d2 = column_parts(dim)
    head_scale, table = problem.head_scale, None if problem.decay is None else problem.decay[0]
    with on_device(q.device):
        if problem.pooled_indices is not None:
            order, valid = problem.token_order, plan.valid
            k_mean, v_mean, length = pool(k, v, block_k=problem.block_k, token_order=order, valid=valid)
            pooled = (k_mean, v_mean, length.log2())
        programs = batch * heads * problem.query_tiles * -(-problem.block_q // block_q)
        _fwd_kernel[(programs,)](
            q, k, v, out, lse if need_lse else None, plan.indices, plan.bounds, plan.row_order, plan.entry_t,
            problem.token_order, plan.valid, head_scale, table, plan.q_frames, plan.k_frames,
            plan.pooled_t if problem.pooled_indices is not None else None, problem.pooled_indices, *pooled,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:2], None if v.stride(2) == k.stride(2) else v.stride(2),
            *out.stride()[:3], plan.stride_b, plan.stride_h,
            0 if head_scale is None or head_scale.shape[0] == 1 else heads,
            num_q, k.shape[2], heads, k.shape[1], problem.query_tiles, problem.key_tiles,
            0 if table is None else table.numel() - 1, problem.logit_scale * LOG2_E, -1 if reverse else 1,
            TILE_Q=problem.block_q, TILE_K=problem.block_k, BLOCK_Q=block_q, BLOCK_K=block_k,
            BLOCK_S=min(block_k, launch.block_s), DIM=dim, D1=d1, D2=d2, PRECISION=precision(q.dtype, q.device),
            num_warps=warps(launch, block_q), num_stages=launch.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse, None, None


def _like(q: Tensor) -> Tensor:
    """An empty [B, H, S, D] whose memory has q's order of heads and tokens."""
    batch, heads, tokens, dim = q.shape
    if q.stride(1) >= q.stride(2):
        return q.new_empty(batch, heads, tokens, dim)
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Triton's input precision of products in this dtype on this device."""
    return fp32_products(architecture(device)) if dtype == torch.float32 else "ieee"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it this one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
