"""Calls on a CPU by the compiled loop of fused.cpp: a query tile's products and softmax never leave its caches."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...features import product_dtype
from ...problem import Problem
from ...selection import LOG2_E
from ...votes import VOTE_BYTES, Tally
from .binding import Call
from .chunks import Lists, flat_lists, key_heads
from .compiled import library, loop
from .memory import fresh
from .tiled import Tiled
from .workers import run_all, worker_threads

WORKERS_FLOPS = 1e8  # of a call, a thread, from which on workers pay
PIECES = 8  # a worker, so that none waits long for the last


def runs(problem: Problem) -> bool:
    """Say whether the loop takes a call: products in float32 on a CPU, where it could be compiled."""
    device = problem.q.device.type
    if problem.mask_ids is not None or problem.v.shape[3] != problem.q.shape[3]:
        return False
    return device == "cpu" and product_dtype(problem.q.dtype, device) == torch.float32 and library() is not None


def way(device: torch.device, dtype: torch.dtype) -> str:
    """How the torch backend computes calls of a device and dtype, in words, and why not by the loop on a CPU."""
    if device.type != "cpu":
        return "gathered tiles"
    if product_dtype(dtype, "cpu") != torch.float32:
        return f"gathered tiles, since the loop has no products of {str(dtype).removeprefix('torch.')}"
    here = loop()
    return f"loop {here.why}" if here.library is not None else f"gathered tiles, since {here.why}"


def attend(problem: Problem, tiled: Tiled, tally: Tally | None, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Output [B * H * NQ, block_q, D] and natural-log LSE, float32 [B * H * NQ, block_q] (empty where not needed).

    Queries, keys and values in float32 or bfloat16; the output in bfloat16 for calls in it, else in float32.
    """
    narrow, loop = problem.q.dtype == torch.bfloat16, library()
    assert loop is not None
    out = fresh(tiled.q.shape, torch.bfloat16 if narrow else torch.float32)
    lse = torch.empty(tiled.q.shape[:-1] if need_lse else (0,))
    keys = flat_lists(problem)
    workers = _workers(problem, keys)
    shared: dict[str, Any] = {
        "q": tiled.q.contiguous(),
        "keys": _packed(loop.pack_keys, tiled.k, workers, (0, loop.panel())),
        "values": _packed(loop.pack_values, tiled.v, workers, (1, loop.panel())),
        "exact_starts": keys.starts,
        "exact_counts": keys.counts,
        "exact": keys.tiles,
        "heads": torch.tensor(key_heads(problem)) * problem.key_tiles,
        "out": out,
        "lse": lse if need_lse else None,
        "query_tiles": problem.query_tiles,
        "key_tiles": problem.key_tiles,
        "rows": problem.block_q,
        "columns": problem.block_k,
        "dim": tiled.q.shape[-1],
        "last_columns": problem.block_k - tiled.tail,
        "scale": tiled.scale * LOG2_E,
        "by_mass": tally is not None and tally.by_mass,
        "narrow_q": tiled.q.dtype == torch.bfloat16,
        "narrow_out": narrow,
    }
    if tiled.log_length is not None:
        means = flat_lists(problem, pooled=True)
        shared |= {
            "key_means": tiled.k_mean, "value_means": tiled.v_mean, "lengths": tiled.log_length * LOG2_E,
            "pooled_starts": means.starts, "pooled_counts": means.counts, "pooled": means.tiles,
        }  # fmt: skip
    if tiled.absent is not None:
        shared["absent"] = torch.zeros(tiled.absent.shape).masked_fill_(tiled.absent, -torch.inf)
    if tiled.t is not None and tiled.t_mean is not None and tiled.frames is not None:
        shared |= {"decay": tiled.t, "mean_decay": tiled.t_mean, "frames": tiled.frames}
    for first, last, of_votes in _ranges(problem, keys, tally):
        call = _call(shared | of_votes)
        step = max(1, -(-(last - first) // (PIECES * workers)))

        def work(start: int, _buffers: Any, call: Call = call, step: int = step, last: int = last) -> None:
            loop.attend(ctypes.byref(call), ctypes.c_int64(start), ctypes.c_int64(min(start + step, last)))

        run_all(work, range(first, last, step), workers)
        if tally is not None:
            _settle(tally, keys, first, last, of_votes["evidence"])
    return out, lse


def _workers(problem: Problem, lists: Lists) -> int:
    """Return how many threads share a call."""
    flops = 4.0 * problem.q.shape[3] * problem.block_q * problem.block_k * int(lists.counts.sum())
    return worker_threads(problem.q.device)[0] if flops >= WORKERS_FLOPS * torch.get_num_threads() else 1


def _packed(pack: Any, x: Tensor, workers: int, padded: tuple[int, int]) -> Tensor:
    """Return tiles [N, block, D] in float32 panels; `padded`: the axis that is padded to a multiple, and of what."""
    axis, multiple = padded
    (tiles, *sizes), x = x.shape, x.contiguous()
    wide = [size + -size % multiple if i == axis else size for i, size in enumerate(sizes)]
    out, narrow = fresh((tiles, *wide), torch.float32), x.dtype == torch.bfloat16
    step = max(1, -(-tiles // workers))

    def work(first: int, _buffers: Any) -> None:
        sizes_of_work = (first, min(first + step, tiles), *sizes, narrow)
        pack(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), *map(ctypes.c_int64, sizes_of_work))

    run_all(work, range(0, tiles, step), workers)
    return out


def _call(values: dict[str, Any]) -> Call:
    """Return the structure; the tensors must outlive it."""
    call = Call()
    for name, value in values.items():
        assert not isinstance(value, Tensor) or value.is_contiguous()
        setattr(call, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return call


def _ranges(problem: Problem, lists: Lists, tally: Tally | None) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Give runs of query tiles, and what votes find of them: few enough to keep that; without votes one run of all."""
    count = len(lists.counts)
    if tally is None:
        yield 0, count, {}
        return
    most, ends = max(1, VOTE_BYTES // (4 * problem.block_q)), lists.counts.cumsum(0)
    first = 0
    while first < count:
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(ends, before + most, right=True)))
        starts = ends - lists.counts - before
        evidence = torch.empty(int(ends[last - 1]) - before, problem.block_q)
        yield first, last, {"evidence": evidence, "evidence_starts": starts}
        first = last


def _settle(tally: Tally, lists: Lists, first: int, last: int, evidence: Tensor) -> None:
    """Settle the votes of a run of query tiles, on lists padded to one length."""
    q_tiles, counts = torch.arange(first, last), lists.counts[first:last]
    longest = int(counts.max())
    if longest == 0:
        return
    column = torch.arange(longest)
    beyond = column >= counts[:, None]
    tiles = lists.padded(q_tiles, longest).masked_fill_(beyond, tally.none)
    entries = ((counts.cumsum(0) - counts)[:, None] + column).clamp_(max=len(evidence) - 1)
    by_tile = evidence[entries.mT].masked_fill_(beyond.mT[:, :, None], 0.0 if tally.by_mass else -torch.inf)
    tally.settle(q_tiles, tiles, by_tile)
