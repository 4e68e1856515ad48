"""The flex backend: torch's compiled FlexAttention over the same tiles, a rival and an independent check.

Exact tiles are FlexAttention's blocks, full ones where all keys are valid and no mask is inside. The means of all key
tiles stand before the keys as columns of their own, padded to whole blocks; `mask_mod` says which of them a query tile
sees, `score_mod` adds the log of their true lengths and has the decay. Tensors reach both as arguments of one compiled
function, so that new lists and masks compile nothing anew; a new shape, or another set of features, does.
"""

import importlib.util
import os
import shutil
import sys
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..cache import StorageCache
from ..csr import EXACT, POOLED, padded_rows
from ..errors import BackendUnavailableError
from ..features import decay_by_frame, tile_means
from ..masks import seen_by_mask
from ..problem import Problem, by_head, lists_of
from ..sections import valid_tiles
from ..states import list_states, resolved


class FlexBlocks(NamedTuple):
    """Tile lists as FlexAttention's padded rows: counts int32 [B or 1, H or 1, NQ], indices int32 [.., NQ, P + NK].

    P blocks of pooled columns come before the key tiles. `seen` is bool [.., NQ, P * block_k + NK]: every pooled column
    and key tile that a query tile sees, or None where all blocks are full. `masks`: int64 [.., NQ, P * block_k + NK],
    numbers of masks in the bits beside them, those of TileLists and others that let all through; None without any.
    """

    partial_counts: Tensor
    partial_indices: Tensor
    full_counts: Tensor
    full_indices: Tensor
    seen: Tensor | None
    masks: tuple[Tensor, Tensor] | None


class Columns(NamedTuple):
    """Keys and values with P * block_k pooled columns before them, [B, H, C, D], and what is known of the columns.

    `valid` bool [B, C]; `bias` float32 [B or 1, C], the log of a pooled column's length, 0 for tokens; `decay`:
    float32 [F + 2, C], by query frame, and int64 [S_q], each query's row in it. None where a call has none.
    """

    k: Tensor
    v: Tensor
    valid: Tensor | None
    bias: Tensor | None
    decay: tuple[Tensor, Tensor] | None


MadeFor = tuple[int, int, int, float, bool]
"""What one compiled function is made for beside shapes: block_q, block_k, pooled columns, scale, LSE or not."""

_blocks_of_lists: StorageCache[FlexBlocks] = StorageCache()


def check(problem: Problem) -> None:
    """Raise BackendUnavailableError where this machine or this call is out of FlexAttention's reach, saying why."""
    sides = f"block_q {problem.block_q} and block_k {problem.block_k}, which are not powers of 2 of at least 16"
    unsupported = {
        "votes": problem.votes,
        "LSE on a CPU": problem.return_lse and problem.q.device.type == "cpu",
        "float64": problem.q.dtype == torch.float64,
        sides: any(side < 16 or side & (side - 1) for side in (problem.block_q, problem.block_k)),
    }
    reasons = [reason for reason, applies in unsupported.items() if applies]
    if reasons:
        raise BackendUnavailableError(f"backend 'flex' has no {' and no '.join(reasons)}: use 'torch' or 'auto'")
    if missing := missing_requirement(problem.q.device.type):
        raise BackendUnavailableError(f"backend 'flex' compiles and needs {missing}: install it or use 'auto'")


def missing_requirement(device_type: str) -> str | None:
    """What FlexAttention would need on this device type and this machine lacks, or None."""
    if device_type == "cpu":
        names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return f"a CPU with AVX2 (found {torch.backends.cpu.get_cpu_capability()})"
        return None if any(shutil.which(name) for name in names) else f"a C++ compiler ({', '.join(names)})"
    return None if importlib.util.find_spec("triton") else "the triton package"


