"""The forward kernel as the methods launch it, for ahead-of-time compilation: dtypes, head dims, features, tiles."""

from __future__ import annotations

from itertools import product

import torch

from dit_accel_kernels.backends.triton.forward import _INTEGERS, _fwd_kernel
from dit_accel_kernels.backends.triton.launch import (
    Launch,
    bulk_copies,
    column_parts,
    fp32_products,
    key_block,
    launch_of,
    query_block,
    warps,
    with_order,
)
from dit_accel_kernels.backends.triton.variants import TARGETS, Variant

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_EXACT_STRIDES, _POOLED_STRIDES = ("stride_ib", "stride_ih"), ("stride_pb", "stride_ph")
_POOLED = ("pooled_indices_ptr", "k_mean_ptr", "v_mean_ptr", "log_length_ptr")
_FEATURES = {  # arguments that are there besides those of every launch
    "plain": (),
    "decay": ("entry_t_ptr", "table_ptr", "q_frames_ptr", "k_frames_ptr"),
    "pooled": _POOLED,
    "mask": ("valid_ptr",),
    "scale": ("head_scale_ptr",),
    "order": ("token_order_ptr",),
    "fused": ("stride_vs",),  # V lies apart from K, as in a fused projection
    "keep": _EXACT_STRIDES,  # lists of its own for every batch and head
    "routed": (*_POOLED, *_EXACT_STRIDES, *_POOLED_STRIDES),  # kept bits with pooled rest make the same call
    "maxgap": ("words_ptr", "vote_threshold"),
    "mass": ("words_ptr", "vote_threshold"),
    "budget": ("words_ptr", "vote_threshold"),
}
_VOTES = ("maxgap", "mass", "budget")
_SELECTIONS = ("keep", "routed", *_VOTES)
_SELECTED = ("keep", "routed", *(f"keep+{vote}" for vote in _VOTES))
_TOGETHER = (  # as methods combine in one call
    *_VOTES,  # LiteAttention's first call; its others have kept bits too
    *(f"routed+{vote}" for vote in _VOTES),
    "scale", "fused", "order", "order+routed", "order+keep+maxgap",
    "mask+routed", "mask+keep+maxgap", "mask+order+pooled",
    "decay+scale", "decay+pooled", "decay+mask", "decay+routed", "decay+keep+maxgap",
    "decay+mask+scale+order+routed+budget",
)  # fmt: skip
Case = tuple[str, int, str, int]  # dtype, head dim, features, tokens of a tile


def cases() -> list[Case]:
    """What methods launch: every feature by itself in every dtype, and together in bf16 (fp16 differs little).

    Head dims 64 and 128, and tiles of 64 and 128, are those of the models and of their published settings; queries of
    smaller tiles don't fill a product of Hopper's.
    """
    found: list[Case] = list(product(_DTYPES, (64, 128), ("plain", "decay", "pooled", "mask"), (128,)))
    found += [("fp16", dim, "plain", 64) for dim in (64, 128)]
    found += list(product(("bf16", "fp32"), (64, 128), ("plain", "decay", "pooled", "mask"), (64,)))
    found += list(product(("bf16",), (64, 128), _SELECTED, (128,)))
    found += [("bf16", 128, features, 128) for features in _TOGETHER]
    found += list(product(("bf16",), (128,), ("routed", "keep+maxgap", "order+keep+maxgap"), (64,)))
    found += [("bf16", 64, "order+routed", 128), ("bf16", 64, "order+keep+maxgap", 128), ("fp32", 128, "order", 128)]
    found += list(product(("bf16",), (32, 96), ("plain", "routed", "keep+maxgap"), (128,)))
    found.append(("bf16", 128, "plain", 256))
    return (
        found
        + [("bf16", 256, features, 128) for features in ("plain", "decay", "mask")]
        + [("fp32", 256, "plain", 128)]
    )


