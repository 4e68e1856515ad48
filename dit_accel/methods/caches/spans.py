"""What all caches of blocks share: what spans of blocks add is stored, and forecast in their place.

A span is a run of blocks that hand on the very tensors that they give. A model may change its streams between two
blocks, and what it adds there, such as a control branch's hints, is always this step's own.
"""

import operator
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...adapters.blocks import Streams
from ...errors import ConfigError
from ...plan.context import StepContext
from ...report.sections import Section
from ..base import Model, Place
from ..gradients import is_recorded
from ..site import Block, ForwardContext, Site
from .cache_config import StepCacheConfig
from .engine import StepCacheHandler, StepDecision
from .history import BranchOutput, History, given_beside, tensor_shapes
from .log import extended

Span = tuple[int, ...]
"""The blocks of a span, in the order in which they were called."""


class Pass:
    """One forward that is under way."""

    def __init__(self, context: ForwardContext, needing: str | None) -> None:
        self.context = context  # the forward
        self.needing = needing  # the method that needs the step
        self.shapes: Any = None  # of its inputs, and of the streams that the first block takes that may be skipped
        # some models write what a control network gives into a stream: then what is the block's own is not known
        # every block is a span of its own
        self.apart = any("controlnet" in name and value is not None for name, value in context.inputs.items())
        self.decision: StepDecision | None = None  # who decides for it, once that is known
        self.leads: bool  # it is the forward that is measured
        self.reuse: bool | None = None  # blocks are skipped; None: that is not decided yet
        self.stored: dict[int, History] = {}  # last block of a span -> what such a span added at the steps before
        # the same of what such a span gives in the branch that it runs beside; empty: there is none
        self.beside: dict[int, BranchOutput | None] = {}
        self.skipped: list[int] = []  # the blocks that were skipped so far
        self.called: int  # the last block that was called
        # the blocks that were computed so far. The blocks of a span hand on the very tensors that they give; where the
        # model changes a stream between two blocks, another span begins.
        self.spans: list[list[int]] = []
        self.taken: Streams = ()  # the streams that the first block of the last span took
        self.given: Streams = ()  # the streams that the last block gave
        self._versions: list[int] = []
        self._taken_versions: list[int] = []
        self._start: Tensor | None = None
        self._end: Tensor | None = None

    def note_first(self, taken: Streams, outputs: Streams) -> None:
        """Note what one of the first blocks took and gave."""
        assert taken[0] is not None
        if self._start is None or self._start.shape != taken[0].shape:
            self._start = taken[0]  # another list of blocks may join text and video
        self._end = outputs[0]

    @cached_property
    def added(self) -> Tensor | None:
        """What the first blocks added to the visual stream; raise `ConfigError` if they changed its shape."""
        if self._start is None:
            return None
        assert self._end is not None
        if self._start.shape != self._end.shape:
            raise ConfigError(
                f"what the first block adds is not known: {self.context.transformer} gives it "
                f"{list(self._start.shape)}, of which it makes {list(self._end.shape)}, as context parallelism does "
                "inside it; use DBCache with first_blocks = 2 or more"
            )
        with torch.no_grad():
            return self._end - self._start

    def require_unwritten(self, taken: Streams, versions: list[int], block: int) -> None:
        """Raise `ConfigError` if what a block took was written into since it had some versions."""
        if versions != versions_of(taken):
            raise ConfigError(
                f"{self.context.transformer} writes into the streams that its block {block} took, so that what the "
                "block adds is not known; use a cache of whole forwards, such as EasyCache"
            )

    def begins_span(self, streams: Streams) -> bool:
        """Tell whether a block takes other tensors than the last one gave; refuse models that write into these."""
        alike = len(self.given) == len(streams) and all(map(operator.is_, self.given, streams))
        if self.apart or not alike:
            return True
        if self._versions != versions_of(streams):
            raise ConfigError(
                f"{self.context.transformer} writes into the streams that its block {self.called} gave, so that "
                "what the block adds is not known; use a cache of whole forwards, such as EasyCache"
            )
        return False

    def begin_span(self, taken: Streams) -> None:
        """Note what the first block of a span is about to take."""
        self.spans.append([])
        self.taken, self._taken_versions = taken, versions_of(taken)

    def note(self, outputs: Streams) -> None:
        """Note what a block gave; raise `ConfigError` if the span wrote into what its first block took."""
        self.require_unwritten(self.taken, self._taken_versions, self.spans[-1][0])
        self.given, self._versions = outputs, versions_of(outputs)


