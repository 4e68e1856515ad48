"""DBCache and FirstBlockCache: the first blocks always run, and tell whether those in the middle may be skipped.

Sources: DBCache (cache-dit) and First Block Cache (ParaAttention; diffusers), which is DBCache with one first block.
Where we depart from them: the first branch of a step decides for all of them; any predictor in place of holding; a
model may change its streams between two blocks, and what it adds there, such as a control branch's hints, is always
this step's own.
"""

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...adapters.blocks import Streams
from ...errors import ConfigError
from ...plan.context import StepContext
from ...report.sections import Section
from ..base import Model, Place
from ..config import MethodConfig
from ..site import Block, ForwardContext, Site
from .active import require_no_cache
from .config import MeasuredCacheConfig, StepCacheConfig
from .easy import mean_size
from .engine import Decider, StepCacheHandler, is_recorded, requires_grad
from .history import History, shapes_of
from .ranks import ratio

DEFAULTS: Mapping[str, Any] = {"threshold": 0.08, "warmup_steps": 0.2, "last_steps": 1}
"""What an option is where neither the user nor the model's recipe sets it: the threshold is DBCache's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstBlockCache(MeasuredCacheConfig):
    """Skips all blocks but the first while what that one adds hardly changes (First Block Cache of ParaAttention).

    With r what the first block adds to the visual stream, a step is skipped while |r - r'| / |r'| is below the
    threshold, r' of the last computed step. |.| is the mean of the absolute values. What the skipped blocks add is
    forecast.

    Attributes:
        threshold: 0 skips nothing.

    Raises:
        ConfigError: for an option out of range.
    """

    name: ClassVar[str] = "firstblockcache"
    defaults: ClassVar[Mapping[str, Any]] = DEFAULTS

    first_blocks: ClassVar[int] = 1
    last_blocks: ClassVar[int] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DBCache(MeasuredCacheConfig):
    """Skips the blocks in the middle while what the first ones add hardly changes (DBCache of cache-dit).

    As `FirstBlockCache`, with more blocks that always run.

    Attributes:
        first_blocks: blocks that run at every step before it is decided; Fn. More tell more, and save less.
        last_blocks: blocks that run at every step after the forecast, and mend it; Bn.
        threshold: 0 skips nothing.

    Raises:
        ConfigError: for an option out of range.
    """

    name: ClassVar[str] = "dbcache"
    defaults: ClassVar[Mapping[str, Any]] = {**DEFAULTS, "first_blocks": 8, "last_blocks": 0}

    first_blocks: int | None = None
    last_blocks: int | None = None

    def __post_init__(self) -> None:
        MeasuredCacheConfig.__post_init__(self)
        for field, least in (("first_blocks", 1), ("last_blocks", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ConfigError(
                    f"dbcache.{field} must be >= {least}, got {value}; leave it unset for {self.defaults[field]}"
                )


@dataclass(slots=True)
class BlockDecider(Decider):
    """What the first blocks told.

    Attributes:
        added: what they added to the visual stream at the last computed step.
    """

    added: Tensor | None = None


class Pass:
    """One forward that is under way.

    Attributes:
        context: the forward.
        needing: the method that needs the step.
        time: the time of its step.
        shapes: of its inputs.
        apart: every block of the middle is a span of its own.
        reuse: the middle is skipped; None: that is not decided yet.
        stored: last block of a span -> what such a span added at the steps before.
        called: the blocks of the middle so far.
        spans: the same, where they are computed. The blocks of a span hand on the very tensors that they give; where
            the model changes a stream between two blocks, another span begins.
        taken: the streams that the first block of the last span took.
        given: the streams that the last block gave.
    """

    def __init__(self, context: ForwardContext, needing: str | None) -> None:
        self.context = context
        self.needing = needing
        self.time = math.nan
        self.shapes = shapes_of(dict(context.inputs))
        # some models write what a control network gives into a stream, which then can't be told from the block's own
        self.apart = any("controlnet" in name and value is not None for name, value in context.inputs.items())
        self.reuse: bool | None = None
        self.stored: dict[int, History] = {}
        self.called: list[int] = []
        self.spans: list[list[int]] = []
        self.taken: Streams = ()
        self.given: Streams = ()
        self._versions: list[int] = []
        self._start: Tensor | None = None
        self._end: Tensor | None = None

    def note_first(self, taken: Streams, given: Streams) -> None:
        """Note what one of the first blocks took and gave."""
        if self._start is None or taken[0] is None or self._start.shape != taken[0].shape:
            self._start = taken[0]  # another list of blocks may join text and video
        self._end = given[0]

    @cached_property
    def added(self) -> Tensor | None:
        """What the first blocks added to the visual stream.

        Raises:
            ConfigError: if what they took and gave differs in shape.
        """
        if self._start is None or self._end is None:
            return None
        if self._start.shape != self._end.shape:
            raise ConfigError(
                f"what the first block adds can't be told: {self.context.transformer} gives it "
                f"{list(self._start.shape)}, of which it makes {list(self._end.shape)}, as context parallelism does "
                "inside it; use DBCache with first_blocks = 2 or more"
            )
        return (self._end - self._start).detach()

    def begins_span(self, streams: Streams) -> bool:
        """Tell whether a block of the middle takes other tensors than the last one gave.

        Raises:
            ConfigError: if the model wrote into those that the last one gave.
        """
        alike = len(self.given) == len(streams) and all(map(operator.is_, self.given, streams))
        if self.apart or not alike:
            return True
        if self._versions != _versions_of(streams):
            raise ConfigError(
                f"{self.context.transformer} writes into the streams that its block {self.called[-1]} gave, so that "
                "what the block adds can't be told; use a cache of whole forwards, such as EasyCache"
            )
        return False

    def note(self, given: Streams) -> None:
        """Note what a block of the middle gave."""
        self.given, self._versions = given, _versions_of(given)


class DBHandler(StepCacheHandler):
    """DBCache on one model: what spans of blocks in the middle add is stored, and forecast in their place."""

    config_type: ClassVar[type[MethodConfig]] = DBCache
    places = frozenset({Place.FORWARD, Place.BLOCKS})
    decider_type = BlockDecider
    settings: FirstBlockCache | DBCache  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: StepCacheConfig, model: Model) -> None:
        super().__init__(config, model)
        self._first_blocks, self._last_blocks = self.settings.first_blocks or 0, self.settings.last_blocks or 0
        self._passes: dict[str, Pass] = {}
        self._counts: dict[str, int] = {}

    def indicator(self, context: ForwardContext, decider: BlockDecider) -> float | None:
        """Return how much of what the first blocks add changed since the last computed step; waits for the device."""
        now, before = self._passes[context.transformer].added, decider.added
        if now is None or before is None or now.shape != before.shape:
            return None
        return ratio(*self.numbers(context, mean_size(now - before), mean_size(before)))

    def seen(self, context: ForwardContext, decider: BlockDecider) -> None:
        """Keep what the first blocks added, where the step is computed."""
        if not decider.reuse:
            decider.added = self._passes[context.transformer].added

    def install(self, site: Site) -> None:
        """Run around the forward, its first blocks, and those in the middle.

        Raises:
            ConfigError: if another cache is active on the transformer, or no block is left to skip.
        """
        require_no_cache(site.name, site.transformer, self.settings.asked)
        first, last, count = self._first_blocks, self._last_blocks, len(site.blocks)
        if first + last >= count:
            raise ConfigError(
                f"{self.name} runs {first} first and {last} last blocks at every step, and {site.name} has {count}: "
                "none is left to skip; ask for fewer"
            )
        for block in site.blocks[count - last :] if last else ():
            if "skip" in inspect.signature(type(block.module).forward).parameters:
                raise ConfigError(
                    f"{self.name}.last_blocks = {last} can't run {block.name} of {site.name}, which takes what earlier "
                    "blocks gave besides its streams, and those are skipped; use last_blocks = 0"
                )
        self._transformers[site.name], self._counts[site.name] = site.transformer, count
        site.around_forward(lambda context, run: self._around(context, run, site.adapter.latents, site.name))
        site.around_blocks(self._run_first, site.blocks[:first])
        site.around_blocks(self._run_middle, site.blocks[first : count - last])

    def _around(self, context: ForwardContext, run: Callable[..., Any], name: str, transformer: str) -> Any:
        if context.training or is_recorded(context.inputs[name]):
            return run()
        now = self._passes[transformer] = Pass(context, super()._needing(context))
        try:
            output = run()
        finally:
            del self._passes[transformer]
        if now.reuse:
            self._require_same_blocks(now)
        elif any(requires_grad(leaf) for leaf in tree_leaves(output)):
            self._keep(context, ())
        elif now.reuse is not None:
            self._take(now)
            self._keep(context, now.spans)
        self._peak = max(self._peak, self._held())
        return output

    def _run_first(
        self, step: StepContext, block: Block, run: Callable[[Streams], Streams], streams: Streams
    ) -> Streams:
        given = run(streams)
        if (now := self._passes.get(step.transformer)) is not None:
            now.note_first(streams, given)
        return given

    def _run_middle(
        self, step: StepContext, block: Block, run: Callable[[Streams], Streams], streams: Streams
    ) -> Streams:
        """Run a block, or skip it; the last one of a span that is skipped gives what the span would have added."""
        now = self._passes.get(step.transformer)
        if now is None:
            return run(streams)
        if now.reuse is None:
            self._open(now)
        if now.reuse:
            now.called.append(block.index)
            history = now.stored.get(block.index)
            if history is None:
                return streams
            return history.forecast(streams, now.context.step_index, now.time, self._end(now.context))
        if now.begins_span(streams):
            self._take(now)
            now.spans.append([])
            now.taken = streams
        now.called.append(block.index)
        now.spans[-1].append(block.index)
        given = run(streams)
        now.note(given)
        if now.apart:
            self._take(now)
        return given

    def _open(self, now: Pass) -> None:
        """Decide for a forward, of which the first blocks ran."""
        context = now.context
        now.time = self._begin(context)
        if any(history.shapes != now.shapes for history in self._spans(context).values()):
            self._keep(context, ())
        spans = self._spans(context)
        now.stored = {span[-1]: history for span, history in spans.items()}
        *_, now.reuse = self._settle(context, bool(spans))

    def _take(self, now: Pass) -> None:
        """Store what the last span of a forward added, unless that was done."""
        if not now.given:
            return
        key = now.context.transformer, now.context.branch, tuple(now.spans[-1])
        if key not in self._histories:
            self._histories[key] = self._new_history(now.shapes)
        self._histories[key].take(now.given, now.taken, now.context.step_index, now.time)
        now.taken = now.given = ()

    def _keep(self, context: ForwardContext, spans: Sequence[Sequence[int]]) -> None:
        """Drop what other spans of a branch added."""
        kept = {tuple(span) for span in spans}
        for span in self._spans(context):
            if span not in kept:
                del self._histories[context.transformer, context.branch, span]

    def _spans(self, context: ForwardContext) -> dict[tuple[int, ...], History]:
        """Return a branch's spans, and what they added."""
        key = context.transformer, context.branch
        return {span: history for (*of, span), history in self._histories.items() if tuple(of) == key}

    def _stored(self, context: ForwardContext) -> bool:
        return bool(self._spans(context))

    def _needing(self, context: ForwardContext) -> str | None:
        return self._passes[context.transformer].needing

    def _require_same_blocks(self, now: Pass) -> None:
        """Raise `ConfigError` if other blocks were called than those whose additions were forecast."""
        stored = sorted(index for span in self._spans(now.context) for index in span)
        if stored != now.called:
            raise ConfigError(
                f"{self.name} stored what the blocks {stored} of {now.context.transformer} add, and in step "
                f"{now.context.step_index} the blocks {now.called} were called: another method skips some in this "
                "step alone; attach one of the two"
            )

    def report(self) -> Section | None:
        """Return what was computed and reused in the last generation, and how many blocks a reused forward runs."""
        section = super().report()
        if section is None:
            return None
        always = self._first_blocks + self._last_blocks
        lines = [f"{name}: a reused forward runs {always} of {count} blocks" for name, count in self._counts.items()]
        data = {**section.data, "blocks": dict(self._counts), "blocks_always_run": always}
        return replace(section, lines=(*section.lines, *lines), data=data)


class FirstBlockHandler(DBHandler):
    """FirstBlockCache on one model."""

    config_type = FirstBlockCache


def _versions_of(streams: Streams) -> list[int]:
    """Return how often each stream was written to; 0 in inference mode, where torch does not count that."""
    return [0 if stream is None or stream.is_inference() else stream._version for stream in streams]
