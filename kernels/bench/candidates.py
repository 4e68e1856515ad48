"""The rivals that the kernel bench times: dense SDPA, every backend, and plainer ways to write the same thing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from dit_accel_kernels import TileLists, block_sparse_attention_eager
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], Tensor]


def rows_of(tiles: TileLists) -> list[Tensor]:
    """Exact key tiles of every block row of shared lists, int64."""
    bounds = tiles.exact_offsets[0].tolist()
    return [tiles.exact_indices[a:b].long() for a, b in pairwise(bounds)]


def make(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, names: list[str]) -> dict[str, Call]:
    """The named candidates as calls on q, k, v [B, H, S, D]; "gather-*" and "tile-*" are restricted to whole tiles."""
    rows = rows_of(tiles)
    block, dim = tiles.block_q, q.shape[-1]
    k_tiles, v_tiles = (x.flatten(0, 1).unflatten(1, (-1, block)) for x in (k, v))
    q_tiles = q.flatten(0, 1).unflatten(1, (-1, block))
    heads = q_tiles.shape[0]

    def gathered(x: Tensor, row: Tensor) -> Tensor:
        return x.index_select(1, row).view(heads, -1, dim)

    def gather_sdpa() -> Tensor:
        out = torch.empty_like(q_tiles)
        for i, row in enumerate(rows):
            out[:, i] = scaled_dot_product_attention(q_tiles[:, i], gathered(k_tiles, row), gathered(v_tiles, row))
        return out.view_as(q)

    def gather_bmm() -> Tensor:
        out = torch.empty_like(q_tiles)
        scaled = q_tiles * dim**-0.5
        for i, row in enumerate(rows):
            p = torch.softmax(torch.bmm(scaled[:, i], gathered(k_tiles, row).mT), -1)
            out[:, i] = torch.bmm(p, gathered(v_tiles, row))
        return out.view_as(q)

    def tile_bmm() -> Tensor:
        """One product a tile, nothing copied, no maximum: exact while logits stay far below 88, as they do here."""
        out = torch.empty_like(q_tiles)
        scaled = q_tiles * dim**-0.5
        for i, row in enumerate(rows):
            acc, total = torch.zeros_like(out[:, i]), torch.zeros(heads, block, 1)
            for j in row.tolist():
                p = torch.bmm(scaled[:, i], k_tiles[:, j].mT).exp_()
                total += p.sum(-1, keepdim=True, dtype=torch.float32)
                acc.baddbmm_(p, v_tiles[:, j])
            out[:, i] = acc / total
        return out.view_as(q)

    def ours(backend: str) -> Call:
        return lambda: block_sparse_attention_eager(q, k, v, tiles, layout="bhsd", backend=backend)  # pyright: ignore

    known: dict[str, Call] = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "torch": ours("torch"),
        "flex": ours("flex"),
        "gather-sdpa": gather_sdpa,
        "gather-bmm": gather_bmm,
        "tile-bmm": tile_bmm,
    }
    return {name: known[name] for name in names}


NAMES = ("dense", "torch", "flex", "gather-sdpa", "gather-bmm", "tile-bmm")


def exact_rows(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, sample: list[int]) -> Tensor:
    """Attention of the sampled block rows in float64, [B, H, len(sample), block_q, D]: the truth for errors."""
    rows, block = rows_of(tiles), tiles.block_q
    blocks = []
    for i in sample:
        tokens = (rows[i][:, None] * block + torch.arange(block)).flatten()
        blocks.append(
            scaled_dot_product_attention(
                q[:, :, i * block : (i + 1) * block].double(), k[:, :, tokens].double(), v[:, :, tokens].double()
            )
        )
    return torch.stack(blocks, 2)
