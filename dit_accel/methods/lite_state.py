"""What LiteAttention carries from call to call: a bitmap for each attention module, branch and row, and its search."""

import math
from dataclasses import dataclass

from dit_accel_kernels import Selection
from torch import Tensor

from ..layout import TokenLayout
from ..plan import Moment

Key = tuple[str, int, str, int]
"""(transformer, layer, branch, row): whose calls follow each other."""

LOWEST_LEVEL = -40.0
"""Log2 threshold that drops next to nothing, where a search begins."""

FIRST_LEVEL = -10.0
"""Log2 threshold that a search tries first: the published one."""

GROWTH = 0.26
"""Growth of the dropped share, natural log a level, as the embedded model has it between -10 and -4."""

CLOSE = 0.005
"""Share of the tiles above the target at which a search is over."""


def key_of(moment: Moment) -> Key:
    """Return whose state a call reads and writes."""
    return moment.transformer, moment.layer, moment.branch, moment.row


def bitmap_bytes(tiles: int, heads: int, batch: int) -> int:
    """Return the bytes of one module's bitmap over N x N tiles: int32 [B, H, N, ceil(N / 32)]."""
    return 4 * batch * heads * tiles * math.ceil(tiles / 32)


@dataclass(slots=True)
class Search:
    """Search of the threshold that leaves a target share: votes that would drop more are thrown away.

    A level is a threshold's log2: the gap itself for maxgap. The dropped share rises with the level, by about `GROWTH`
    e-folds a unit; what it really does is learned from both sides, and every second time the range is halved.

    Attributes:
        target: the share of the tiles to keep.
        low: highest level whose votes were taken; ``low_share`` is what they left.
        high: lowest level whose votes were thrown away; ``high_share`` is what they would have left, 0 if unknown.
    """

    target: float
    low: float = LOWEST_LEVEL
    low_share: float = 1.0
    high: float = 0.0
    high_share: float = 0.0
    tries: int = 0

    @property
    def over(self) -> bool:
        """Whether the share is as near to the target as need be."""
        return self.low_share - self.target <= CLOSE

    def level(self) -> float:
        """Return the level to vote with."""
        if self.tries == 0:
            return FIRST_LEVEL
        wide, ahead = self.high - self.low, math.inf
        if self.low_share < 1:
            ahead = math.log((1 - self.target) / (1 - self.low_share))
        if self.high_share == 0:
            part = ahead / GROWTH / wide
        elif self.tries % 2:
            part = 0.5
        else:
            part = ahead / math.log((1 - self.high_share) / (1 - self.low_share)) if self.low_share < 1 else 0.5
        return self.low + min(0.9, max(0.1, part)) * wide

    def take(self, level: float, share: float) -> bool:
        """Note what a vote at a level would leave, and tell whether to take it."""
        self.tries += 1
        if share < self.target:
            self.high, self.high_share = level, share
            return False
        self.low, self.low_share = level, share
        if self.high - level < 1e-3:  # what was too much before is less now: tokens drift
            self.high, self.high_share = min(level + 1.0, -1e-6), 0.0
        return True


@dataclass(slots=True)
class CallState:
    """The state of one key.

    Attributes:
        layout: the sequence that the bits are of.
        batch: its rows.
        block: tokens of its tiles.
        order: the order of its tokens.
        bits: int32 [B, H, NQ, W], tiles of the next call; None: all of them.
        calls: calls made since it began.
        votes: calls of them that voted.
        spent: share of the budget that votes were given.
        search: of the threshold for a target density; None: it is given.
        level: what the running call votes with, under a search.
        listed: int32 bits of the running call's exact tiles before any choice; under a search.
        pinned: int32 bits of its pinned tiles; under a search.
        given: the running call's selection, where it may be repeated.
    """

    layout: TokenLayout
    batch: int
    block: int
    order: Tensor | None
    bits: Tensor | None = None
    calls: int = 0
    votes: int = 0
    spent: float = 0.0
    search: Search | None = None
    level: float = 0.0
    listed: Tensor | None = None
    pinned: Tensor | None = None
    given: Selection | None = None

    def fits(self, moment: Moment, block: int, order: Tensor | None) -> bool:
        """Tell whether the bits mean what the call's tiles mean."""
        if (self.layout, self.batch, self.block) != (moment.layout, moment.batch, block):
            return False
        if self.order is None or order is None:
            return self.order is order
        return self.order is order or (len(self.order) == len(order) and bool((self.order == order).all()))


class States:
    """The states of one attachment by key, and how much memory they hold."""

    def __init__(self) -> None:
        self.by_key: dict[Key, CallState] = {}
        self.held = 0
        self.peak = 0

    def put(self, key: Key, state: CallState) -> None:
        """Begin a key's state, or begin it anew."""
        self.drop(key)
        self.by_key[key] = state

    def drop(self, key: Key) -> None:
        """Forget a key's state."""
        state = self.by_key.pop(key, None)
        if state is not None and state.bits is not None:
            self.held -= state.bits.nbytes

    def keep(self, state: CallState, bits: Tensor) -> None:
        """Make ``bits`` those of the next call; the old ones live on only where a plan waits for its backward."""
        if state.bits is None:
            self.held += bits.nbytes
            self.peak = max(self.peak, self.held)
        state.bits = bits

    def clear(self) -> None:
        """Forget everything."""
        self.by_key.clear()
        self.held = 0
