"""The triton backend: plan, tuned sizes and launches; every feature in one kernel, rows read where they lie."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from dit_accel_kernels.errors import BackendUnavailableError
from dit_accel_kernels.features import Problem
from dit_accel_kernels.triton_forward import _fwd_kernel
from dit_accel_kernels.triton_plan import row_plan
from dit_accel_kernels.triton_pool import pool
from dit_accel_kernels.triton_support import missing_requirement

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Sizes of one launch: query rows of a program, keys of a chunk (both at most a tile), warps, pipeline stages."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of the kernel's reach, saying why."""
    missing = missing_requirement(problem.q.device, problem.q.dtype, problem.q.shape[-1])
    if missing:
        raise BackendUnavailableError(f"backend 'triton' needs {missing}: use 'torch' or 'auto'")


def attend(problem: Problem, *, need_lse: bool, reverse: bool = False) -> tuple[Tensor, Tensor]:
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
    block_q, (block_k, whole) = query_block(problem.block_q, launch.block_q), key_block(problem.block_k, launch.block_k)
    plan = row_plan(problem, whole_chunks=whole)
    pooled: tuple[Tensor | None, ...] = (None, None, None)
    d1, d2 = column_parts(dim)
    head_scale, table = problem.head_scale, None if problem.decay is None else problem.decay[0]
    with on_device(q.device):
        if problem.pooled_indices is not None:
            pooled = pool(k, v, block_k=problem.block_k, token_order=problem.token_order, valid=plan.valid)
        programs = batch * heads * problem.query_tiles * -(-problem.block_q // block_q)
        _fwd_kernel[(programs,)](
            q, k, v, out, lse if need_lse else None, plan.indices, plan.bounds, plan.row_order, plan.entry_t,
            problem.token_order, plan.valid, head_scale, table, plan.q_frames, plan.k_frames,
            plan.pooled_t if problem.pooled_indices is not None else None, problem.pooled_indices, *pooled,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], plan.stride_b, plan.stride_h,
            0 if head_scale is None or head_scale.shape[0] == 1 else heads, problem.key_tiles,
            num_q, k.shape[2], heads, k.shape[1], problem.query_tiles, problem.key_tiles,
            0 if table is None else table.numel() - 1, problem.logit_scale * LOG2_E, -1 if reverse else 1,
            TILE_Q=problem.block_q, TILE_K=problem.block_k, BLOCK_Q=block_q, BLOCK_K=block_k, DIM=dim, D1=d1, D2=d2,
            PRECISION=precision(q.dtype, q.device), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return out, lse


def _like(q: Tensor) -> Tensor:
    """An empty [B, H, S, D] whose memory has q's order of heads and tokens."""
    batch, heads, tokens, dim = q.shape
    if q.stride(1) >= q.stride(2):
        return q.new_empty(batch, heads, tokens, dim)
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def query_block(tile: int, most: int) -> int:
    """Query rows of a program: a power of 2 from 16 to `most` that covers a tile or a part of it."""
    return max(16, min(most, triton.next_power_of_2(tile)))


def key_block(tile: int, most: int) -> tuple[int, bool]:
    """Keys of a chunk, a power of 2 from 16 to `most`, and whether it divides the tile."""
    divisor = tile & -tile
    if divisor >= 16:
        return min(most, divisor), True
    return max(16, min(most, triton.next_power_of_2(tile))), False


def column_parts(dim: int) -> tuple[int, int]:
    """Head dim as two powers of 2 of at least 16 (the second may be 0) that cover it: 96 = 64 + 32."""
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, 0 if dim <= first else max(16, triton.next_power_of_2(dim - first))


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """How fp32 products are made: tf32x3 on NVIDIA, full fp32 elsewhere.

    Three tf32 products keep fp32's accuracy (about 2^-22) on tensor cores, which have no fp32 there; AMD's matrix cores
    have one, and Triton's interpreter computes in fp32 anyway.
    """
    return "tf32x3" if dtype == torch.float32 and device.type == "cuda" and torch.version.hip is None else "ieee"


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Name such as "sm_90" or "gfx942"; the device type where there is no more to say."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it this one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def launch_of(arch: str, dtype: torch.dtype, dim: int) -> Launch:
    """Tuned sizes for an architecture, dtype and head dim, else those that fit every card."""
    if dtype == torch.float32:
        return Launch(block_q=64, block_k=32, num_warps=4, num_stages=2)
    return Launch(block_q=128, block_k=64, num_warps=8, num_stages=2 if dim > 64 else 3)
