"""Calls on a CPU by the compiled loop of fused.cpp: a query tile's products and softmax never leave its caches."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from ...features import product_dtype
from ...problem import Problem
from ...selection import LOG2_E
from ...votes import VOTE_BYTES, Tally
from ..rows import with_whole_rows
from . import compiled
from .chunks import Lists, beyond, flat_lists
from .compiled import STRIDES, LoopCall, compiled_loop
from .memory import LEAST_BYTES, buffer, cast, fresh
from .tiled import decays, pools

START_FLOPS = 5e5  # what a thread computes while one more joins in
PACK_FLOPS = 25  # what it computes while a number is packed
SLICE = 0.5  # seconds after which the loop comes back to Python, which looks for signals, and goes on


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the loop takes calls: on a CPU, in products that it has, where it could be compiled."""
    return device.type == "cpu" and compiled_loop().library is not None and _has_products(dtype)


def _has_products(dtype: torch.dtype) -> bool:
    """Whether the loop multiplies a dtype: what is multiplied in float32, and bfloat16, whose logits torch rounds."""
    return dtype == torch.bfloat16 or product_dtype(dtype, "cpu") == torch.float32


def way(device: torch.device, dtype: torch.dtype) -> str:
    """How the torch backend computes calls of a device and dtype, in words, and why not by the loop on a CPU."""
    if device.type != "cpu":
        return "gathered tiles"
    here = compiled_loop()
    if here.library is None:
        return f"gathered tiles, since {here.why}"
    if _has_products(dtype):
        return f"loop {here.why}"
    return f"gathered tiles, since the loop has no products of {str(dtype).removeprefix('torch.')}"


def attend_by_loop(problem: Problem, tally: Tally | None) -> tuple[Tensor, Tensor]:
    """Output [B, H, S_q, D] as the call's layout has it and natural-log LSE, float32 [B, H, S_q] (empty: not needed).

    Queries, keys and values are read where they lie, in float32 or bfloat16; other dtypes are widened first.
    """
    built = compiled_loop().library
    assert built is not None
    narrow, even = problem.q.dtype == torch.bfloat16, problem.q.shape[3] % 2 == 0
    pairs = narrow and even and bool(built.has_pairs()) and product_dtype(problem.q.dtype, "cpu") != torch.float32
    q, k, v = (x if narrow else cast(x, torch.float32) for x in (problem.q, problem.k, problem.v))
    q, k, v = map(with_whole_rows, (q, k, v))
    (batch, heads, num_q, dim), (_, key_heads, num_k, value_dim) = q.shape, v.shape
    axes = (heads, num_q) if problem.heads_first else (num_q, heads)
    out = problem.in_layout(fresh((batch, *axes, value_dim), q.dtype))
    lse = torch.empty((batch, heads, num_q) if problem.return_lse else (0,))
    wide, wide_dim = (size + -size % built.panel() for size in (problem.block_k, value_dim))
    key_tiles, each, multiple = batch * key_heads * problem.key_tiles, *((2, built.tile_words()) if pairs else (1, 1))
    depth, value_depth = dim // each, wide // each if multiple > 1 else -(-problem.block_k // each)
    tiles = batch * heads / problem.exact_offsets.shape[0] * problem.exact_indices.numel()
    threads = _threads(2.0 * (dim + value_dim) * problem.block_q * problem.block_k * tiles)
    shared: dict[str, Any] = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse if problem.return_lse else None,
        "keys": _panels("keys", (key_tiles, wide, depth + -depth % multiple)),
        "values": _panels("values", (key_tiles, wide_dim, value_depth)),
        "groups": problem.groups,
        "batch": batch, "heads": heads, "key_heads": key_heads, "num_q": num_q, "num_k": num_k,
        "rows": problem.block_q, "columns": problem.block_k, "dim": dim, "value_dim": value_dim,
        "by_mass": tally is not None and tally.by_mass, "narrow": narrow, "pairs": pairs,
        "parallel": compiled.torchs_threads(), "team": torch.get_num_threads(), "threads": threads,
        "scale": problem.scale * LOG2_E, "seconds": SLICE,
    }  # fmt: skip
    shared |= _features(problem, k, v)
    call = _call(shared)
    call.threads = min(threads, _threads(float(PACK_FLOPS * (k.numel() + v.numel()))))
    _finish(built.pack, call, 0, key_tiles)
    call.threads = threads
    if tally is None:
        _finish(built.attend, call, 0, batch * heads * problem.query_tiles)
    else:
        _attend_and_vote(built.attend, call, problem, tally)
    return cast(out, problem.q.dtype), lse


