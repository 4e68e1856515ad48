"""The cudnn backend: exact tiles as the block lists of NVIDIA's cuDNN front end, which needs no plan.

Each head has lists of its own; tiles are square. Scales of heads are multiplied into the queries.
"""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import StorageCache, capturing
from ..csr import EXACT, padded_rows
from ..problem import Problem
from ..states import list_states, resolved
from .library import check_call, missing_package, scaled_queries, tile_sizes
from .triton.launch import architecture

PACKAGE, FUNCTION = "nvidia-cudnn-frontend", "block_sparse_attention_forward"
BLACKWELL = ("sm_10", "sm_11")


class Blocks(NamedTuple):
    """Key tiles of each query tile: counts int32 [B, H, NQ], indices int32 [B, H, NQ, N]; tokens of key tiles [NK].

    The last are None where all are whole: without them it attends to what lies beyond the last key.
    """

    counts: Tensor
    indices: Tensor
    sizes: Tensor | None


_BLOCKS: StorageCache[Blocks] = StorageCache()


def missing_requirement(
    device: torch.device, tile: tuple[int, int] = (128, 128), dims: tuple[int, int] = (128, 128)
) -> str | None:
    """What this machine lacks for calls of these tiles and head dims, or None."""
    arch = architecture(device)
    if not arch.startswith(("sm_9", *BLACKWELL, "sm_12")):
        return f"a card of sm_90, sm_100, sm_110 or sm_120 (found {arch})"
    if tile not in ((64, 64), (128, 128)):
        return f"tiles of 64 x 64 or 128 x 128 (found {tile[0]} x {tile[1]})"
    whole = arch.startswith("sm_12") or (tile[0] == 64 and arch.startswith(BLACKWELL))
    known = (128,) if whole else (64, 96, 128)
    if dims[0] != dims[1] or dims[0] not in known:
        return f"one head dim of {', '.join(map(str, known))} on {arch} (found {dims[0]} and {dims[1]})"
    return missing_package("cudnn", PACKAGE, FUNCTION)


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of the library's reach, saying why."""
    missing = check_call("cudnn", problem)
    q, k = problem.q, problem.k
    missing(missing_requirement(q.device, (problem.block_q, problem.block_k), (q.shape[-1], problem.v.shape[-1])))
    narrow = problem.block_q == 64 and architecture(q.device).startswith(BLACKWELL)
    if narrow and (q.dtype != torch.bfloat16 or q.shape[1] != k.shape[1]):
        missing(f"bfloat16 and as many key heads with tiles of 64 (found {q.dtype}, {q.shape[1]} and {k.shape[1]})")


@torch.no_grad()
def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q], exact tiles; no votes."""
    check(problem)
    problem, exact = resolved(problem)
    parts = (problem.exact_offsets, problem.exact_indices)
    blocks = _BLOCKS.get(parts, (*problem.q.shape[:2], problem.num_k), lambda: _blocks(problem))
    q, k, v = (_tokens_first(x) for x in (scaled_queries(problem), problem.k, problem.v))
    lacking = -problem.num_q % 64 if problem.block_q == 64 else 0  # sm_90 takes whole tiles of 64 queries alone
    given = getattr(importlib.import_module("cudnn"), FUNCTION)(
        torch.nn.functional.pad(q, (0, 0, 0, 0, 0, lacking)) if lacking else q, k, v, blocks.indices,
        block_sizes=blocks.sizes, q2k_block_nums=blocks.counts, sparse_block_size=problem.block_q,
        allow_empty_block_nums=True, softmax_scale=problem.scale, pack_gqa=False, layout="bshd",
    )  # fmt: skip
    out, lse = given["o_tensor"].transpose(1, 2), given["lse_tensor"]
    return out[:, :, : problem.num_q], lse[:, :, : problem.num_q], exact, None


def _tokens_first(x: Tensor) -> Tensor:
    """[B, S, H, D] of [B, H, S, D], the one layout in which the library is called; copied where it isn't that."""
    x = x.transpose(1, 2).contiguous()
    return x if x.data_ptr() % 128 == 0 else x.clone()  # what its loads on sm_90 rely on


def _blocks(problem: Problem) -> Blocks:
    device, ragged = problem.q.device, problem.num_k % problem.block_k
    # kernels of sm_120 are compiled for a width of lists, those of sm_100 are faster where they know the longest row
    read = not (capturing(device) or architecture(device).startswith("sm_12"))
    counts, indices = padded_rows(list_states(problem) >= EXACT, read)
    sizes = tile_sizes(problem.num_k, problem.block_k, device) if ragged else None
    shape = (*problem.q.shape[:2], problem.query_tiles)
    return Blocks(counts.expand(shape).contiguous(), indices.expand(*shape, -1).contiguous(), sizes)
