"""What an observer sees of a planned attention call."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..plan.call import Call
from ..plan.context import CallContext
from ..plan.plan import AttentionPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedCall:
    """One planned attention call, as an observer sees it. Tensors are [B, H, S, D] views of the run's own: don't write.

    Attributes:
        plan: what ran.
        context: where the denoising stood.
        call: q, k and v as the model gave them, its mask and scale.
        out: the output that the model gets.
        planned: the output before methods corrected it; None where none corrects.
        exact: the tiles that a selection left exact, bits int32 [B, H, NQ, W]; None without a selection.
    """

    plan: AttentionPlan
    context: CallContext
    call: Call
    out: Tensor
    planned: Tensor | None = None
    exact: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """The tokens of the queries and of the output, int64, rising; None: all. See `Call.rows`."""
        return self.call.rows


Observer = Callable[[PlannedCall], None]
