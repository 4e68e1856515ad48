"""DBPrune: every block is skipped by itself while its own input hardly changes.

Source: DBPrune (cache-dit). Where we depart from it: the first branch of a step decides for all of them; any predictor
in place of holding; the threshold stays as it is set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ...adapters.blocks import Streams
from ..options import ge
from ..site import Block, ForwardContext, Site
from .cache_config import MeasuredCacheConfig
from .easy import mean_size, spent_size
from .engine import StepDecision
from .ranks import ratio
from .spans import Pass, Span, SpanHandler


@dataclass(frozen=True, slots=True, kw_only=True)
class DBPrune(MeasuredCacheConfig):
    """Skips each block while its own input hardly changes (DBPrune of cache-dit).

    With x the visual stream that a block takes, and x' the one at the last step at which it ran, the block is skipped
    while |x - x'| / |x'| is below the threshold, and what it would add is forecast. |.| is the mean of the absolute
    values. The device is waited for once a block. ``max_consecutive`` counts steps in which blocks may be skipped.

    Attributes:
        first_blocks: first blocks that always run.
        last_blocks: last blocks that always run.
    """

    name: ClassVar[str] = "dbprune"
    defaults: ClassVar[Mapping[str, Any]] = {
        "threshold": 0.08, "warmup_steps": 0.2, "last_steps": 1, "first_blocks": 1, "last_blocks": 0,
    }  # fmt: skip

    first_blocks: Annotated[int, ge(0)] | None = None
    last_blocks: Annotated[int, ge(0)] | None = None


@dataclass(slots=True)
class PruneDecision(StepDecision):
    """What the blocks' inputs showed."""

    inputs: dict[int, Tensor] = field(default_factory=dict)  # block -> the visual stream that it took when it ran last
    skipped: frozenset[int] = frozenset()  # the blocks that are skipped in this step


class PruneHandler(SpanHandler):
    """DBPrune on one model: every block is a span of its own."""

    config_type = DBPrune
    decision_type = PruneDecision
    settings: DBPrune  # pyright: ignore[reportIncompatibleVariableOverride]

    def install(self, site: Site) -> None:
        first, last = self.settings.first_blocks, self.settings.last_blocks
        assert first is not None
        assert last is not None
        self.cover_blocks(site, self.blocks_between(site, first, last))

    def _measured(self, context: ForwardContext, decision: StepDecision) -> tuple[bool, str]:
        """Leave the step to its blocks, each of which is measured when it is called."""
        return bool(self.settings.threshold), "each block measured"

    def seen(self, context: ForwardContext, decision: PruneDecision) -> None:
        decision.skipped = frozenset()

    def skips(self, now: Pass, block: Block, streams: Streams) -> bool:
        """Tell whether a block is skipped: by its input in the branch that decides, and as there in the others."""
        decision, threshold = now.decision, self.settings.threshold
        assert isinstance(decision, PruneDecision)
        assert threshold is not None
        if block.index not in now.stored:
            return False
        if not now.leads:
            return block.index in decision.skipped
        x, before = streams[0], decision.inputs.get(block.index)
        if before is None:
            return False
        assert x is not None
        change = ratio(*self.numbers(now.context, spent_size(x - before), mean_size(before)))
        if not change < threshold:  # nor where it is not a number
            return False
        decision.skipped |= {block.index}
        return True

    def joins(self, now: Pass, block: Block) -> bool:
        return False

    def ran(self, now: Pass, block: Block, taken: Streams) -> None:
        decision = now.decision
        assert isinstance(decision, PruneDecision)
        assert taken[0] is not None
        decision.inputs[block.index] = taken[0]

    def due(self, now: Pass) -> list[Span]:
        """Return the blocks that were skipped: whichever they are, each was stored by itself."""
        return [(index,) for index in now.skipped]
