"""A call's arguments checked and made its problem: shapes, dtypes and devices, and values where that waits for nothing.

Lists and orders with wrong values would read memory that isn't there, or leave tokens unwritten.
"""

import os
from typing import Any

import torch
from torch import Tensor

from .bits import word_count
from .cache import StorageCache, capturing, readable
from .csr import check_range
from .errors import BackendUnavailableError
from .features import FrameDecay, wide_dtype
from .precision import PRECISIONS
from .problem import Problem, lists_of
from .tiles import TileLists

BACKENDS = ("auto", "triton", "cudnn", "fa4", "flashinfer", "torch", "gather", "flex", "reference")

SWITCH = "DIT_ACCEL_VALIDATE"
"""Environment variable: 1 checks values in every call on a GPU too, which waits for it."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CHECKED: StorageCache[None] = StorageCache()


def problem_of(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, *, layout: str = "bshd", scale: float | None = None,
    head_scale: Tensor | None = None, frame_decay: FrameDecay | None = None, **features: Any,
) -> Problem:  # fmt: skip
    """The problem of a call's arguments, which are those of `block_sparse_attention`, once they fit each other.

    Raises ValueError or TypeError with the argument and its value where they don't.
    """
    check_tensors(q, k, v, tiles, layout)
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    _check_per_head("head_scale", head_scale, q)
    problem = Problem(
        q=q, k=k, v=v, **tiles.parts, block_q=tiles.block_q, block_k=tiles.block_k,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        heads_first=layout == "bhsd",
        head_scale=None if head_scale is None else head_scale.to(wide_dtype(q.dtype)).reshape(-1, q.shape[1]),
        decay=None if frame_decay is None else (frame_decay.table, frame_decay.q_frames, frame_decay.k_frames),
        **features,
    )  # fmt: skip
    check_features(problem)
    return problem


def check_tensors(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, layout: str) -> None:
    """Shapes, dtypes and devices of q, k, v and the lists, in the caller's layout."""
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f"layout must be 'bshd' or 'bhsd', found {layout!r}")
    _check_qkv(q, k, v)
    axis = 2 if layout == "bshd" else 1
    batch, heads, dim = q.shape[0], q.shape[axis], q.shape[3]
    num_q, num_k = q.shape[3 - axis], k.shape[3 - axis]
    if tuple(k.shape[:3]) != tuple(v.shape[:3]):
        raise ValueError(f"k and v must agree but for the head dim, found {list(k.shape)} and {list(v.shape)}")
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"q and k must share batch and head dim, found {list(q.shape)} and {list(k.shape)} ({layout})")
    if heads % k.shape[axis]:
        raise ValueError(f"key heads must divide query heads, found {k.shape[axis]} and {heads} ({layout})")
    if (tiles.num_q, tiles.num_k) != (num_q, num_k):
        raise ValueError(
            f"tiles are for {tiles.num_q} queries and {tiles.num_k} keys, found {num_q} and {num_k} ({layout}): "
            "build them for these tensors, or check layout"
        )
    if tiles.groups not in (1, heads, batch * heads):
        raise ValueError(f"tiles must hold 1, {heads} (H) or {batch * heads} (B*H) list sets, found {tiles.groups}")
    if tiles.device != q.device:
        raise ValueError(f"tiles are on {tiles.device}, q on {q.device}: use tiles.to({str(q.device)!r})")


