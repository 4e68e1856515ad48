"""The cudnn backend: exact tiles as the block lists of NVIDIA's cuDNN front end, which needs no plan.

Each head has lists of its own; tiles are square. Scales of heads are multiplied into the queries. What these kernels
have no part in (pooled tiles, masks inside tiles, decay, votes, hidden keys) is refused.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import StorageCache
from ..csr import EXACT, padded_rows
from ..problem import Problem
from ..states import list_states, resolved
from .library import check_call, missing_package, scaled_queries
from .triton.launch import architecture

PACKAGE = "nvidia-cudnn-frontend"


class Blocks(NamedTuple):
    """Key tiles of each query tile: counts int32 [B, H, NQ], indices int32 [B, H, NQ, N], at least one column."""

    counts: Tensor
    indices: Tensor


_BLOCKS: StorageCache[Blocks] = StorageCache()


def missing_requirement(
    device: torch.device, tile: tuple[int, int] = (128, 128), dims: tuple[int, int] = (128, 128)
) -> str | None:
    """What this machine lacks for calls of these tiles and head dims, or None."""
    arch = architecture(device)
    if not arch.startswith(("sm_9", "sm_10", "sm_11", "sm_12")):
        return f"a card of sm_90, sm_100, sm_110 or sm_120 (found {arch})"
    if tile not in ((64, 64), (128, 128)):
        return f"tiles of 64 x 64 or 128 x 128 (found {tile[0]} x {tile[1]})"
    whole = arch.startswith("sm_12") or (tile[0] == 64 and not arch.startswith("sm_9"))
    known = (128,) if whole else (64, 96, 128)
    if dims[0] != dims[1] or dims[0] not in known:
        return f"one head dim of {', '.join(map(str, known))} on {arch} (found {dims[0]} and {dims[1]})"
    return missing_package("cudnn", PACKAGE)


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of the library's reach, saying why."""
    missing = check_call("cudnn", problem)
    tile, dims = (problem.block_q, problem.block_k), (problem.q.shape[-1], problem.v.shape[-1])
    missing(missing_requirement(problem.q.device, tile, dims))
    if problem.block_q == 64 and problem.num_q % 64 and architecture(problem.q.device).startswith("sm_9"):
        missing(f"a multiple of 64 queries in tiles of 64 on sm_90 (found {problem.num_q})")


@torch.no_grad()
def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q], exact tiles; no votes."""
    check(problem)
    problem, exact = resolved(problem)
    parts = (problem.exact_offsets, problem.exact_indices)
    shape = (*problem.q.shape[:2], problem.query_tiles)
    blocks = _BLOCKS.get(parts, (*shape, problem.key_tiles), lambda: _blocks(problem, shape))
    given = importlib.import_module("cudnn").block_sparse_attention_forward(
        scaled_queries(problem), problem.k, problem.v, blocks.indices, q2k_block_nums=blocks.counts,
        sparse_block_size=problem.block_q, allow_empty_block_nums=True, softmax_scale=problem.scale, pack_gqa=False,
        layout="bhsd",
    )  # fmt: skip
    return given["o_tensor"], given["lse_tensor"], exact, None


def _blocks(problem: Problem, shape: tuple[int, ...]) -> Blocks:
    counts, indices = padded_rows(list_states(problem) >= EXACT)
    width = max(1, indices.shape[-1])
    if not indices.shape[-1]:
        indices = indices.new_zeros(*indices.shape[:-1], 1)
    return Blocks(counts.expand(shape).contiguous(), indices.expand(*shape, width).contiguous())
