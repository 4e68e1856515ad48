"""The fa4 backend: exact tiles as FlashAttention-4's block-sparse lists, all others on top by our Triton kernel.

Tiles whose keys are all valid are its full blocks, which no mask touches. Tiles with invalid keys are partial blocks,
and so are those that only one of two query tiles lists which it takes together: `mask_mod` reads the lists as bits and
the valid keys. Scales of heads and frame decay are its `score_mod`. The triton backend's kernels go on from its output
and LSE: with pooled tiles and those with a mask inside, as one softmax, and with gradients.
"""

import importlib
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bits import pack_bits
from ..cache import StorageCache, capturing
from ..csr import EXACT, padded_rows
from ..features import decay_by_frame, last_frame
from ..problem import Problem
from ..sections import valid_tiles
from ..states import list_states, resolved
from .library import DTYPES, check_call, missing_package
from .rows import moves_in_pieces
from .triton.launch import architecture
from .triton.support import missing_requirement as triton_requirement

PACKAGE, FUNCTION = "flash-attn-4", "flash_attn_func"
MODIFIERS = f"{__package__}.fa4_modifiers"  # which needs the package
MAX_DIM = 128
TILE = 128  # keys of its blocks, and queries on sm_90
TILES = ((TILE, TILE), (2 * TILE, TILE))  # queries and keys of ours


class ListedBlocks(NamedTuple):
    """Lists as FlashAttention-4 takes them: counts int32 [B or 1, H or 1, M], indices int32 [.., M, N], ascending.

    M counts its query blocks; N is the longest row's length. `seen` is int32 [B or 1, H or 1, NQ, W], our tiles as
    bits, or None where no block is partial. `empty` is bool [B or 1, H or 1, NQ], the query tiles without an exact key,
    or None where each has one.
    """

    partial_counts: Tensor
    partial_indices: Tensor
    full_counts: Tensor
    full_indices: Tensor
    seen: Tensor | None
    empty: Tensor | None


_BLOCKS: StorageCache[ListedBlocks] = StorageCache()
_DECAYS: StorageCache[tuple[Tensor, Tensor]] = StorageCache()


def missing_requirement(
    device: torch.device, dtype: torch.dtype | None = None, dim: int | None = None, tile: tuple[int, int] | None = None
) -> str | None:
    """What the fa4 backend would need here and does not find, or None; dtype, dim and tile None: any it supports."""
    if dtype is not None and dtype not in DTYPES:
        return f"bfloat16 or float16 (found {dtype})"
    if dim is not None and (dim % 8 or dim > MAX_DIM):
        return f"a head dim that is a multiple of 8 up to {MAX_DIM} (found {dim})"
    if tile is not None and tile not in TILES:
        return f"tiles of 128 or 256 queries x 128 keys (found {tile[0]} x {tile[1]})"
    arch = architecture(device)
    if not arch.startswith(("sm_9", "sm_10", "sm_11")):
        traps = {"sm_8": "drops the lists in silence and is dense", "sm_1": "has no block sparsity"}
        trap = f", where {PACKAGE} {traps[arch[:4]]}" if arch[:4] in traps else ""
        return f"a card of sm_90 or sm_100 (found {arch}{trap})"
    package = missing_package("flash_attn.cute.interface", PACKAGE, FUNCTION, "--pre ")
    return package or triton_requirement(device, dtype, dim)


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of the backend's reach, saying why."""
    missing = check_call("fa4", problem, only="votes")
    dim, dim_v = problem.q.shape[-1], problem.v.shape[-1]
    if dim != dim_v:
        missing(f"v with the head dim of q and k (found {dim_v} and {dim})")
    missing(missing_requirement(problem.q.device, problem.q.dtype, dim, (problem.block_q, problem.block_k)))


def rows_joined(device: torch.device, block_q: int) -> int:
    """Query tiles that FlashAttention-4 takes together: its blocks have 128 queries on sm_90 and 256 on newer cards."""
    return 1 if architecture(device).startswith("sm_9") else 2 * TILE // block_q


