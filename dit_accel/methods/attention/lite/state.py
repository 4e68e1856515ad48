"""What LiteAttention carries from call to call: a bitmap for each attention module, branch and row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_accel_kernels import Selection
from torch import Tensor

from ....plan.context import CallContext, Key
from ....plan.layout import TokenLayout

if TYPE_CHECKING:
    from .scores import DensityCalibrator


@dataclass(slots=True)
class CallState:
    """The state of one key.

    Attributes:
        layout: the sequence that the bits are of.
        block: tokens of its tiles.
        order: the order of its tokens.
        bits: int32 [B, H, NQ, W], tiles of the next call; None: all of them.
        calls: calls made since it began.
        votes: how many of them voted.
        spent: share of the budget that votes were given.
        calibrator: what finds the threshold for a target density; None: it is given.
        counts: the first call's scores in bins, for the calibrator; None once the calibrator was asked.
        given: the running call's selection, where it may be repeated.
    """

    layout: TokenLayout
    block: int
    order: Tensor | None
    bits: Tensor | None = None
    calls: int = 0
    votes: int = 0
    spent: float = 0.0
    calibrator: "DensityCalibrator | None" = None
    counts: Tensor | None = None
    given: Selection | None = None

    def fits(self, context: CallContext, block: int, order: Tensor | None) -> bool:
        """Tell whether the bits mean what the call's tiles mean."""
        if (self.layout, self.block) != (context.layout, block):
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