def check_features(problem: Problem) -> None:
    """Shapes, dtypes and devices of everything else, and that what belongs together is there."""
    q, device, num_q, num_k = problem.q, problem.q.device, problem.q.shape[2], problem.k.shape[2]
    if problem.backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, found {problem.backend!r}")
    _check_precision(problem)
    _check_per_head("identity_mix", problem.identity_mix, q)
    if problem.identity_mix is not None and problem.identity_mix.requires_grad:
        raise ValueError("identity_mix gets no gradient, found requires_grad=True: detach it")
    batch = q.shape[0]
    _check("key_length", problem.key_length, "an integer tensor", device, (batch,))
    _check("key_mask", problem.key_mask, torch.bool, device, (batch, num_k))
    if problem.decay is not None:
        table, q_frames, k_frames = problem.decay
        _check("frame_decay.table", table, torch.float32, device)
        _check("frame_decay.q_frames", q_frames, torch.int32, device, (num_q,))
        _check("frame_decay.k_frames", k_frames, torch.int32, device, (num_k,))
    for name, tensor in (("token_order", problem.token_order), ("identity_mix", problem.identity_mix)):
        if tensor is not None and num_q != num_k:
            raise ValueError(f"{name} needs self-attention (S_q = S_k), found {num_q} queries and {num_k} keys")
    _check("token_order", problem.token_order, torch.int64, device, (num_q,))
    _check("identity_rows", problem.identity_rows, torch.bool, device, (num_q,))
    if problem.identity_rows is not None and problem.identity_mix is None:
        raise ValueError("identity_rows chooses rows for identity_mix, found no identity_mix: give both")
    if problem.selection is not None:
        if problem.mask_ids is not None:
            raise ValueError("a selection chooses among whole tiles, found tiles with masks inside: give one of both")
        bits = (problem.query_tiles, word_count(problem.key_tiles))
        _check("selection.keep", problem.selection.keep, torch.int32, device, (*q.shape[:2], *bits))
        _check("selection.routed", problem.selection.routed, torch.int32, device, (*q.shape[:2], *bits))
        _check("selection.pinned", problem.selection.pinned, torch.int32, device, bits)
    elif problem.return_tiles:
        raise ValueError("return_tiles tells what a selection chose, found no selection: give one, or read the lists")


def _check_precision(problem: Problem) -> None:
    precision = problem.precision
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be 'int8', 'fp8' or None, found {precision!r}")
    if precision is None:
        return
    if torch.is_grad_enabled() and any(x.requires_grad for x in (problem.q, problem.k, problem.v)):
        raise ValueError(f"precision {precision!r} has no gradient, found requires_grad=True: detach, or leave it out")
    if problem.backend not in ("auto", "triton", "reference"):
        raise BackendUnavailableError(
            f"precision {precision!r} needs backend 'triton' or 'reference', found {problem.backend!r}: leave one out"
        )


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor.shape[3] == 0:
            raise ValueError(f"{name} must have four dimensions, the last at least 1, found {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, found {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"q, k and v must share a device, found {q.device} and {name} on {tensor.device}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must share a dtype, found q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one, such as "
            "k.to(q.dtype); autocast has no part in this call"
        )


KINDS = {
    "floating point": Tensor.is_floating_point,
    "an integer tensor": lambda x: not (x.is_floating_point() or x.dtype == torch.bool),
}


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype | str, device: torch.device, *shapes: Any) -> None:
    """Raise where a tensor that is there has another dtype, or kind of it, none of some shapes or another device."""
    if tensor is None:
        return
    if not (tensor.dtype == dtype if isinstance(dtype, torch.dtype) else KINDS[dtype](tensor)):
        raise TypeError(f"{name} must be {dtype}, found {tensor.dtype}")
    if shapes and tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(str(list(x)) for x in shapes)}, found {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like q, found {tensor.device}")


def _check_per_head(name: str, tensor: Tensor | None, q: Tensor) -> None:
    _check(name, tensor, "floating point", q.device, q.shape[1:2], q.shape[:2])


def check_values(problem: Problem) -> None:
    """Raise ValueError where lists or token order don't fit: on a CPU once until they change, else by `SWITCH`."""
    if torch.compiler.is_compiling():  # the reference alone is traced
        return
    order, device = problem.token_order, problem.q.device
    if readable(device):
        _CHECKED.get(problem.parts.values(), tuple(problem.sizes.values()), lambda: _check_lists(problem))
        if order is not None:
            _CHECKED.get([order], (), lambda: _check_order(order))
    elif os.environ.get(SWITCH) == "1" and not capturing(device):
        _check_lists(problem)
        if order is not None:
            _check_order(order)


def _check_lists(problem: Problem) -> None:
    lists_of(problem).validate()


def _check_order(order: Tensor) -> None:
    """Every token once."""
    tokens = order.numel()
    check_range("token_order", order, 0, tokens - 1, f"{tokens} tokens")
    count = torch.zeros(tokens, dtype=torch.int64, device=order.device).scatter_add_(0, order, torch.ones_like(order))
    if bool((count != 1).any()):
        token = int((count != 1).nonzero()[0])
        raise ValueError(f"token_order must hold every token once, found token {token} {int(count[token])} times")
