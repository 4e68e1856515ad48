"""The forward kernel as the methods launch it, for ahead-of-time compilation: dtypes, head dims, features, tiles."""

from __future__ import annotations

from itertools import product

import torch

from dit_accel_kernels.triton_forward import _INTEGERS, _fwd_kernel
from dit_accel_kernels.triton_launch import (
    Launch,
    bulk_copies,
    column_parts,
    fp32_products,
    key_block,
    launch_of,
    query_block,
    warps,
)
from dit_accel_kernels.triton_variants import TARGETS, Variant

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_EXACT_STRIDES, _POOLED_STRIDES = ("stride_ib", "stride_ih"), ("stride_pb", "stride_ph")
_POOLED = ("pooled_indices_ptr", "k_mean_ptr", "v_mean_ptr", "log_length_ptr")
_FEATURES = {  # arguments that are there besides those of every launch
    "plain": (),
    "decay": ("entry_t_ptr", "table_ptr", "q_frames_ptr", "k_frames_ptr"),
    "pooled": _POOLED,
    "mask": ("valid_ptr",),
    "routed": (*_POOLED, *_EXACT_STRIDES, *_POOLED_STRIDES),
    "maxgap": ("words_ptr", "vote_threshold", *_EXACT_STRIDES),
    "mass": ("words_ptr", "vote_threshold", *_EXACT_STRIDES),
    "budget": ("words_ptr", "vote_threshold", *_EXACT_STRIDES),
}
_VOTES = ("maxgap", "mass", "budget")


def variants() -> list[Variant]:
    """The forward in every dtype with head dims 64 and 128 and tiles of 64 and 128; in bf16 and 128 with selections."""
    cases = list(product(_DTYPES, (64, 128), ("plain", "decay", "pooled", "mask"), (128, 64)))
    cases += list(product(("bf16",), (64, 128), ("routed", *_VOTES), (128,)))
    found = []
    for name, dim, features, tile in cases:
        by_launch: dict[tuple, list[str]] = {}
        for target in TARGETS:
            precision = fp32_products(target) if name == "fp32" else "ieee"
            launch = launch_of(target, _DTYPES[name], dim, tile)
            by_launch.setdefault((launch, precision, bulk_copies(target, _DTYPES[name])), []).append(target)
        found += [
            _variant(name, dim, features, tile, launch, precision, tuple(targets))
            for (launch, precision, _), targets in by_launch.items()
        ]
    return found


def _variant(
    name: str, dim: int, features: str, tile: int, launch: Launch, precision: str, targets: tuple[str, ...]
) -> Variant:
    d1, d2 = column_parts(dim)
    data = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_mean_ptr", "v_mean_ptr"), f"*{name}:16")
    kinds = dict.fromkeys(("entry_t_ptr", "table_ptr", "log_length_ptr", "lse_ptr"), "*fp32:16")
    kinds |= dict.fromkeys(("indices_ptr", "bounds_ptr", "row_order_ptr", "pooled_indices_ptr", "words_ptr"), "*i32:16")
    kinds |= dict.fromkeys(("q_frames_ptr", "k_frames_ptr"), "*i32:16") | {"valid_ptr": "*u8:16"} | data
    kinds |= {f"stride_{x}{axis}": "i32:16" for x in "qkvo" for axis in "bhs"}
    kinds |= dict.fromkeys(_INTEGERS, "i32") | {"scale": "fp32", "vote_threshold": "fp32"}
    options = {n for n in kinds if n.endswith("_ptr")} | {*_EXACT_STRIDES, *_POOLED_STRIDES, "vote_threshold"}
    always = {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "indices_ptr", "bounds_ptr", "row_order_ptr"}
    absent = options - always - set(_FEATURES[features]) | {"token_order_ptr", "head_scale_ptr", "pooled_t_ptr"}
    absent.add("stride_vs")  # K and V share it
    block_q, block_k = query_block(tile, launch.block_q), key_block(tile, launch.block_k)[0]
    num_warps = warps(launch, block_q)
    bulk = bulk_copies(targets[0], _DTYPES[name])
    if bulk:
        kinds |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<{name}[1, 1, {block_k}, {dim}]>")
    else:
        absent |= {"k_desc", "v_desc"}
    sizes = f"{launch.block_q}x{launch.block_k}x{launch.block_s}w{num_warps}s{launch.num_stages}"
    return Variant(
        name=f"fwd-{name}-d{dim}-{features}-b{tile}-{sizes}-{'bulk' if bulk else precision}",
        kernel=_fwd_kernel,
        signature={n: kind for n, kind in kinds.items() if n not in absent},
        constexprs={
            **dict.fromkeys(sorted(absent)),
            **dict(TILE_Q=tile, TILE_K=tile, BLOCK_Q=block_q, BLOCK_K=block_k, PRECISION=precision),
            **dict(BLOCK_S=min(block_k, launch.block_s), DIM=dim, D1=d1, D2=d2),
            "VOTE": features if features in _VOTES else None,
        },
        num_warps=num_warps,
        num_stages=launch.num_stages,
        targets=targets,
        turns=_turns(tile // block_k) if features in _VOTES else (),
    )


def _turns(chunks: int) -> tuple[int, ...]:
    """How often a vote settles a tile and stores a word, where a tile has so many chunks."""
    return (chunks, 32 * chunks) if chunks > 1 else (32,)
