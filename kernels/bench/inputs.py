"""Random tile lists, kept tiles and decay for benches and tuning, and the file that their findings go to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dit_accel_kernels import EXACT, FrameDecay, TileLists, pack_bits
from torch import Tensor

FRAMES = 21  # into which a decayed call's tokens are cut: those of 81 frames of video


def append(path: Path | None, record: dict[str, Any]) -> None:
    """Append one JSON line to a file, if there is one."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def lists(
    tokens: int, block: int, density: float, rest: int, device: str, *, groups: int = 1, band: bool = False
) -> TileLists:
    """Lists: for every query tile the diagonal and others, `density` of all; the rest skipped or pooled.

    The others are random, or with `band` those nearest to the diagonal.
    """
    count = -(-tokens // block)
    kept, places = max(1, round(density * count)), torch.arange(count)
    scores = torch.rand(groups, count, count, generator=torch.Generator().manual_seed(0))
    if band:
        scores = -(places[:, None] - places).abs().float().expand(groups, -1, -1).contiguous()
    scores.diagonal(dim1=1, dim2=2).fill_(2.0)
    states = torch.full((groups, count, count), rest, dtype=torch.uint8)
    states.scatter_(2, scores.topk(kept, 2).indices, EXACT)
    return TileLists.from_states(states, block_q=block, block_k=block, num_q=tokens, num_k=tokens).to(device)


def decay(tokens: int, device: str) -> FrameDecay:
    """Decay over the frames of a call."""
    frames = (torch.arange(tokens) * FRAMES // tokens).int().to(device)
    table = torch.linspace(1.0, 0.5, FRAMES).to(device)
    return FrameDecay(table=table, q_frames=frames, k_frames=frames)


def keep_bits(batch: int, heads: int, count: int, density: float, device: str) -> Tensor:
    """Kept tiles of every batch and head as a selection takes them, the diagonal and random others: int32."""
    kept = torch.rand(batch, heads, count, count, generator=torch.Generator().manual_seed(0))
    kept[..., torch.arange(count), torch.arange(count)] = -1.0
    chosen = torch.zeros_like(kept, dtype=torch.bool)
    chosen.scatter_(-1, kept.topk(max(1, round(density * count)), -1, largest=False).indices, True)
    return pack_bits(chosen).to(device)