@torch.no_grad()
def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, None]:
    """Output [B, H, S_q, D], natural-log LSE float32 [B, H, S_q] (empty where not needed), exact tiles; no votes."""
    check(problem)
    pools = problem.may_pool  # one graph whether or not this call happens to
    problem, exact = resolved(problem)
    q = problem.q.detach()  # FlexAttention on a CPU refuses what requires a gradient
    if problem.head_scale is not None:
        q = (q * problem.head_scale[:, :, None, None]).to(q.dtype)
    pooled = -(-problem.key_tiles // problem.block_k) * problem.block_k if pools else 0
    key = (q.shape, *problem.sizes.values())
    make = partial(_blocks, problem, pooled)
    blocks = _blocks_of_lists.get(problem.parts.values(), key, make, loose=[problem.key_valid])
    made_for = (problem.block_q, problem.block_k, pooled, problem.scale, problem.return_lse)
    with torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        out, lse = _compiled()(q, _columns(problem, pooled), blocks, made_for)
    empty = (blocks.partial_counts + blocks.full_counts == 0).repeat_interleave(problem.block_q, -1)[..., : q.shape[2]]
    lse = q.new_empty(0, dtype=torch.float32) if lse is None else lse.masked_fill(empty, -torch.inf)
    return out.masked_fill(empty[..., None], 0), lse, exact, None


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """One graph for each shape and set of features; a call that can't be one graph is an error."""
    return torch.compile(_compilable, dynamic=False, fullgraph=True)


def _compilable(q: Tensor, columns: Columns, blocks: FlexBlocks, made_for: MadeFor) -> tuple[Tensor, Tensor | None]:
    if not torch.compiler.is_dynamo_compiling():  # the eager FlexAttention reads no lists and would be dense
        raise BackendUnavailableError(
            "backend 'flex' needs torch.compile, which is switched off: use 'torch' or 'auto'"
        )
    return flex_call(q, columns, blocks, made_for)


def flex_call(q: Tensor, columns: Columns, blocks: FlexBlocks, made_for: MadeFor) -> tuple[Tensor, Tensor | None]:
    """FlexAttention's output and LSE (None where not needed); rows without a key are left to the caller.

    Not compiled, FlexAttention is dense and reads `mask_mod` alone, which says all there is to say if `seen` is given.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    block_q, block_k, pooled, scale, need_lse = made_for
    k, v, valid, bias, decay = columns
    seen, masks = blocks.seen, blocks.masks

    def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, column: Tensor) -> Tensor:
        assert seen is not None
        tile = torch.where(column < pooled, column, pooled + (column - pooled) // block_k)
        place = (b % seen.shape[0], h % seen.shape[1], q_index // block_q, tile)
        keep = seen[place]
        if masks is not None:
            numbers, bits = masks
            key = (column - pooled) % block_k  # of no meaning in pooled columns, which have no mask
            keep = keep & seen_by_mask(bits, numbers[place], q_index % block_q, key)
        return keep if valid is None else keep & valid[b, column]

    def score_mod(x: Tensor, b: Tensor, h: Tensor, q_index: Tensor, column: Tensor) -> Tensor:
        if decay is not None:
            t, t_rows = decay
            x = torch.minimum(x, x * t[t_rows[q_index], column])
        return x if bias is None else x + bias[b % bias.shape[0], column]

    mask = BlockMask.from_kv_blocks(
        *blocks[:4], BLOCK_SIZE=(block_q, block_k), mask_mod=None if seen is None else mask_mod,
        seq_lengths=(q.shape[2], k.shape[2]), compute_q_blocks=False,
    )  # fmt: skip
    attention: Any = flex_attention  # its overloads take a literal return_lse
    results = attention(
        q, k, v, block_mask=mask, score_mod=None if bias is None and decay is None else score_mod, scale=scale,
        enable_gqa=k.shape[1] != q.shape[1], kernel_options=_kernel_options(q, block_q, block_k), return_lse=need_lse,
    )  # fmt: skip
    return results if need_lse else (results, None)


def _kernel_options(q: Tensor, block_q: int, block_k: int) -> dict[str, Any]:
    """What FlexAttention must not choose by itself: its kernels for few queries, which split keys by other rules.

    On a CPU that kernel is taken where PARTITION_SIZE is a multiple of block_k. On a GPU, BLOCK_M and BLOCK_N must
    divide the tiles, and left to itself it takes up to 128.
    """
    if q.device.type == "cpu":
        return {"PARTITION_SIZE": 1}
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True}
    if block_q < 128:
        options["BLOCK_M"] = block_q
    if block_k < 128:
        options["BLOCK_N"] = block_k if q.shape[3] <= 128 and q.dtype != torch.float32 else min(block_k, 32)
    return options


def _blocks(problem: Problem, pooled: int) -> FlexBlocks:
    """The call's lists as blocks: exact tiles are full where all their keys are valid, absent where none is."""
    states = list_states(problem)
    exact = states >= EXACT
    means = torch.zeros(*exact.shape[:3], pooled, dtype=torch.bool, device=exact.device)
    if pooled:
        means[..., : problem.key_tiles] = states == POOLED
    whole = states == EXACT
    if problem.key_valid is not None:
        all_valid, any_valid = (x[:, None, None] for x in valid_tiles(problem.key_valid, problem.block_k))
        exact = exact & any_valid
        whole = whole & all_valid
        means = means & pad(any_valid, (0, pooled - problem.key_tiles))
    mean_blocks = means.unflatten(-1, (pooled // problem.block_k, problem.block_k)).any(-1)
    partial = torch.cat([mean_blocks, exact & ~whole], -1)
    full = torch.cat([torch.zeros_like(mean_blocks), whole], -1)
    seen = masks = None
    if pooled or problem.key_valid is not None or problem.mask_ids is not None:
        seen = torch.cat([means, exact], -1)
    if seen is not None and problem.mask_ids is not None:
        numbers, bits = lists_of(problem).mask_table()
        numbers = by_head(pad(numbers, (pooled, 0), value=len(bits) - 1), problem.q.shape[1]).expand_as(seen)
        masks = numbers, bits
    return FlexBlocks(*padded_rows(partial), *padded_rows(full), seen, masks)


def _columns(problem: Problem, pooled: int) -> Columns:
    """Keys and values with the tiles' means before them, where a call has pooled tiles, and what score_mod reads."""
    k, v, valid, block = problem.k.detach(), problem.v.detach(), problem.key_valid, problem.block_k
    spare = pooled - problem.key_tiles
    means = bias = decay = None
    if pooled:
        weight = None if valid is None else valid[:, None]
        means, (length, _) = zip(*(tile_means(x, block, weight) for x in (k, v)), strict=True)
        bias = pad(length.clamp(min=1).log().reshape(-1, problem.key_tiles), (0, spare + k.shape[2]))
    if problem.decay is not None:
        t, t_rows = decay_by_frame(*problem.decay)
        if pooled:
            t = torch.cat([pad(tile_means(t[..., None], block, None)[0][..., 0], (0, spare)), t], -1)
        decay = t, t_rows
    if valid is not None:  # 0 * inf is not 0: what an invalid key holds must not matter
        k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (k, v))
        valid = pad(valid, (pooled, 0), value=True)
    if means is not None:
        k, v = (torch.cat([pad(mean, (0, 0, 0, spare)), x], 2) for mean, x in zip(means, (k, v), strict=True))
    return Columns(k, v, valid, bias, decay)
