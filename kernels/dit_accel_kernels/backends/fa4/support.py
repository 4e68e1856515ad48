"""Where the fa4 backend runs, found out without importing flash-attn-4: cards, dtypes, head dims, tiles, features."""

import importlib
import importlib.metadata
from functools import lru_cache

import torch

from ..triton.launch import architecture
from ..triton.support import missing_requirement as triton_requirement

PACKAGE = "flash-attn-4"
DTYPES = (torch.bfloat16, torch.float16)
MAX_DIM = 128
TILE = 128  # keys of its blocks, and queries on sm_90
TILES = ((TILE, TILE), (2 * TILE, TILE))  # queries and keys of ours


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
    return _card_problem(device) or package_problem() or triton_requirement(device, dtype, dim)


def _card_problem(device: torch.device) -> str | None:
    """Why FlashAttention-4 would not attend by lists on this device, or None."""
    arch = architecture(device)
    if arch.startswith("sm_8"):
        return f"a card of sm_90 or sm_100 (found {arch}, where {PACKAGE} drops the lists in silence and is dense)"
    if arch.startswith("sm_12"):
        return f"a card of sm_90 or sm_100 (found {arch}, where {PACKAGE} has no block sparsity)"
    if not arch.startswith(("sm_9", "sm_10", "sm_11")):
        return f"a card of sm_90 or sm_100 (found {arch})"
    return None


@lru_cache(maxsize=1)
def package_problem() -> str | None:
    """What is wrong with the package on this machine, or None; it is imported once, on cards that it serves."""
    try:
        version = importlib.metadata.version(PACKAGE)
        importlib.import_module("flash_attn.cute.interface")
    except importlib.metadata.PackageNotFoundError:
        return f"the {PACKAGE} package (found none: pip install --pre {PACKAGE})"
    except (ImportError, OSError) as error:
        return f"a {PACKAGE} that can be imported (found {version}, and {error})"
    return None


def rows_joined(device: torch.device, block_q: int) -> int:
    """Query tiles that FlashAttention-4 takes together: its blocks have 128 queries on sm_90 and 256 on newer cards."""
    return 1 if architecture(device).startswith("sm_9") else 2 * TILE // block_q