def variants() -> list[Variant]:
    """The forward in every case, once for all targets that launch it alike."""
    found = []
    for name, dim, features, tile in cases():
        by_launch: dict[tuple, list[str]] = {}
        for target in TARGETS:
            precision = fp32_products(target) if name == "fp32" else "ieee"
            launch, bulk = launch_of(target, _DTYPES[name], dim, tile), _bulk(target, name, dim, features)
            if "order" in features.split("+"):
                launch = with_order(launch, decay="decay" in features)
            by_launch.setdefault((launch, precision, bulk), []).append(target)
        found += [
            _variant(name, dim, features, tile, launch, precision, bulk, tuple(targets))
            for (launch, precision, bulk), targets in by_launch.items()
        ]
    return found


def _bulk(target: str, name: str, dim: int, features: str) -> bool:
    """Whether chunks come by descriptors: rows in sequence, of a power of 2 columns."""
    return bulk_copies(target, _DTYPES[name]) and dim & (dim - 1) == 0 and "order" not in features.split("+")


def _variant(
    name: str, dim: int, features: str, tile: int, launch: Launch, precision: str, bulk: bool,
    targets: tuple[str, ...],
) -> Variant:  # fmt: skip
    d1, d2 = column_parts(dim)
    parts = features.split("+")
    pools = {"pooled", "routed"} & set(parts)
    data = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_mean_ptr", "v_mean_ptr"), f"*{name}:16")
    floats = ("entry_t_ptr", "table_ptr", "log_length_ptr", "lse_ptr", "head_scale_ptr", "pooled_t_ptr")
    integers = ("indices_ptr", "row_order_ptr", "pooled_indices_ptr", "words_ptr")
    kinds = dict.fromkeys(floats, "*fp32:16")
    kinds |= dict.fromkeys((*integers, "q_frames_ptr", "k_frames_ptr"), "*i32:16")
    kinds |= {"valid_ptr": "*u8:16", "token_order_ptr": "*i64:16", "bounds_ptr": "*i64:16"} | data
    kinds |= {f"stride_{x}{axis}": "i32:16" for x in "qkvo" for axis in "bhs"}
    kinds |= dict.fromkeys(_INTEGERS, "i32") | {"scale": "fp32", "vote_threshold": "fp32"}
    options = {n for n in kinds if n.endswith("_ptr")} | {*_EXACT_STRIDES, *_POOLED_STRIDES}
    options |= {"vote_threshold", "stride_vs"}
    there = {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "indices_ptr", "bounds_ptr", "row_order_ptr"}
    there |= {argument for part in parts for argument in _FEATURES[part]}
    there |= {"pooled_t_ptr"} if "decay" in parts and pools else set()
    there |= set() if set(parts) & set(_SELECTIONS) else {"lse_ptr"}  # what a gradient reads
    absent = options - there
    block_q, block_k = query_block(tile, launch.block_q), key_block(tile, launch.block_k)[0]
    num_warps = warps(launch, block_q)
    if bulk:
        kinds |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<{name}[1, 1, {block_k}, {dim}]>")
    else:
        absent |= {"k_desc", "v_desc"}
    vote = next((part for part in parts if part in _VOTES), None)
    sizes = f"{launch.block_q}x{launch.block_k}x{launch.block_s}w{num_warps}s{launch.num_stages}"
    return Variant(
        name=f"fwd-{name}-d{dim}-{features}-b{tile}-{sizes}-{'bulk' if bulk else precision}",
        kernel=_fwd_kernel,
        signature={n: kind for n, kind in kinds.items() if n not in absent},
        constexprs={
            **dict.fromkeys(sorted(absent)),
            **dict(TILE_Q=tile, TILE_K=tile, BLOCK_Q=block_q, BLOCK_K=block_k, PRECISION=precision),
            **dict(BLOCK_S=min(block_k, launch.block_s), DIM=dim, D1=d1, D2=d2, VOTE=vote),
        },
        num_warps=num_warps,
        num_stages=launch.num_stages,
        targets=targets,
        turns=_turns(tile // block_k) if vote else (),
    )


def _turns(chunks: int) -> tuple[int, ...]:
    """How often a vote settles a tile and stores a word, where a tile has so many chunks."""
    return (chunks, 32 * chunks) if chunks > 1 else (32,)
