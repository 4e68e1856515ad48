"""The flashinfer backend: exact tiles as the lists of FlashInfer's block wrapper, which plans them once.

A plan, four bytes for every listed key, is kept with the lists: calls with a selection are refused. Its lists are those
of key heads: the batch is folded into heads, keys are repeated where heads that share them have lists of their own.
"""

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import StorageCache, capturing
from ..csr import EXACT
from ..errors import BackendUnavailableError
from ..problem import Problem
from ..states import list_states
from .library import check_call, missing_package, scaled_queries, tile_sizes
from .triton.launch import architecture

PACKAGE, WRAPPER = "flashinfer-python", "VariableBlockSparseAttentionWrapper"
WORKSPACE = 128 << 20  # bytes, as its documentation has it
MOST_KEYS = 2**31 - 1  # that a plan counts


class Plan(NamedTuple):
    """A wrapper with the lists of a call, and which queries see no key: bool [B or 1, H or 1, S_q]."""

    wrapper: Any
    empty: Tensor


_PLANS: StorageCache[Plan] = StorageCache()


def missing_requirement(device: torch.device, dims: tuple[int, int] = (128, 128)) -> str | None:
    """What this machine lacks for calls of these head dims, or None."""
    arch = architecture(device)
    if not arch.startswith(("sm_8", "sm_9", "sm_1")):
        return f"an NVIDIA card from compute capability 8.0 on (found {arch})"
    if dims[0] != dims[1] or dims[0] not in (64, 128, 256):
        return f"one head dim of 64, 128 or 256 (found {dims[0]} and {dims[1]})"
    return missing_package("flashinfer", PACKAGE, WRAPPER)


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of the library's reach, saying why."""
    missing = check_call("flashinfer", problem)
    missing(missing_requirement(problem.q.device, (problem.q.shape[-1], problem.v.shape[-1])))
    if problem.selection is not None:
        raise BackendUnavailableError("backend 'flashinfer' plans lists, which a selection changes: use 'auto'")


@torch.no_grad()
def attend(problem: Problem) -> tuple[Tensor, Tensor, None, None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q]; no exact tiles, no votes."""
    check(problem)
    q, k, v = scaled_queries(problem), problem.k, problem.v
    parts, key = (problem.exact_offsets, problem.exact_indices), (*q.shape, *k.shape, q.dtype, problem.scale)
    wrapper, empty = _PLANS.get(parts, key, lambda: _planned(problem))
    if problem.groups > 1 and q.shape[1] > k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out, lse = wrapper.run(*(x.flatten(0, 1) for x in (q, k, v)), return_lse=True)
    out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2]) * math.log(2.0)
    return out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf), None, None


def _planned(problem: Problem) -> Plan:
    device, (batch, heads, _, dim) = problem.q.device, problem.q.shape
    key_heads = heads if problem.groups > 1 else problem.k.shape[1]
    exact = list_states(problem) >= EXACT
    empty = ~exact.any(-1)
    exact[..., 0] |= empty  # it gets no row without keys; what it gives of these is masked
    exact = exact.expand(batch, key_heads, -1, -1).flatten(0, 1)
    if capturing(device) or int(exact.sum(dtype=torch.int64)) * problem.block_k > MOST_KEYS:
        raise BackendUnavailableError("backend 'flashinfer' plans nothing inside a graph, nor 2^31 keys: use 'auto'")
    sides = ((problem.num_q, problem.block_q), (problem.num_k, problem.block_k))
    rows, columns = (tile_sizes(*side, device).expand(len(exact), -1) for side in sides)
    try:
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        wrapper = getattr(importlib.import_module("flashinfer"), WRAPPER)(workspace)
        wrapper.plan(
            exact, rows, columns, batch * heads, len(exact), dim, sm_scale=problem.scale, q_data_type=problem.q.dtype,
            non_blocking=False,
        )  # fmt: skip
    except RuntimeError as error:  # out of memory too: other kernels need none for lists
        why = " ".join(str(error).split())[:200]
        raise BackendUnavailableError(f"backend 'flashinfer' plans no such lists ({why}): use 'auto'") from error
    return Plan(wrapper, empty.repeat_interleave(problem.block_q, -1)[..., : problem.num_q])
