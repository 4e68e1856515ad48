"""The flex backend: torch's compiled FlexAttention over the same exact tiles, a rival and an independent check.

It executes exact tiles, per-head lists, grouped key heads and per-head scale; key masks, decay and pooled tiles are
refused, since a named backend never falls back. Every tile is listed as full (`BlockMask.from_kv_blocks` without a
mask), so none is masked inside.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.errors import BackendUnavailableError
from dit_accel_kernels.features import Problem
from dit_accel_kernels.selection import resolved


def check(problem: Problem, *, need_lse: bool) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of FlexAttention's reach, saying why."""
    asked = {
        "pooled tiles": problem.pooled_indices is not None,
        "a key mask": problem.key_valid is not None,
        "frame decay": problem.decay is not None,
        "LSE on a CPU": need_lse and problem.q.device.type == "cpu",
        "float64": problem.q.dtype == torch.float64,
        f"block_q {problem.block_q} and block_k {problem.block_k}, which are not powers of 2 of at least 16": any(
            b < 16 or b & (b - 1) for b in (problem.block_q, problem.block_k)
        ),
    }
    found = [what for what, is_asked in asked.items() if is_asked]
    if found:
        raise BackendUnavailableError(f"backend 'flex' has no {' and no '.join(found)}: use 'torch' or 'auto'")
    missing = missing_requirement(problem.q.device.type)
    if missing:
        raise BackendUnavailableError(
            f"backend 'flex' compiles its kernel and needs {missing}: install it or use 'auto'"
        )


def missing_requirement(device_type: str) -> str | None:
    """What FlexAttention would need on this device type and this machine lacks, or None."""
    if device_type == "cpu":
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return f"a CPU with AVX2 (found {torch.backends.cpu.get_cpu_capability()})"
        return None if any(shutil.which(name) for name in names) else f"a C++ compiler ({', '.join(names)})"
    return None if importlib.util.find_spec("triton") else "the triton package"


def attend(problem: Problem, *, need_lse: bool) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q] (empty where not needed), exact tiles; no votes."""
    exact, votes = None, problem.selection is not None and problem.selection.vote is not None
    if votes:
        raise BackendUnavailableError("backend 'flex' has no votes: use 'torch' or 'auto'")
    if problem.selection is not None:
        problem, exact = resolved(problem)
    check(problem, need_lse=need_lse)
    q = problem.q
    scale = problem.logit_scale
    if problem.head_scale is not None:
        q = (q * problem.head_scale[:, :, None, None]).to(q.dtype)
    grouped = problem.k.shape[1] != q.shape[1]
    mask = _block_mask(problem)
    with torch.no_grad():
        found = _compiled()(q, problem.k, problem.v, mask, scale, grouped, need_lse)
    out, lse = found if need_lse else (found, q.new_empty(0, dtype=torch.float32))
    empty = (mask.full_kv_num_blocks == 0).repeat_interleave(problem.block_q, -1)[..., : q.shape[2]]
    return out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf) if need_lse else lse, exact, None


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, grouped: bool, need_lse: bool) -> Any:
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, return_lse=need_lse)

    return torch.compile(call, dynamic=False)


def _block_mask(problem: Problem) -> Any:
    """The lists as FlexAttention's padded rows: counts [B, H, NQ] and indices [B, H, NQ, NK], exact tiles first."""
    from torch.nn.attention.flex_attention import BlockMask

    offsets, indices = problem.exact_offsets, problem.exact_indices
    groups, rows = offsets.shape[0], problem.query_tiles
    counts = offsets[:, 1:] - offsets[:, :-1]
    padded = torch.zeros(groups, rows, problem.key_tiles, dtype=torch.int32, device=indices.device)
    place = torch.arange(problem.key_tiles, device=indices.device) < counts[..., None]
    padded[place] = indices
    heads = problem.q.shape[1]
    shape = (1, 1) if groups == 1 else (groups // heads, heads)
    counts, padded = counts.view(*shape, rows), padded.view(*shape, rows, problem.key_tiles)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(padded),
        counts,
        padded,
        BLOCK_SIZE=(problem.block_q, problem.block_k),
        seq_lengths=(problem.q.shape[2], problem.k.shape[2]),
        compute_q_blocks=False,
    )
