"""LiteAttention: tiles that a call finds negligible are left out of the calls after it, and cost nothing there.

Source: LiteAttention (arXiv 2511.11062), by its published code. Beyond the original: every backend, bitmaps in place of
its two lists of int16 (1 / 31 of their memory with equal tiles, 1 / 23 with its own of 128 x 176), branches and rows
apart, resets, text exact, criteria that bound the mass, a target density, pooled tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dit_accel_kernels import Selection, TileLists, Vote, pack_bits, unpack_bits
from torch import Tensor

from ....errors import ConfigError
from ....plan.call import Call
from ....plan.context import CallContext, Key, StepContext
from ....plan.layout import TokenLayout
from ....plan.plan import AttentionPlan, KernelResult
from ....plan.tiling import full_lists_bytes, pinned_bytes
from ....rules.steps import whole_steps
from ...base import Model, Phase
from ...saving import Saving
from ..sparse import SparseHandler
from .lite_config import LiteAttention
from .ranges import FixedBits, fixed_bits, split_list
from .scores import DensityCalibrator, recorded_scores
from .thresholds import LiteThresholds, read_thresholds


@dataclass(slots=True)
class CallState:
    """What is carried from call to call of one attention module, branch and row."""

    layout: TokenLayout  # the sequence that the bits are of
    block: int  # tokens of its tiles
    order: Tensor | None  # the order of its tokens
    bits: Tensor | None = None  # int32 [B, H, NQ, W], tiles of the next call; None: all of them
    calls: int = 0  # calls made since it began
    votes: int = 0  # how many of them voted
    spent: float = 0.0  # share of the budget that votes were given
    calibrator: DensityCalibrator | None = None  # what finds the threshold for a target density; None: it is given
    # the first call's scores in bins, for the calibrator; None once the calibrator has them
    counts: Tensor | None = None
    given: Selection | None = None  # the running call's selection, where it may be repeated

    def fits(self, context: CallContext, block: int, order: Tensor | None) -> bool:
        """Tell whether the bits mean what the call's tiles mean."""
        if (self.layout, self.block) != (context.layout, block):
            return False
        if self.order is None or order is None:
            return self.order is order
        return self.order is order or (len(self.order) == len(order) and bool((self.order == order).all()))


