"""Features of the attention call: frame-distance decay and the means of pooled tiles."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .cache import StorageCache, capturing, count_writes


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class FrameDecay:
    """Logit decay by the distance of frames: x becomes min(x, t * x), with t = table[|frame of q - frame of k|].

    `table` is float32 [max distance + 1] with values in (0, 1]; `q_frames` int32 [S_q] and `k_frames` int32 [S_k] give
    each token's frame in the caller's token order, -1 for tokens outside the video (t = 1). Distances beyond the table
    use its last entry. A pooled tile uses the mean of t over its tokens, which is t itself where the tile lies in one
    frame. Source: UltraViCo, arXiv 2511.20123; the released code decays token distances, here the distance is in
    frames.
    """

    table: Tensor
    q_frames: Tensor
    k_frames: Tensor

    def __post_init__(self) -> None:
        for name, dtype in (("table", "float32"), ("q_frames", "int32"), ("k_frames", "int32")):
            given = getattr(self, name)
            if given.dtype != getattr(torch, dtype) or given.dim() != 1 or given.numel() == 0:
                found = f"found {given.dtype} {list(given.shape)}"
                raise ValueError(
                    f"frame_decay.{name} must be {dtype}, of one dimension with at least one entry; {found}"
                )
        count_writes(self, ("table", "q_frames", "k_frames"))  # what is derived from them is remembered


_LAST_FRAMES: StorageCache[int] = StorageCache()


def last_frame(frames: Tensor) -> int:
    """The highest frame of these, read from the device once."""

    def read() -> int:
        if capturing(frames.device):
            raise RuntimeError(
                "a call with frame decay reads how many frames there are, once, which a graph can't capture: "
                "run it once before the capture"
            )
        return int(frames.max())

    return _LAST_FRAMES.get([frames], (), read)


def decay_by_frame(table: Tensor, q_frames: Tensor, k_frames: Tensor, last: int | None = None) -> tuple[Tensor, Tensor]:
    """Decay t as float32 [F + 2, S_k], one row for each query frame -1..F, and each query token's row, int64 [S_q].

    Row 0 is for queries outside the video and all ones; the columns of keys outside the video are ones in every row.
    `last` is F, read from the device where it is None.
    """
    frames = torch.arange(-1, (int(q_frames.max()) if last is None else last) + 1, device=table.device)
    distance = (frames[:, None] - k_frames[None, :].long()).abs().clamp_(max=table.numel() - 1)
    t = table[distance].masked_fill((frames < 0)[:, None] | (k_frames < 0), 1.0)
    return t, (q_frames.long() + 1).clamp_(min=0)


def split_tiles(x: Tensor, dim: int, block: int, filling: float | bool = 0) -> Tensor:
    """One dimension (from the front) cut into tiles, [..., S, ...] to [..., tiles, block, ...], the last filled up."""
    lacking = -x.shape[dim] % block
    if lacking:
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, lacking), value=filling)
    return x.unflatten(dim, (-1, block))


def tile_means(x: Tensor, block: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means over tiles of x [..., S, D] (S in tiles of `block`, ragged tail) and the true lengths they were taken over.

    `weight` is bool [..., S], the tokens that count, or None for all. Returns means [..., NK, D] in x's dtype, summed
    in float32 (float64 for float64), and lengths float32 [..., NK]; a tile without a counting token has mean 0 and
    length 0.
    """
    tokens = x.shape[-2]
    tiles = -(-tokens // block)
    wide = wide_dtype(x.dtype)
    if weight is None:
        count = torch.full((tiles,), float(block), dtype=wide, device=x.device)
        count[-1] = tokens - (tiles - 1) * block
    else:
        x = x.masked_fill(~weight[..., None], 0)
        count = split_tiles(weight, weight.dim() - 1, block).sum(-1, dtype=wide)
    total = split_tiles(x, x.dim() - 2, block).sum(-2, dtype=wide)
    return (total / count.clamp(min=1)[..., None]).to(x.dtype), count


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Dtype in which a device multiplies matrices of a dtype: float32 on a CPU without instructions for bf16 or fp16.

    Without them a product takes three times as long as in float32, and copies cost a fraction of that.
    """
    native = {torch.bfloat16: torch.cpu._is_avx512_bf16_supported, torch.float16: torch.cpu._is_amx_fp16_supported}
    return torch.float32 if device_type == "cpu" and dtype in native and not native[dtype]() else dtype