class SpanHandler(StepCacheHandler):
    """A cache of blocks on one model."""

    places = frozenset({Place.FORWARD, Place.BLOCKS})
    exclusive = frozenset({"cache", "tokens of blocks"})

    def __init__(self, config: StepCacheConfig, model: Model) -> None:
        super().__init__(config, model)
        if config.predictor == "corrected":
            raise ConfigError(
                f"{config.name}.predictor = 'corrected' is for caches of whole forwards, such as EasyCache, and "
                f"{config.name} skips blocks: use 'taylor'"
            )
        self._passes: dict[str, Pass] = {}
        self._counts: dict[str, int] = {}
        self._ran: list[tuple[int, int]] = []  # blocks computed and blocks in all, of each forward

    # What a cache says.

    def skips(self, now: Pass, block: Block, streams: Streams) -> bool:
        """Tell whether a block is skipped in a forward in which some are; called once, in running order."""
        return True

    def joins(self, now: Pass, block: Block) -> bool:
        """Tell whether a block may belong to the span of the block before it."""
        return True

    def ran(self, now: Pass, block: Block, taken: Streams) -> None:
        """Note what a block took that ran in the branch that decides; what the decision keeps of it is copied."""

    def due(self, now: Pass) -> list[Span]:
        """Return the stored spans that had to be skipped whole in this forward."""
        return [*self._spans(now.context, followed=True)] if now.reuse else []

    # What all of them share.

    def blocks_between(self, site: Site, first: int, last: int) -> tuple[Block, ...]:
        """Return the blocks between the first and last ones, which always run; refuse a model that has none."""
        count = len(site.blocks)
        if first + last >= count:
            raise ConfigError(
                f"{self.name} runs {first} first and {last} last blocks at every step, and {site.name} has {count}: "
                "none is left to skip; ask for fewer"
            )
        return site.blocks[first : count - last]

    def cover_blocks(self, site: Site, blocks: tuple[Block, ...]) -> None:
        """Run around the forwards of a transformer, and around the blocks that may be skipped."""
        self._counts[site.name] = len(site.blocks)
        self.cover(site)
        site.around_blocks(self._run_cached, blocks)

    def _around(self, context: ForwardContext, run: Callable[..., Any], site: Site) -> Any:
        if self.is_trained(context, context.inputs[site.adapter.latents]):
            self._keep(context, ())
            return run()
        now = self._passes[site.name] = Pass(context, super()._needing(context))
        try:
            output = run()
        finally:
            del self._passes[site.name]
        if not now.reuse and is_recorded(output):
            self._keep(context, ())
        elif now.reuse is not None:
            self._require_whole_spans(now)
            self._take(now)
            skipped = [span for span in self._spans(context) if {*span} <= {*now.skipped}]
            self._keep(context, [*now.spans, *skipped])
        count = self._counts[site.name]
        self._ran.append((count - len(now.skipped), count))
        return output

    def _run_cached(
        self, step: StepContext, block: Block, run: Callable[[Streams], Streams], streams: Streams
    ) -> Streams:
        """Run a block, or skip it; the last one of a span that is skipped gives what the span would have added."""
        now = self._passes.get(step.transformer)
        if now is None:
            return run(streams)
        if now.reuse is None:
            self._open(now, streams)
        if now.reuse and self.skips(now, block, streams):
            now.skipped.append(block.index)
            now.called = block.index
            history = now.stored.get(block.index)
            if history is None:
                return streams
            beside = now.beside.get(block.index)
            return history.forecast(streams, now.context.step_index, self._end(now.context), beside)
        if now.begins_span(streams) or not self.joins(now, block):
            self._take(now)
            now.begin_span(streams)
        now.called = block.index
        now.spans[-1].append(block.index)
        output = run(streams)
        now.note(output)
        assert now.decision is not None
        if now.leads:
            self.ran(now, block, streams)
            now.decision.copy_shared(streams)
        if now.apart:
            self._take(now)
        return output

    def _open(self, now: Pass, streams: Streams) -> None:
        """Decide for a forward whose first block that may be skipped is called."""
        context = now.context
        now.shapes = tensor_shapes((dict(context.inputs), streams))
        self._begin(context)
        self._keep(context, [span for span, history in self._spans(context).items() if history.shapes == now.shapes])
        spans, stored = self._spans(context, followed=True), self._spans(context)
        now.beside = {span[-1]: self._beside(now, span) for span in spans}
        now.stored = {span[-1]: stored.get(span) or self._new_history(now.shapes, True) for span in spans}
        now.decision, now.leads, now.reuse = self._decide(context, bool(spans))

    def _take(self, now: Pass) -> None:
        """Store what the last span of a forward added, unless that was done."""
        if not now.given:
            return
        context, span = now.context, tuple(now.spans[-1])
        beside = self._beside(now, span)
        if context.beside is None or beside is not None:
            history = self._histories.get((context.transformer, context.branch, span))
            if history is None or history.beside != (beside is not None):
                history = self._new_history(now.shapes, beside is not None)
            self._histories[context.transformer, context.branch, span] = history
            history.take(now.given, now.taken, context.step_index, beside)
        now.taken = now.given = ()

    def _beside(self, now: Pass, span: Span) -> BranchOutput | None:
        """Return the output of a span in the branch that a forward runs beside."""
        return given_beside(self._histories, now.context, now.shapes, self._end(now.context), span)

    def _keep(self, context: ForwardContext, spans: Sequence[Sequence[int]]) -> None:
        """Drop what other spans of a branch added."""
        keep = {tuple(span) for span in spans}
        for span in self._spans(context):
            if span not in keep:
                del self._histories[context.transformer, context.branch, span]

    def _spans(self, context: ForwardContext, followed: bool = False) -> dict[Span, History]:
        """Return a branch's spans, and what they added; ``followed``: those of the branch that it runs beside."""
        key = context.transformer, (followed and context.beside) or context.branch
        return {span: history for (*of, span), history in self._histories.items() if tuple(of) == key}

    def _shapes(self, context: ForwardContext) -> Any:
        return self._passes[context.transformer].shapes

    def _stored(self, context: ForwardContext) -> bool:
        return bool(self._spans(context))

    def _needing(self, context: ForwardContext) -> str | None:
        return self._passes[context.transformer].needing

    def _require_whole_spans(self, now: Pass) -> None:
        """Raise `ConfigError` if other blocks were skipped than those whose additions were forecast."""
        stored = sorted(index for span in self.due(now) for index in span)
        if stored != now.skipped:
            raise ConfigError(
                f"{self.name} stored what the blocks {stored} of {now.context.transformer} add, and in step "
                f"{now.context.step_index} the blocks {now.skipped} were called: another method skips some in this "
                "step alone; attach one of the two"
            )

    def begin_run(self) -> None:
        super().begin_run()
        self._ran.clear()

    def report(self) -> Section | None:
        ran, count = sum(ran for ran, _ in self._ran), sum(count for _, count in self._ran)
        share = ran / count if count else 1.0
        line = f"blocks computed: {share:.3f} of the run's ({ran} of {count})"
        return extended(super().report(), [line], blocks=dict(self._counts), computed_blocks=share)


def versions_of(streams: Streams) -> list[int]:
    """Return the number of writes to each stream; 0 in inference mode, where torch does not count them."""
    return [0 if stream is None or stream.is_inference() else stream._version for stream in streams]