class LiteHandler(SparseHandler):
    """LiteAttention on one model: bits and votes put into the plan, and what the votes say kept for the next call."""

    config_type = LiteAttention
    phase = Phase.SELECTIONS
    exclusive = frozenset({"vote"})
    votes = True
    settings: LiteAttention

    def __init__(self, config: LiteAttention, model: Model) -> None:
        super().__init__(config, model)
        self._states: dict[Key, CallState] = {}
        self._fixed: dict[Any, tuple[tuple[object, ...], FixedBits]] = {}
        self._calibrators: dict[tuple[str, str, int], DensityCalibrator] = {}
        self._table: LiteThresholds | None = None
        if config.thresholds_file is not None:
            self._table = self._read(config.thresholds_file)

    def _read(self, path: str) -> LiteThresholds:
        table, name = read_thresholds(path), self.model.name
        if table.model != name:
            raise ConfigError(
                f"lite.thresholds_file {path} was tuned on {table.model!r}, this model is {name!r}; tune on this model"
            )
        if table.criterion != self.settings.criterion:
            raise ConfigError(
                f"lite.thresholds_file {path} holds thresholds of {table.criterion!r}, lite.criterion is "
                f"{self.settings.criterion!r}; set it to the file's"
            )
        return table

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Refuse ranges beyond the video; remark on a sequence where lite gains nothing."""
        for name in ("must_keep", "must_skip"):
            if (end := max(getattr(self.settings, name), default=0)) > layout.visual_tokens:
                raise ConfigError(
                    f"lite.{name} ends at visual token {end}, the video has {layout.visual_tokens}; end it there"
                )
        return super().check_layout(layout)

    def is_active(self, step: StepContext, depth: int) -> bool:
        """Active outside the dense steps and layers, never in training; refuse a thresholds file of other steps."""
        if step.training:
            return False
        table, path = self._table, self.settings.thresholds_file
        if table is not None and table.num_inference_steps != step.num_inference_steps:
            raise ConfigError(
                f"lite.thresholds_file {path} was tuned for {table.num_inference_steps} steps, "
                f"this run has {step.num_inference_steps or 'an unknown number'}; use as many, or tune again"
            )
        return super().is_active(step, depth)

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Keep the tiles that the votes left so far, and ask for the next votes."""
        plan = plan.with_tiles(*self.model.tiling.full(context.layout, context.device))
        assert plan.tiles is not None
        self._record(plan, plan.tiles, call, context)
        chosen = self._again(context) if context.repeated else self._next(plan.tiles, plan.token_order, context)
        pinned = self._fixed_bits(plan.tiles, plan.token_order, context).pinned
        plan = plan.narrow(keep=chosen.keep, pinned=pinned, rest="pooled" if self.pools else "skip")
        return plan.vote(chosen.vote, reverse=chosen.reverse)

    def _record(self, plan: AttentionPlan, tiles: TileLists, call: Call, context: CallContext) -> None:
        """With a target density, record the scores of a call that begins anew, and choose the tiles of the next."""
        settings, order = self.settings, plan.token_order
        if settings.target_density is None or context.repeated:
            return
        state = self._state(tiles, order, context)
        if state.calls > 1 or not call.hides_keys:
            return
        assert state.calibrator is not None
        scores = recorded_scores(plan, call)
        free, fixed = split_list(tiles, scores, self._fixed_bits(tiles, order, context))
        if plan.selection is not None and plan.selection.keep is not None:
            free = free & unpack_bits(plan.selection.keep, tiles.key_tiles)
        if context.heads is not None:  # the calibrator counts the tiles of all heads
            scores, free, fixed = (context.heads.joined(x, 1) for x in (scores, free, fixed))
        if state.calls == 0:
            state.counts = state.calibrator.count(scores, free, fixed)
        elif state.counts is not None:
            chosen = state.calibrator.keeps(scores, free, state.counts, settings.target_density)
            chosen = chosen if context.heads is None else chosen[:, context.heads.own]
            self._keep(state, pack_bits(chosen))
            state.counts = None

    def after(self, plan: AttentionPlan, call: Call, context: CallContext, result: KernelResult) -> KernelResult:
        """Make the bits that the votes keep those of the next call."""
        state = self._states.get(context.key)
        if state is not None and result.kept is not None:
            self._keep(state, result.kept)
        return result

    def needs_step(self, step: StepContext) -> bool:
        """Tell whether the branch's first votes are due in this step, or those after ``refresh_every`` calls."""
        if not self.is_active_somewhere(step):
            return False
        first = 1 if self.settings.target_density is None else 2
        states = [state for key, state in self._states.items() if (key[0], key[2]) == (step.transformer, step.branch)]
        return not states or any(state.calls < first or state.calls == self.settings.refresh_every for state in states)

    def reset(self) -> None:
        self._states.clear()
        self._calibrators.clear()
        self._fixed.clear()

    def restore_tiles(
        self, plan: AttentionPlan, context: CallContext, probe: Callable[[], tuple[Tensor, Tensor]], margin: float
    ) -> None:
        """Take back tiles that probe rows need by ``margin`` log2 units; what must be skipped stays skipped."""
        state, tiles = self._states.get(context.key), plan.tiles
        if state is None or state.bits is None or tiles is None or self.settings.target_density is not None:
            return
        gaps, shares = probe()
        threshold = self._threshold(context)
        needed = gaps > threshold + margin if self.settings.criterion == "maxgap" else shares > threshold * 2.0**margin
        bits = pack_bits(needed)
        first = self._fixed_bits(tiles, plan.token_order, context).first
        self._keep(state, state.bits | (bits if first is None else bits & first))

    def _keep(self, state: CallState, bits: Tensor) -> None:
        """Make ``bits`` those of the next call; the old ones live on only where a plan waits for its backward."""
        first, state.bits = state.bits is None, bits
        if first:
            self.note_held(sum(state.bits.nbytes for state in self._states.values() if state.bits is not None))

    def _fixed_bits(self, tiles: TileLists, order: Tensor | None, context: CallContext) -> FixedBits:
        """Return the tiles that no vote decides; the same for all calls on the same tiles."""
        key = context.layout, id(tiles), id(order)
        if key not in self._fixed:
            self._fixed[key] = (tiles, order), fixed_bits(self.settings, context, tiles, order)
        return self._fixed[key][1]

    def _again(self, context: CallContext) -> Selection:
        """Return the bits that the call had when the forward ran it first."""
        state = self._states.get(context.key)
        if state is None or state.given is None:
            raise ConfigError(
                f"lite was called to repeat {context.transformer} layer {context.layer} at step {context.step_index}, "
                "which ran without gradients; use gradient checkpointing with use_reentrant=False"
            )
        return replace(state.given, vote=None)

    def _next(self, tiles: TileLists, order: Tensor | None, context: CallContext) -> Selection:
        """Return keep, vote and direction of a call, and count it."""
        settings, state = self.settings, self._state(tiles, order, context)
        left = 1 if context.turn == "frozen" else self._calls_left(state, context)
        reverse = settings.bidirectional and state.votes % 2 == 1
        vote = self._vote(state, left, context) if state.calls % settings.detect_every == 0 else None
        chosen = Selection(keep=state.bits, vote=vote, reverse=reverse)
        state.given = chosen if context.differentiate else None
        state.votes += vote is not None
        state.calls += 1
        if left == 1 and not context.differentiate and context.step_index == self._last_step(context):
            # no later call of this generation reads this key, nor those of transformers whose steps are over
            for key in [key for key in self._states if key == context.key or key[0] != context.transformer]:
                del self._states[key]
        return chosen

    def _vote(self, state: CallState, left: int | None, context: CallContext) -> Vote | None:
        """Return the vote of a call; None where nobody would read the bits, or no more may be dropped."""
        settings = self.settings
        if left == 1 or settings.target_density is not None:
            return None
        threshold = self._threshold(context)
        if settings.criterion == "budget":
            votes = 2 if left is None else -(-(left - 1) // settings.detect_every)
            threshold = (threshold - state.spent) / votes
            state.spent += threshold
            if threshold <= 0:
                return None
        return Vote(criterion=settings.criterion, threshold=threshold)

    def _threshold(self, context: CallContext) -> float:
        if self._table is not None:
            return self._table.at(context.transformer, context.layer, context.step_index)
        assert self.settings.threshold is not None
        return self.settings.threshold

    def _state(self, tiles: TileLists, order: Tensor | None, context: CallContext) -> CallState:
        """Return the state of a call, begun anew where it is the first, or due for it, or on other tiles."""
        key = context.key
        state = self._states.get(key)
        if (
            state is not None
            and state.calls != self.settings.refresh_every
            and context.turn != "dense"
            and state.fits(context, tiles.block_k, order)
        ):
            return state
        state = CallState(context.layout, tiles.block_k, order)
        if self.settings.target_density is not None:
            calibrator = self._calibrators.get((context.transformer, context.branch, context.row))
            if calibrator is None or calibrator.step_index != context.step_index:
                calibrator = self._calibrators[context.transformer, context.branch, context.row] = DensityCalibrator(
                    context.step_index
                )
            state.calibrator = calibrator
        self._states[key] = state
        first = self._fixed_bits(tiles, order, context).first
        if first is not None:
            heads = self.model.heads if context.heads is None else context.heads.count
            self._keep(state, first.expand(context.batch, heads, -1, -1).contiguous())
        return state

    def _last_step(self, context: CallContext) -> int | None:
        steps = context.num_inference_steps
        return None if steps is None else steps - whole_steps(self.settings.dense_last_steps or 0, steps) - 1

    def _calls_left(self, state: CallState, context: CallContext) -> int | None:
        """Return for how many calls, the running one included, the state serves at most; None: it is not known."""
        last, refresh = self._last_step(context), self.settings.refresh_every
        counts = [] if last is None else [last - context.step_index + 1]
        if refresh is not None:
            counts.append(refresh - state.calls)
        return min(counts, default=None)

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return the bytes that are carried from step to step; the tiles that drop are known only while it runs."""
        settings = self.settings
        notes = ("what lite saves is known only while it runs; it is not counted", *settings.notes())
        keeps = bool(settings.must_keep) or (settings.protect_text and layout.tokens > layout.visual_tokens)
        lists = full_lists_bytes(layout, settings.tiling.block_size)
        lists += (keeps + bool(settings.must_skip)) * pinned_bytes(layout, settings.tiling.block_size)
        carried = self.carried_bits(layout, steps) + self.rest_bytes(layout, steps)
        return Saving(counted=False, carried_bytes=carried, list_bytes=lists, notes=notes)
