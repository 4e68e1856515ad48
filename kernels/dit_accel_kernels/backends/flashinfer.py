"""The flashinfer backend: exact tiles as the lists of FlashInfer's block wrapper, which plans them once.

A plan holds for one tensor of lists and is kept with it, so that only static lists gain by it: calls with a selection
are refused. Lists are by key head. Its LSE is in log2 units and is turned into natural ones.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from ..cache import StorageCache
from ..csr import EXACT
from ..errors import BackendUnavailableError
from ..problem import Problem
from ..states import list_states
from .library import check_call, missing_package, scaled_queries
from .triton.launch import architecture

PACKAGE = "flashinfer-python"
WORKSPACE = 128 << 20  # bytes, as its documentation has it
_PLANS: StorageCache[Any] = StorageCache()


def missing_requirement(device: torch.device, dims: tuple[int, int] = (128, 128)) -> str | None:
    """What this machine lacks for calls of these head dims, or None."""
    if not architecture(device).startswith("sm_"):
        return f"an NVIDIA card from compute capability 8.0 on (found {architecture(device)})"
    if dims[0] != dims[1] or dims[0] not in (64, 128, 256):
        return f"one head dim of 64, 128 or 256 (found {dims[0]} and {dims[1]})"
    return missing_package("flashinfer", PACKAGE)


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of the library's reach, saying why."""
    missing = check_call("flashinfer", problem)
    missing(missing_requirement(problem.q.device, (problem.q.shape[-1], problem.v.shape[-1])))
    if problem.selection is not None:
        raise BackendUnavailableError("backend 'flashinfer' plans lists, which a selection changes in every call")
    if len(problem.q) > 1 or (problem.groups > 1 and problem.q.shape[1] != problem.k.shape[1]):
        missing(f"one batch row, and lists that heads share where they share keys (found {list(problem.q.shape)})")


@torch.no_grad()
def attend(problem: Problem) -> tuple[Tensor, Tensor, None, None]:
    """Output [1, H, S_q, D], natural-log LSE float32 [1, H, S_q]; no exact tiles, no votes."""
    check(problem)
    parts, key = (problem.exact_offsets, problem.exact_indices), (*problem.q.shape, problem.q.dtype, problem.scale)
    wrapper = _PLANS.get(parts, key, lambda: _planned(problem))
    tensors = [x[0].contiguous() for x in (scaled_queries(problem), problem.k, problem.v)]
    out, lse = wrapper.run(*tensors, return_lse=True)
    empty = (list_states(problem) < EXACT).all(-1).repeat_interleave(problem.block_q, -1)[..., : problem.num_q]
    lse = (lse.reshape(1, *tensors[0].shape[:2]) * math.log(2.0)).masked_fill(empty, -torch.inf)
    return out[None].masked_fill(empty[..., None], 0), lse, None, None


def _planned(problem: Problem) -> Any:
    """A wrapper with the lists of a call, its key tiles of every key head."""
    heads, key_heads, device = problem.q.shape[1], problem.k.shape[1], problem.q.device
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = importlib.import_module("flashinfer").VariableBlockSparseAttentionWrapper(workspace)
    exact = (list_states(problem)[0] >= EXACT).expand(key_heads, -1, -1).contiguous()
    rows, columns = (
        torch.full((key_heads, -(-tokens // side)), side, dtype=torch.int32, device=device)
        for tokens, side in ((problem.num_q, problem.block_q), (problem.num_k, problem.block_k))
    )
    rows[:, -1] -= -problem.num_q % problem.block_q
    columns[:, -1] -= -problem.num_k % problem.block_k
    wrapper.plan(
        exact, rows, columns, heads, key_heads, problem.q.shape[-1], sm_scale=problem.scale,
        q_data_type=problem.q.dtype, non_blocking=False,
    )  # fmt: skip
    return wrapper
