"""DBPrune: every block is skipped by itself while its own input hardly changes.

Source: DBPrune (cache-dit). Where we depart from it: the first branch of a step decides for all of them; any predictor
in place of holding; a threshold that follows the changes never falls below the one that is set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ...adapters.blocks import Streams
from ...errors import ConfigError
from ..options import NO_FILE, ge
from ..site import Block, ForwardContext, Site
from .block_numbers import kinds_of, read_numbers, require_there
from .cache_config import MeasuredCacheConfig
from .easy import mean_size
from .engine import StepDecision
from .ranks import ratio
from .spans import Pass, Span, SpanHandler

RELAXED = 1.25
"""A threshold that follows the changes over their mean in the last step, as cache-dit has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DBPrune(MeasuredCacheConfig):
    """Skips each block while its own input hardly changes (DBPrune of cache-dit).

    With x the visual stream that a block takes, and x' the one at the last step at which it ran, the block is skipped
    while |x - x'| / |x'| is below the threshold, and what it would add is forecast. |.| is the mean of the absolute
    values. The device is waited for once a block. ``max_consecutive`` counts steps in which blocks may be skipped.

    Attributes:
        max_threshold: up to this the threshold rises, to 1.25 times the mean change of the blocks in the last step;
            unset: it stays.
        first_blocks: first blocks that always run.
        last_blocks: last blocks that always run.
        keep: further blocks that always run, such as ``"3, 7-9"``.
    """

    name: ClassVar[str] = "dbprune"
    defaults: ClassVar[Mapping[str, Any]] = {
        "threshold": 0.08, "warmup_steps": 0.2, "last_steps": 1, "first_blocks": 1, "last_blocks": 0,
    }  # fmt: skip

    max_threshold: float | None = None
    first_blocks: Annotated[int, ge(0)] | None = None
    last_blocks: Annotated[int, ge(0)] | None = None
    keep: Annotated[str, NO_FILE] | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        MeasuredCacheConfig.__post_init__(self)
        if self.max_threshold is not None and self.max_threshold < (self.threshold or 0):
            raise ConfigError(
                f"dbprune.max_threshold = {self.max_threshold} must be at least dbprune.threshold = {self.threshold}; "
                "the threshold rises up to it"
            )
        if self.keep is not None:
            read_numbers(self.keep, "dbprune.keep")


@dataclass(slots=True)
class PruneDecision(StepDecision):
    """What the blocks' inputs showed.

    Attributes:
        inputs: block -> the visual stream that it took when it ran last.
        skipped: the blocks that are skipped in this step.
        changes: the changes of the blocks that were measured in this step.
        limit: the threshold of this step.
    """

    inputs: dict[int, Tensor] | None = None
    skipped: frozenset[int] = frozenset()
    changes: tuple[float, ...] = ()
    limit: float = 0.0


class PruneHandler(SpanHandler):
    """DBPrune on one model: every block is a span of its own."""

    config_type = DBPrune
    decision_type = PruneDecision
    settings: DBPrune  # pyright: ignore[reportIncompatibleVariableOverride]

    def install(self, site: Site) -> None:
        """Run around the forward and what may be skipped of it; raise `ConfigError` if no block is left to skip."""
        self.require_free(site)
        settings, count = self.settings, len(site.blocks)
        kept = read_numbers(settings.keep, "dbprune.keep") if settings.keep is not None else ()
        require_there(kept, "dbprune.keep", site.name, count, kinds_of(site.blocks))
        first, last = settings.first_blocks or 0, count - (settings.last_blocks or 0)
        left = tuple(block for block in site.blocks if first <= block.index < last and block.index not in kept)
        if not left:
            raise ConfigError(
                f"dbprune always runs {first} first, {count - last} last and {len(kept)} kept blocks, and {site.name} "
                f"has {count}: none is left to skip; ask for fewer"
            )
        self.cover_blocks(site, left)

    def _measured(self, context: ForwardContext, decision: StepDecision) -> tuple[bool, str]:
        """Return that blocks may be skipped in a step: each is measured when it is called."""
        return (self.settings.threshold or 0) > 0, "each block measured"

    def seen(self, context: ForwardContext, decision: PruneDecision) -> None:
        """Set the threshold of a step that begins."""
        settings, changes = self.settings, decision.changes
        decision.limit = settings.threshold or 0.0
        if changes and settings.max_threshold is not None:
            relaxed = RELAXED * sum(changes) / len(changes)
            decision.limit = max(decision.limit, min(relaxed, settings.max_threshold))
        decision.skipped, decision.changes = frozenset(), ()

    def skips(self, now: Pass, block: Block, streams: Streams) -> bool:
        """Tell whether a block is skipped: by its input in the branch that decides, as that one was in the others."""
        decision = now.decision
        assert isinstance(decision, PruneDecision)
        if block.index not in now.stored:
            return False
        if not now.leads:
            return block.index in decision.skipped
        x, before = streams[0], (decision.inputs or {}).get(block.index)
        if x is None or before is None:
            return False
        change = ratio(*self.numbers(now.context, mean_size(x - before, spent=True), mean_size(before)))
        decision.changes += (change,)
        if not change < decision.limit:  # nor where it is not a number
            return False
        decision.skipped |= {block.index}
        return True

    def joins(self, now: Pass, block: Block) -> bool:
        """No block is of one span with another."""
        return False

    def ran(self, now: Pass, block: Block, taken: Streams) -> None:
        """Keep what a block took that ran."""
        decision = now.decision
        assert isinstance(decision, PruneDecision)
        if taken[0] is not None:
            decision.inputs = {**(decision.inputs or {}), block.index: taken[0]}

    def due(self, now: Pass) -> list[Span]:
        """Return the blocks that were skipped: whichever they are, each was stored by itself."""
        return [(index,) for index in sorted(now.skipped)]
