"""DBCache and FirstBlockCache: the first blocks always run, and tell whether those in the middle may be skipped.

Sources: DBCache (cache-dit) and First Block Cache (ParaAttention; diffusers), which is DBCache with one first block.
Where we depart from them: the first branch of a step decides for all of them; any predictor in place of holding; a
model may change its streams between two blocks.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ...adapters.blocks import Streams
from ...errors import ConfigError
from ...plan.context import StepContext
from ...report.sections import Section
from ..base import Model
from ..config import MethodConfig
from ..options import Count, ge
from ..site import Block, ForwardContext, Site
from .cache_config import MeasuredCacheConfig, StepCacheConfig
from .easy import mean_size, spent_size
from .engine import StepDecision
from .log import extended
from .ranks import ratio
from .spans import SpanHandler, versions_of


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstBlockCache(MeasuredCacheConfig):
    """Skips all blocks but the first while what that one adds hardly changes (First Block Cache of ParaAttention).

    With r what the first block adds to the visual stream, a step is skipped while |r - r'| / |r'| is below the
    threshold, r' of the last computed step. |.| is the mean of the absolute values. What the skipped blocks add is
    forecast.
    """

    name: ClassVar[str] = "firstblockcache"
    defaults: ClassVar[Mapping[str, Any]] = {"threshold": 0.08, "warmup_steps": 0.2, "last_steps": 1}

    first_blocks: ClassVar[int] = 1
    last_blocks: ClassVar[int] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DBCache(MeasuredCacheConfig):
    """Skips the blocks in the middle while what the first ones add hardly changes (DBCache of cache-dit).

    As `FirstBlockCache`, with more blocks that always run.

    Attributes:
        first_blocks: blocks that run at every step before it is decided; Fn. More tell more, and save less.
        last_blocks: blocks that run at every step after the forecast, and mend it; Bn.
    """

    name: ClassVar[str] = "dbcache"
    defaults: ClassVar[Mapping[str, Any]] = {**FirstBlockCache.defaults, "first_blocks": 8, "last_blocks": 0}

    first_blocks: Count | None = None
    last_blocks: Annotated[int, ge(0)] | None = None


@dataclass(slots=True)
class BlockDecision(StepDecision):
    """What the first blocks showed."""

    added: Tensor | None = None  # what they added to the visual stream at the last computed step


class DBHandler(SpanHandler):
    """DBCache on one model: what spans of blocks in the middle add is stored, and forecast in their place."""

    config_type: ClassVar[type[MethodConfig]] = DBCache
    decision_type = BlockDecision
    settings: FirstBlockCache | DBCache  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: StepCacheConfig, model: Model) -> None:
        super().__init__(config, model)
        first, last = self.settings.first_blocks, self.settings.last_blocks
        assert first is not None
        assert last is not None
        self._first_blocks, self._last_blocks = first, last

    def indicator(self, context: ForwardContext, decision: BlockDecision) -> float | None:
        """Return the relative change of what the first blocks add since a computed step; waits for the device."""
        now, before = self._passes[context.transformer].added, decision.added
        if now is None or before is None:  # another method left the first blocks out
            return None
        return ratio(*self.numbers(context, spent_size(now - before), mean_size(before)))

    def seen(self, context: ForwardContext, decision: BlockDecision) -> None:
        if not decision.reuse:
            decision.added = self._passes[context.transformer].added

    def install(self, site: Site) -> None:
        first, last = self._first_blocks, self._last_blocks
        middle = self.blocks_between(site, first, last)
        for block in site.blocks[first + len(middle) :]:
            if takes_skips(block):
                raise ConfigError(
                    f"{self.name}.last_blocks = {last} can't run {block.name} of {site.name}, which takes what earlier "
                    "blocks gave besides its streams, and those are skipped; use last_blocks = 0"
                )
        site.around_blocks(self._run_first, site.blocks[:first])
        self.cover_blocks(site, middle)

    def _run_first(
        self, step: StepContext, block: Block, run: Callable[[Streams], Streams], streams: Streams
    ) -> Streams:
        now, versions = self._passes.get(step.transformer), versions_of(streams)
        output = run(streams)
        if now is not None:
            now.require_unwritten(streams, versions, block.index)
            now.note_first(streams, output)
        return output

    def report(self) -> Section | None:
        always = self._first_blocks + self._last_blocks
        lines = [f"{name}: a reused forward runs {always} of {count} blocks" for name, count in self._counts.items()]
        return extended(super().report(), lines, blocks_always_run=always)


class FirstBlockHandler(DBHandler):
    """FirstBlockCache on one model."""

    config_type = FirstBlockCache


def takes_skips(block: Block) -> bool:
    """Tell whether a block also takes outputs of earlier blocks, as HunyuanDiT's late ones do."""
    return "skip" in inspect.signature(type(block.module).forward).parameters