@torch.no_grad()
def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q] (empty where not asked for), exact tiles; no votes.

    The problem is in tiled order. A selection is turned into lists, which reads their length from the device.
    """
    check(problem)
    problem, exact = resolved(problem)
    more = problem.pooled_indices is not None or problem.mask_ids is not None
    out, lse = _exact_tiles(problem, need_lse=problem.return_lse or more)
    if more:
        out, lse = importlib.import_module(".triton.attend", __package__).add_rest(problem, out, lse)
    if lse is None or not problem.return_lse:
        lse = out.new_empty(0, dtype=torch.float32)
    return out, lse, exact, None


def _exact_tiles(problem: Problem, *, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention to whole exact tiles alone: output [B, H, S_q, D], LSE or None; 0 and -inf in rows without a key."""
    q = problem.q
    blocks, joined = _blocks_of(problem), rows_joined(q.device, problem.block_q)
    tensors = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch(
        mask_block_cnt=blocks.partial_counts,
        mask_block_idx=blocks.partial_indices,
        full_block_cnt=blocks.full_counts,
        full_block_idx=blocks.full_indices,
        block_size=(problem.block_q * joined, problem.block_k),
    )
    out, lse = getattr(importlib.import_module("flash_attn.cute.interface"), FUNCTION)(
        *(_tokens_first(x) for x in (q, problem.k, problem.v)),
        softmax_scale=problem.scale,
        pack_gqa=False,  # it would put several heads into one block of queries
        block_sparse_tensors=tensors,
        return_lse=need_lse,
        **_modifiers(problem, blocks.seen),
    )
    out = out.transpose(1, 2)
    if blocks.empty is not None:
        empty = blocks.empty.repeat_interleave(problem.block_q, -1)[..., : q.shape[2]]
        out = out.masked_fill(empty[..., None], 0)
        lse = None if lse is None else lse.masked_fill(empty, -torch.inf)
    return out, lse


def _tokens_first(x: Tensor) -> Tensor:
    """[B, S, H, D] of [B, H, S, D], copied only where rows can't be moved in pieces of 16 bytes."""
    x = x.transpose(1, 2)
    return x if moves_in_pieces(x) else x.contiguous()


def _modifiers(problem: Problem, seen: Tensor | None) -> dict[str, Any]:
    """Our functions of single logits and the tensors that they read: the mask's, heads' factors, those of decay."""
    modifiers: dict[str, Any] = {}
    tensors: list[Tensor] = []
    scores: list[str] = []
    batch, heads = problem.q.shape[:2]
    if seen is not None:  # bits and valid keys, uint8 [B, S_k], of every batch and head
        modifiers["mask_mod"] = importlib.import_module(MODIFIERS).MASKS[problem.block_q]
        valid = seen.new_ones(1, 1) if problem.key_valid is None else problem.key_valid
        tensors += [seen.expand(batch, heads, -1, -1), valid.to(torch.uint8).expand(batch, problem.num_k)]
    if problem.head_scale is not None:
        scores.append("scaled")
        tensors.append(problem.head_scale.float().expand(batch, heads).contiguous())
    if problem.decay is not None:
        scores.append("decayed")
        tensors += _decay_tensors(*problem.decay)
    if scores:
        modifiers["score_mod"] = getattr(importlib.import_module(MODIFIERS), "_and_".join(scores))
    return {**modifiers, "aux_tensors": tensors or None}


def _decay_tensors(table: Tensor, q_frames: Tensor, k_frames: Tensor) -> tuple[Tensor, Tensor]:
    """What `score_mod` reads: t by frame of the queries, float32 [F + 2, S_k], and each query's row in it, int32."""

    def build() -> tuple[Tensor, Tensor]:
        t, rows = decay_by_frame(table, q_frames, k_frames, last_frame(q_frames))
        return t, rows.to(torch.int32)

    return _DECAYS.get((table, q_frames, k_frames), (), build)


def _blocks_of(problem: Problem) -> ListedBlocks:
    """The blocks of a call, remembered with its lists and valid keys."""
    parts = (problem.exact_offsets, problem.exact_indices, problem.mask_ids)
    key = (problem.q.shape, problem.k.shape, problem.block_q, problem.block_k)
    return _BLOCKS.get(parts, key, lambda: _blocks(problem), loose=[problem.key_valid])


def _blocks(problem: Problem) -> ListedBlocks:
    exact = list_states(replace(problem, pooled_offsets=None, pooled_indices=None)) == EXACT
    whole, joined = exact, rows_joined(problem.q.device, problem.block_q)
    if problem.key_valid is not None:
        all_valid, any_valid = valid_tiles(problem.key_valid, problem.block_k)
        exact = exact & any_valid[:, None, None]
        whole = exact & all_valid[:, None, None]
    lacking = -exact.shape[2] % joined  # rows beyond the end are like the last one
    some, every = (torch.cat([x, x[:, :, -1:].expand(-1, -1, lacking, -1)], 2) for x in (exact, whole))
    some, every = some.unflatten(2, (-1, joined)).any(3), every.unflatten(2, (-1, joined)).all(3)
    empty = ~exact.any(-1)
    masked = joined > 1 or problem.key_valid is not None
    read = problem.key_valid is None and not capturing(empty.device)  # once for lists, never for masks
    return ListedBlocks(
        *padded_rows(some & ~every, read),
        *padded_rows(every, read),
        seen=pack_bits(exact) if masked else None,
        empty=None if read and not bool(empty.any()) else empty,
    )
