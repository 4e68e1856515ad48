"""Argument checks of the attention call: shapes, dtypes and devices, never values, so that no device ever syncs."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel_kernels.features import FrameDecay
from dit_accel_kernels.selection import Selection, words_of
from dit_accel_kernels.tiles import TileLists

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: TileLists,
    *,
    layout: str,
    head_scale: Tensor | None,
    key_length: Tensor | None,
    key_mask: Tensor | None,
    frame_decay: FrameDecay | None,
    token_order: Tensor | None,
    identity_mix: Tensor | None,
    identity_rows: Tensor | None,
    selection: Selection | None,
    return_tiles: bool,
) -> None:
    """Raise ValueError or TypeError, naming what was asked and found, unless the arguments fit each other."""
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f"layout must be 'bshd' or 'bhsd', found {layout!r}")
    _check_qkv(q, k, v)
    axis = 2 if layout == "bshd" else 1
    batch, heads, dim = q.shape[0], q.shape[axis], q.shape[3]
    num_q, num_k = q.shape[3 - axis], k.shape[3 - axis]
    if tuple(k.shape) != tuple(v.shape):
        raise ValueError(f"k and v must have one shape, found {list(k.shape)} and {list(v.shape)}")
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
    _check_per_head("head_scale", head_scale, batch, heads, q.device)
    _check_per_head("identity_mix", identity_mix, batch, heads, q.device)
    _check_keys(key_length, key_mask, batch, num_k, q.device)
    if frame_decay is not None:
        _check("frame_decay.table", frame_decay.table, None, torch.float32, q.device)
        _check("frame_decay.q_frames", frame_decay.q_frames, (num_q,), torch.int32, q.device)
        _check("frame_decay.k_frames", frame_decay.k_frames, (num_k,), torch.int32, q.device)
    for name, tensor in (("token_order", token_order), ("identity_mix", identity_mix)):
        if tensor is not None and num_q != num_k:
            raise ValueError(f"{name} needs self-attention (S_q = S_k), found {num_q} queries and {num_k} keys")
    _check("token_order", token_order, (num_q,), torch.int64, q.device)
    _check("identity_rows", identity_rows, (num_q,), torch.bool, q.device)
    if identity_rows is not None and identity_mix is None:
        raise ValueError("identity_rows chooses rows for identity_mix, found no identity_mix: give both")
    if selection is not None:
        _check_selection(selection, tiles, batch, heads, q.device)
    elif return_tiles:
        raise ValueError("return_tiles tells what a selection chose, found no selection: give one, or read the lists")


def _check_selection(selection: Selection, tiles: TileLists, batch: int, heads: int, device: torch.device) -> None:
    bits = (tiles.query_tiles, words_of(tiles.key_tiles))
    _check("selection.keep", selection.keep, (batch, heads, *bits), torch.int32, device)
    _check("selection.routed", selection.routed, (batch, heads, *bits), torch.int32, device)
    _check("selection.pinned", selection.pinned, bits, torch.int32, device)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have four dimensions, found {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, found {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"q, k and v must share a device, found {q.device} and {name} on {tensor.device}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must share a dtype, found q {q.dtype}, k {k.dtype}, v {v.dtype}: cast them to one, such as "
            "k.to(q.dtype); autocast has no part in this call"
        )


def _check(
    name: str, tensor: Tensor | None, shape: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, found {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, found {list(tensor.shape)}")
    _check_device(name, tensor, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like q, found {tensor.device}")


def _check_per_head(name: str, tensor: Tensor | None, batch: int, heads: int, device: torch.device) -> None:
    if tensor is None:
        return
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, found {tensor.dtype}")
    if tuple(tensor.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"{name} must be [{heads}] or [{batch}, {heads}] ([H] or [B, H]), found {list(tensor.shape)}")
    if tensor.requires_grad:
        raise ValueError(f"{name} gets no gradient, found requires_grad=True: detach it")
    _check_device(name, tensor, device)


def _check_keys(
    key_length: Tensor | None, key_mask: Tensor | None, batch: int, num_k: int, device: torch.device
) -> None:
    if key_length is not None:
        if key_length.is_floating_point() or key_length.dtype == torch.bool:
            raise TypeError(f"key_length must be an integer tensor, found {key_length.dtype}")
        if tuple(key_length.shape) != (batch,):
            raise ValueError(f"key_length must be [{batch}] ([B]), found {list(key_length.shape)}")
        _check_device("key_length", key_length, device)
    _check("key_mask", key_mask, (batch, num_k), torch.bool, device)