def _features(problem: Problem, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What a call has beside queries, keys and values."""
    found: dict[str, Any] = {
        "exact_offsets": problem.exact_offsets, "exact": problem.exact_indices, "valid": problem.key_valid,
        "pooled_offsets": problem.pooled_offsets, "pooled": problem.pooled_indices,
        "mask_ids": problem.mask_ids, "mask_bits": problem.mask_bits,
    }  # fmt: skip
    if problem.mask_ids is not None:
        found["odd"] = torch.empty(k.shape[0] * k.shape[1] * problem.key_tiles, dtype=torch.bool)
    if problem.head_scale is not None:
        found["head_scale"] = problem.head_scale.expand(len(k), -1)
    if problem.pooled_indices is not None:
        found["key_means"], found["value_means"], log_length = pools(problem, k.float(), v.float())
        found["lengths"] = log_length * LOG2_E
    if problem.decay is not None:
        found["decay"], found["mean_decay"], found["frames"] = decays(problem, torch.float32)
    return {name: x.contiguous() for name, x in found.items() if x is not None}


def _panels(name: str, shape: tuple[int, ...]) -> Tensor:
    """Memory that the loop fills: in small calls what the last one had, since new pages take longer than filling it."""
    if 4 * math.prod(shape) >= LEAST_BYTES:
        return fresh(shape, torch.float32)
    return buffer(name, torch.empty(0), shape)


def _threads(flops: float) -> int:
    """How many threads share so much work, whatever the machine has: each takes time to start.

    flops / n + n * START_FLOPS is least at the root.
    """
    return max(1, min(torch.get_num_threads(), int(math.sqrt(flops / START_FLOPS))))


def _call(values: dict[str, Any]) -> LoopCall:
    """The structure of a call; the tensors must outlive it."""
    call = LoopCall()
    for name, value in values.items():
        setattr(call, name, value.data_ptr() if isinstance(value, Tensor) else value)
    for name in STRIDES:
        setattr(call, name, values[name.removesuffix("_strides")].stride()[:3])
    return call


def _finish(function: Any, call: LoopCall, first: int, last: int) -> None:
    """Do the pieces of a call from `first` to `last` by a function of the loop."""
    call.next, call.end = first, last
    while call.next < last:
        function(ctypes.byref(call))


def _attend_and_vote(function: Any, call: LoopCall, problem: Problem, tally: Tally) -> None:
    """Attend from runs of query tiles, few enough to keep what votes go by, and settle each run's votes."""
    lists = flat_lists(problem)
    most, ends, first = max(1, VOTE_BYTES // (4 * problem.block_q)), lists.counts.cumsum(0), 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(ends, before + most, right=True)))
        starts = ends - lists.counts - before
        evidence = torch.empty(int(ends[last - 1]) - before, problem.block_q)
        call.evidence_starts, call.evidence = starts.data_ptr(), evidence.data_ptr()
        _finish(function, call, first, last)
        _settle(tally, lists, first, last, evidence)
        first = last


def _settle(tally: Tally, lists: Lists, first: int, last: int, evidence: Tensor) -> None:
    """Settle the votes of a run of query tiles, on lists padded to one length."""
    q_tiles, counts = torch.arange(first, last), lists.counts[first:last]
    longest = int(counts.max())
    if longest == 0:
        return
    padding = beyond(counts, longest)
    tiles = lists.padded(q_tiles, longest).masked_fill_(padding, tally.none)
    entries = ((counts.cumsum(0) - counts)[:, None] + torch.arange(longest)).clamp_(max=len(evidence) - 1)
    by_tile = evidence[entries.mT].masked_fill_(padding.mT[:, :, None], 0.0 if tally.by_mass else -torch.inf)
    tally.settle(q_tiles, tiles, by_tile)
