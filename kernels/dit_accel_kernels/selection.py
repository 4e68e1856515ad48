"""Per-call selection: what decides which of the exact tiles stay exact in this call, and its bitmaps.

Lists (tiles.py) say what may be exact; a selection narrows them for every batch and head. A tile of the exact list is
pinned, or it is dropped where its bit in `keep` is 0 and then becomes what `rest` says, or routing makes it pooled
where its score stays under its row's threshold: states.py. Votes (votes.py) give the bits of the next call.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """A row's threshold on pooled logits decides tile by tile: exact above it, pooled below (Sol-Attn, 2607.24027).

    Score of (query tile i, tile j): c * mean(Q_i) . mean(K_j), c = logit scale * log2(e); it is the column mean of the
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

    Bitmaps are int32 with W = ceil(NK / 32) words a query tile: bit j % 32 of word j // 32 is key tile j. `keep` [B, H,
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

    @property
    def narrows(self) -> bool:
        """Whether it may take tiles from the exact list."""
        return any(x is not None for x in (self.keep, self.routing, self.routed))
