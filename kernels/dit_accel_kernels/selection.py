"""Per-call selection: which of the exact tiles stay exact in this call (bitmaps, routing), and the order of visits.

Lists (tiles.py) say what may be exact; a selection narrows them for every batch and head. A tile of the exact list is
pinned, or it is dropped where its bit in `keep` is 0 and then becomes what `rest` says, or routing makes it pooled
where its score stays under its row's threshold. Votes (votes.py) give the bits of the next call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dit_accel_kernels.features import Problem, tile_means
from dit_accel_kernels.sections import sections_of
from dit_accel_kernels.tiles import EXACT, POOLED, SKIPPED, TileLists

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """A row's threshold on pooled logits decides tile by tile: exact above it, pooled below (Sol-Attn, 2607.24027).

    Score of (block row i, tile j): c * mean(Q_i) . mean(K_j), c = logit scale * log2(e); it is the column mean of the
    products of all rows of i with mean(K_j). Tile j stays exact where its score exceeds mu_i + beta * sigma_i, mu and
    sigma^2 being mean and variance of the scores over the key tiles that have a valid key and are not pinned in every
    row. "diag" leaves the covariances of the mean keys' channels out of sigma^2, "exact" has them; 1e-6 is added to
    sigma^2. Key tiles weigh alike, whatever their length; frame decay does not enter the score.
    """

    beta: float = 1.0
    threshold: Literal["diag", "exact"] = "diag"

    def __post_init__(self) -> None:
        if self.threshold not in ("diag", "exact"):
            raise ValueError(f"threshold must be 'diag' or 'exact', found {self.threshold!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """What a visited tile must show to be kept for the next call; see votes.py (LiteAttention, arXiv 2511.11062).

    `threshold` is in log2 units for "maxgap" (-10: the tile's largest weight is at least 2^-10 of the largest so far),
    and a share of the softmax mass in (0, 1) for "mass" (each tile's) and "budget" (all tiles that a row votes down).
    """

    criterion: Literal["maxgap", "mass", "budget"] = "maxgap"
    threshold: float = -10.0

    def __post_init__(self) -> None:
        if self.criterion not in ("maxgap", "mass", "budget"):
            raise ValueError(f"criterion must be 'maxgap', 'mass' or 'budget', found {self.criterion!r}")
        if self.criterion != "maxgap" and not 0 < self.threshold < 1:
            raise ValueError(f"threshold of {self.criterion!r} is a share in (0, 1), found {self.threshold}")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Selection:
    """Which tiles of the exact list stay exact in this call.

    Bitmaps are int32 with W = ceil(NK / 32) words a block row: bit j % 32 of word j // 32 is key tile j. `keep` [B, H,
    NQ, W]; `rest` is what becomes of a tile whose bit is 0. `pinned` [NQ, W]: tiles that no bit, routing or vote drops.
    `routed` [B, H, NQ, W] stands in for `routing`: the tiles that an earlier call left exact, as a gradient needs them.
    `vote` asks for the bits of the next call. `reverse` visits tiles from the last to the first.
    """

    keep: Tensor | None = None
    rest: Literal["skip", "pooled"] = "skip"
    pinned: Tensor | None = None
    routing: Routing | None = None
    vote: Vote | None = None
    reverse: bool = False
    routed: Tensor | None = None

    def __post_init__(self) -> None:
        if self.routed is not None and self.routing is not None:
            raise ValueError("routed stands in for routing, found both: give one")
        if self.rest not in ("skip", "pooled"):
            raise ValueError(f"rest must be 'skip' or 'pooled', found {self.rest!r}")
        for name, tensor, dims in (("keep", self.keep, 4), ("pinned", self.pinned, 2), ("routed", self.routed, 4)):
            if tensor is None:
                continue
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name} must be torch.int32, found {tensor.dtype}")
            if tensor.dim() != dims:
                raise ValueError(f"{name} must have {dims} dimensions, found {list(tensor.shape)}")


def narrows(selection: Selection | None) -> bool:
    """Whether a selection may take tiles from the exact list."""
    if selection is None:
        return False
    return any(x is not None for x in (selection.keep, selection.routing, selection.routed))


def words_of(key_tiles: int) -> int:
    """Words of a bitmap row, W."""
    return -(-key_tiles // 32)


def pack_bits(chosen: Tensor) -> Tensor:
    """Bool [..., NK] as bits, int32 [..., W]."""
    chosen = torch.nn.functional.pad(chosen, (0, -chosen.shape[-1] % 32)).unflatten(-1, (-1, 32))
    weight = torch.ones(32, dtype=torch.int64, device=chosen.device) << torch.arange(32, device=chosen.device)
    words = (chosen * weight).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_bits(bits: Tensor, key_tiles: int) -> Tensor:
    """Bits int32 [..., W] as bool [..., NK]; the inverse of `pack_bits`."""
    places = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[..., None] >> places) & 1).flatten(-2)[..., :key_tiles].bool()


def count_bits(bits: Tensor) -> Tensor:
    """How many bits are set, int64 [...] of int32 [..., W]; no device sync."""
    return unpack_bits(bits, bits.shape[-1] * 32).sum(-1)


def lists_of(problem: Problem) -> TileLists:
    """The lists of a call, selection left out."""
    return TileLists(
        block_q=problem.block_q,
        block_k=problem.block_k,
        num_q=problem.q.shape[2],
        num_k=problem.k.shape[2],
        exact_offsets=problem.exact_offsets,
        exact_indices=problem.exact_indices,
        pooled_offsets=problem.pooled_offsets,
        pooled_indices=problem.pooled_indices,
    )


def list_states(problem: Problem) -> Tensor:
    """Tile states of the lists alone, uint8 [B or 1, H or 1, NQ, NK]."""
    states = lists_of(problem).states()
    heads = problem.q.shape[1]
    return states[None] if states.shape[0] in (1, heads) else states.unflatten(0, (-1, heads))


def selected_states(problem: Problem) -> Tensor:
    """Tile states of a call in tiled order, selection applied, uint8 [B or 1, H or 1, NQ, NK]."""
    states, selection = list_states(problem), problem.selection
    if selection is None:
        return states
    tiles = problem.key_tiles
    pinned = None if selection.pinned is None else unpack_bits(selection.pinned, tiles)
    free = states == EXACT if pinned is None else (states == EXACT) & ~pinned
    if selection.keep is not None:
        dropped = free & ~unpack_bits(selection.keep, tiles)
        states = torch.where(dropped, POOLED if selection.rest == "pooled" else SKIPPED, states)
        free = free & ~dropped
    if selection.routing is not None:
        scores, threshold = routing_scores(problem, selection.routing, pinned)
        states = torch.where(free & ~(scores > threshold), POOLED, states)
    if selection.routed is not None:
        states = torch.where(free & ~unpack_bits(selection.routed, tiles), POOLED, states)
    return states.to(torch.uint8)


def routing_scores(problem: Problem, routing: Routing, pinned: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores [B, H, NQ, NK] and row thresholds [B, H, NQ, 1] in log2 units, float32 (float64 for float64).

    The mean keys are those of the pooled tiles, rounded to k's dtype; mean queries are not rounded. `pinned` is bool
    [NQ, NK] or None.
    """
    wide = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
    valid = None if problem.key_valid is None else problem.key_valid[:, None]
    q_mean, _ = tile_means(problem.q.to(wide), problem.block_q, None)
    k_mean, length = tile_means(problem.k, problem.block_k, valid)
    repeat = problem.q.shape[1] // problem.k.shape[1]
    k_mean = k_mean.to(wide).repeat_interleave(repeat, 1)
    counted = length.to(wide).gt(0)  # [NK] or [B, 1, NK]
    if pinned is not None:
        counted = counted & ~pinned.all(0)
    weight = counted.to(wide).expand(*k_mean.shape[:2], -1)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
    scale = problem.logit_scale * LOG2_E
    if problem.head_scale is not None:
        q_mean = q_mean * problem.head_scale.to(wide)[:, :, None, None]
    q_mean = q_mean * scale
    scores = q_mean @ k_mean.mT
    centre = (weight[..., None] * k_mean).sum(2, keepdim=True)
    mean = (q_mean * centre).sum(-1, keepdim=True)
    if routing.threshold == "diag":
        variance = (weight[..., None] * (k_mean - centre).square()).sum(2, keepdim=True)
        variance = (q_mean.square() * variance).sum(-1, keepdim=True)
    else:
        variance = (weight[:, :, None] * (scores - mean).square()).sum(-1, keepdim=True)
    return scores, mean + routing.beta * (variance + 1e-6).sqrt()


def resolved(problem: Problem) -> tuple[Problem, Tensor]:
    """A call in tiled order with its selection turned into lists of every batch and head, and the exact tiles as bits.

    Bits int32 [B, H, NQ, W]. Reads the counts back from the device: backends that must not sync select by themselves.
    """
    batch, heads = problem.q.shape[:2]
    states = selected_states(problem).expand(batch, heads, -1, -1)
    sizes = dict(block_q=problem.block_q, block_k=problem.block_k, num_q=problem.q.shape[2], num_k=problem.k.shape[2])
    lists = TileLists.from_states(states.flatten(0, 1), **sizes)
    found = replace(
        problem,
        exact_offsets=lists.exact_offsets,
        exact_indices=lists.exact_indices,
        pooled_offsets=lists.pooled_offsets,
        pooled_indices=lists.pooled_indices,
        selection=None,
    )
    return found, pack_bits(states == EXACT)


def visiting_order(problem: Problem, reverse: bool) -> Tensor:
    """Key tiles of every block row in the order of visits, int64 [B or 1, NQ, NK]: section by section, each ascending.

    `reverse` descends in each section. The problem is in tiled order.
    """
    section = sections_of(problem)
    tiles = torch.arange(problem.key_tiles, device=section.device)
    return (section.long() * problem.key_tiles + (-1 if reverse else 1) * tiles).argsort(dim=-1, stable=True)
