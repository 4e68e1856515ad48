"""LiteAttention: tiles that a call finds negligible are left out of the calls after it, and cost nothing there.

Source: LiteAttention (arXiv 2511.11062), by its published code. Beyond the original: every backend, bitmaps in place of
lists, branches and rows apart, resets, text exact, criteria that bound the mass, a target density, pooled tiles.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dit_accel_kernels import Selection, TileLists, Vote, pack_bits, unpack_bits
from torch import Tensor

from ....errors import ConfigError
from ....plan.layout import TokenLayout
from ....plan.masks import is_key_padding
from ....plan.plan import AttentionPlan, Call, CallContext
from ....plan.tiling import full_tiles, visual_first
from ...base import Handler, Model, handles
from ..sparse import SparseConfig, SparseHandler
from .ranges import FixedBits, check_ranges, fixed_bits, split_list
from .scores import Dial, recorded_scores
from .state import CallState, States, bitmap_bytes, key_of
from .thresholds import LiteThresholds, check_threshold, model_name, read_thresholds

DEFAULTS: Mapping[str, Any] = {
    "block_size": 128,
    "dense_steps": 0.1,
    "dense_last_steps": 0,
    "dense_layers": 0,
}
"""What an option is where neither the user nor the model's recipe sets it.

The first call that is not dense by these options is dense as well, by design; so the warm-up is short.
"""

THRESHOLDS: Mapping[str, float] = {"maxgap": -10.0, "mass": 2.0**-10, "budget": 0.01}
"""Threshold of each criterion where none is set: the published gap, and shares of the softmax mass."""

WORTHWHILE_TOKENS = 30_000
"""Visual tokens below which skipping rarely pays: the published gains are of 30,000 tokens and more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteAttention(SparseConfig):
    """Self-attention that leaves out what earlier steps found negligible (arXiv 2511.11062).

    An option left unset takes the recipe of the model's family, or `DEFAULTS` where the family has none. For the options
    that begin with ``dense`` see `SparseConfig`. The first call after them is dense too, and votes. With another
    method's tile list a tile must be in that list as well, and tiles and token order are that method's.

    Attributes:
        criterion: what a query row must show to need a tile: ``maxgap``, a logit that comes near its largest one;
            ``mass``, a share of its softmax mass; ``budget``, one share for all tiles that the row gives up in a run.
        threshold: for ``maxgap`` in log2 units, < 0: -10 drops tiles whose largest weight is at most 2^-10 of the
            largest before it, for every row of the block. For ``mass`` and ``budget`` a share in (0, 1). Unset: -10,
            2^-10 or 0.01. A budget is split over the votes to come and bounds the mass of a tile at its vote; where
            logits drift by D log2 units afterwards, by 2^(2D) times as much.
        target_density: share of all tiles, in (0, 1), that a branch keeps over its layers, instead of votes: its first
            calls record what share of its softmax mass each tile holds at most, at 16 rows of each block row, and the
            second ones drop what lies under the threshold at which that share is kept.
        thresholds_file: TOML of thresholds by layer and step, as ``dit-accel tune lite`` writes it, instead.
        detect_every: every how many calls tiles vote; the others run as the last vote says.
        refresh_every: calls after which everything is computed and voted on again; unset: never within a generation.
        bidirectional: visit tiles from the first to the last and from the last to the first by turns, so that those
            which came early meet a nearly final maximum at the next vote.
        protect_text: text tokens see all and are seen by all. False lets them vote and be dropped as others are.
        must_keep: visual tokens that are never dropped as keys, start, end, start, end ...; rounded outward to tiles.
        must_skip: visual tokens that are dropped as keys from the first call on; rounded inward; must_keep and
            protected text go first.
        rest: what becomes of dropped tiles: ``skip``, or ``pooled`` (each enters as one key, its tokens' mean).
        block_size: tokens of a tile; a power of two, 16 to 512. With RadialAttention the tiles are Radial's.
        allow_positive_threshold: take a ``maxgap`` threshold of 0 or more, which drops what matters; to debug.

    Raises:
        ConfigError: for an option out of range, or two that exclude each other.
    """

    name: ClassVar[str] = "lite"
    generic: ClassVar[Mapping[str, Any]] = DEFAULTS

    criterion: Literal["maxgap", "mass", "budget"] = "maxgap"
    threshold: float | None = None
    target_density: float | None = None
    thresholds_file: str | None = None
    detect_every: int = 1
    refresh_every: int | None = None
    bidirectional: bool = True
    protect_text: bool = True
    must_keep: tuple[int, ...] = ()
    must_skip: tuple[int, ...] = ()
    rest: Literal["skip", "pooled"] = "skip"
    block_size: int | None = None
    allow_positive_threshold: bool = False

    def __post_init__(self) -> None:
        SparseConfig.__post_init__(self)
        ways = [name for name in ("threshold", "target_density", "thresholds_file") if getattr(self, name) is not None]
        if len(ways) > 1:
            first, second = (f"lite.{name} = {getattr(self, name)!r}" for name in ways[:2])
            raise ConfigError(f"{first} and {second} both say how much is dropped; set one of them")
        if self.criterion == "budget" and self.thresholds_file is not None:
            raise ConfigError(
                "lite.criterion = 'budget' bounds the mass dropped over a run by lite.threshold, got "
                f"lite.thresholds_file = {self.thresholds_file!r}; use 'maxgap' or 'mass' with it"
            )
        if self.criterion != "maxgap" and self.target_density is not None:
            raise ConfigError(
                f"lite.target_density = {self.target_density} ranks tiles instead of voting, got lite.criterion = "
                f"{self.criterion!r}; leave it out"
            )
        if self.threshold is not None:
            check_threshold("lite.threshold", self.criterion, self.threshold, self.allow_positive_threshold)
        if self.target_density is not None and not 0 < self.target_density < 1:
            raise ConfigError(f"lite.target_density must be a share in (0, 1), got {self.target_density}")
        if self.detect_every < 1:
            raise ConfigError(f"lite.detect_every must be >= 1, got {self.detect_every}; 1 votes in every call")
        if self.refresh_every is not None and self.refresh_every < 2:
            raise ConfigError(
                f"lite.refresh_every must be >= 2, got {self.refresh_every}: a call that begins anew is dense; leave "
                "it unset to begin anew with each generation alone"
            )
        block = self.block_size
        if block is not None and (not 16 <= block <= 512 or block & (block - 1)):
            raise ConfigError(f"lite.block_size must be a power of two from 16 to 512, got {block}; 128 is usual")
        check_ranges("lite.must_keep", self.must_keep)
        check_ranges("lite.must_skip", self.must_skip)

    def vote_threshold(self) -> float:
        """Return the threshold that is set, else the criterion's usual one."""
        return THRESHOLDS[self.criterion] if self.threshold is None else self.threshold

    def advice(self, layout: TokenLayout) -> str | None:
        """Return what the user should know of lite on this layout, or None where it fits well."""
        parts, visual = [], layout.visual_tokens
        if visual < WORTHWHILE_TOKENS:
            parts.append(f"lite seldom pays below {WORTHWHILE_TOKENS} visual tokens, and here are {visual}")
        if not self.protect_text and layout.tokens > visual:
            text = layout.tokens - visual
            parts.append(f"lite.protect_text = False lets the {text} text tokens be dropped too")
        return "; ".join(parts) or None

    def state_bytes(self, layout: TokenLayout, *, layers: int, heads: int, batch: int = 1, branches: int = 2) -> int:
        """Return the memory that a generation holds from step to step, in bytes: a bit for each tile, head and branch.

        The original's two lists of int16 an attention module take 31 times that with equal tiles, 23 times with its
        own of 128 x 176.
        """
        block = self.block_size or DEFAULTS["block_size"]
        return layers * branches * bitmap_bytes(math.ceil(layout.tokens / block), heads, batch)


@handles(LiteAttention)
class LiteHandler(SparseHandler):
    """LiteAttention on one model: bits and votes put into the plan, and what the votes say kept for the next call."""

    rank = 1
    dense_under_masks = votes = True
    config: LiteAttention

    def __init__(self, config: LiteAttention, model: Model) -> None:
        super().__init__(config, model)
        self._asked_size = config.block_size
        self._lists: Handler | None = None
        self._states = States()
        self._fixed: dict[Any, tuple[tuple[object, ...], FixedBits]] = {}
        self._dials: dict[tuple[str, str, int], Dial] = {}
        self._table: LiteThresholds | None = None
        if config.thresholds_file is not None:
            self._table = self._read(config.thresholds_file)

    def _read(self, path: str) -> LiteThresholds:
        table, name = read_thresholds(path), model_name(self.model)
        if table.model != name:
            raise ConfigError(
                f"lite.thresholds_file {path} was tuned on {table.model!r}, this model is {name!r}; tune on this model"
            )
        if table.criterion != self.config.criterion:
            raise ConfigError(
                f"lite.thresholds_file {path} holds thresholds of {table.criterion!r}, lite.criterion is "
                f"{self.config.criterion!r}; set it to the file's"
            )
        return table

    def check_with(self, others: Sequence[Handler]) -> None:
        """Take the tiles of a method that fills the plan before; refuse a size that the user set to something else."""
        place = self.rank, self.config.name
        before = [other for other in others if (other.rank, other.config.name) < place]
        sized = [other for other in before if getattr(other.config, "block_size", None) is not None]
        if not sized:
            return
        other: Any = min(sized, key=lambda other: (other.rank, other.config.name))
        name, size = other.config.name, other.config.block_size
        if self._asked_size not in (None, size):
            raise ConfigError(
                f"lite.block_size = {self._asked_size} does not fit {name}'s tiles of {size} ({name}.block_size); "
                "set both to one size, or leave lite's unset"
            )
        self.config = dataclasses.replace(self.config, block_size=size)
        self._lists = other if other.rank < self.rank else None

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Refuse ranges beyond the video; remark on a sequence where lite gains nothing."""
        check_ranges("lite.must_keep", self.config.must_keep, layout.visual_tokens)
        check_ranges("lite.must_skip", self.config.must_skip, layout.visual_tokens)
        return super().check_layout(layout)

    def is_active(
        self, depth: int, step_index: int, num_inference_steps: int | None, sigma: float | None = None
    ) -> bool:
        """Active outside the dense steps and layers."""
        table = self._table
        if table is not None and table.num_inference_steps != num_inference_steps:
            raise ConfigError(
                f"lite.thresholds_file {self.config.thresholds_file} was tuned for {table.num_inference_steps} steps, "
                f"this run has {num_inference_steps or 'a number that nothing tells'}; use as many, or tune again"
            )
        return super().is_active(depth, step_index, num_inference_steps, sigma)

    def contribute(self, plan: AttentionPlan, context: CallContext) -> AttentionPlan:
        """Keep the tiles that the votes left so far, and ask for the next votes."""
        tiles, order = self._tiling(plan, context)
        pinned = self._fixed_bits(tiles, order, context).pinned
        base = plan.selection or Selection()
        if base.pinned is not None:
            pinned = base.pinned if pinned is None else pinned | base.pinned
        chosen = self._again(context) if context.repeated else self._next(tiles, order, context)
        keep = chosen.keep
        if base.keep is not None:  # what another method dropped does not vote, and stays out
            keep = base.keep if keep is None else keep & base.keep
        selection = dataclasses.replace(
            base, keep=keep, rest=self.config.rest, pinned=pinned, vote=chosen.vote, reverse=chosen.reverse
        )
        return dataclasses.replace(plan, tiles=tiles, token_order=order, selection=selection)

    def look(self, plan: AttentionPlan, context: CallContext, call: Call) -> None:
        """With a target density, record the scores of a call that begins anew, and choose the tiles of the next."""
        config, mask = self.config, call.mask
        if config.target_density is None or context.repeated:
            return
        tiles, order = self._tiling(plan, context)
        state = self._state(tiles, order, context)
        if state.calls > 1 or (mask is not None and not is_key_padding(mask, call.q, call.k, call.layout)):
            return
        assert state.dial is not None
        scores = recorded_scores(dataclasses.replace(plan, tiles=tiles, token_order=order), call)
        free, fixed = split_list(tiles, scores, self._fixed_bits(tiles, order, context))
        if plan.selection is not None and plan.selection.keep is not None:
            free = free & unpack_bits(plan.selection.keep, tiles.key_tiles)
        if state.calls == 0:
            state.counts = state.dial.count(scores, free, fixed)
        elif state.counts is not None:
            kept = state.dial.keeps(scores, free, state.counts, config.target_density)
            self._states.keep(state, pack_bits(kept))
            state.counts = None

    def learn(self, context: CallContext, kept: Tensor) -> None:
        """Make the bits that the votes keep those of the next call."""
        state = self._states.by_key.get(key_of(context))
        if state is not None:
            self._states.keep(state, kept)

    def reset(self) -> None:
        """Free all bits."""
        self._states.clear()
        self._dials.clear()
        self._fixed.clear()

    def wants_gaps(self, plan: AttentionPlan, context: CallContext) -> bool:
        """Tell whether a call's key has dropped tiles that could come back to a later call."""
        state = self._states.by_key.get(key_of(context))
        return state is not None and state.bits is not None and self.config.target_density is None

    def reactivate(
        self, plan: AttentionPlan, context: CallContext, gaps: Tensor, shares: Tensor, margin: float
    ) -> None:
        """Take back tiles that probe rows need by ``margin`` log2 units; what must be skipped stays skipped."""
        state, tiles = self._states.by_key.get(key_of(context)), plan.tiles
        if state is None or state.bits is None or tiles is None:
            return
        threshold = self._threshold(context)
        needed = gaps > threshold + margin if self.config.criterion == "maxgap" else shares > threshold * 2.0**margin
        bits = pack_bits(needed)
        first = self._fixed_bits(tiles, plan.token_order, context).first
        self._states.keep(state, state.bits | (bits if first is None else bits & first))

    def state_bytes(self) -> int:
        """Return the most memory that the bits took at once since attach."""
        return self._states.peak

    def _tiling(self, plan: AttentionPlan, context: CallContext) -> tuple[TileLists, Tensor | None]:
        if plan.tiles is not None:
            return plan.tiles, plan.token_order
        block, device = self.config.block_size, str(context.device)
        assert block is not None
        ordered = getattr(self._lists and self._lists.config, "token_order", None)
        order = ordered(context.layout, device) if ordered else visual_first(context.layout, None, device)
        return full_tiles(context.layout, block, device), order

    def _fixed_bits(self, tiles: TileLists, order: Tensor | None, context: CallContext) -> FixedBits:
        """Return what no vote decides; the same for all calls on the same tiles."""
        key = context.layout, id(tiles), id(order)
        if key not in self._fixed:
            self._fixed[key] = (tiles, order), fixed_bits(self.config, context, tiles, order)
        return self._fixed[key][1]

    def _again(self, context: CallContext) -> Selection:
        """Return what the call had when the forward ran it first."""
        state = self._states.by_key.get(key_of(context))
        if state is None or state.given is None:
            raise ConfigError(
                f"lite was asked to repeat {context.transformer} layer {context.layer} at step {context.step_index}, "
                "which ran without gradients; use gradient checkpointing with use_reentrant=False"
            )
        return dataclasses.replace(state.given, vote=None)

    def _next(self, tiles: TileLists, order: Tensor | None, context: CallContext) -> Selection:
        """Return keep, vote and direction of a call, and count it."""
        config, state = self.config, self._state(tiles, order, context)
        left = self._calls_left(state, context)
        reverse = config.bidirectional and state.votes % 2 == 1
        vote = self._vote(state, left, context) if state.calls % config.detect_every == 0 else None
        chosen = Selection(keep=state.bits, vote=vote, reverse=reverse)
        state.given = chosen if context.differentiate else None
        state.votes += vote is not None
        state.calls += 1
        if left == 1 and not context.differentiate and self._is_last(context):
            self._free(context)
        return chosen

    def _vote(self, state: CallState, left: int | None, context: CallContext) -> Vote | None:
        """Return what a call votes with; None where nobody would read the bits, or no more may be dropped."""
        config = self.config
        if left == 1 or config.target_density is not None:
            return None
        threshold = self._threshold(context)
        if config.criterion == "budget":
            votes = 2 if left is None else -(-(left - 1) // config.detect_every)
            threshold = (threshold - state.spent) / votes
            state.spent += threshold
            if threshold <= 0:
                return None
        return Vote(criterion=config.criterion, threshold=threshold)

    def _threshold(self, context: CallContext) -> float:
        if self._table is not None:
            return self._table.at(context.transformer, context.layer, context.step_index)
        return self.config.vote_threshold()

    def _state(self, tiles: TileLists, order: Tensor | None, context: CallContext) -> CallState:
        """Return the state of a call, begun anew where it is the first, or due for it, or on other tiles."""
        key = key_of(context)
        state = self._states.by_key.get(key)
        if state is not None and state.calls != self.config.refresh_every and state.fits(context, tiles.block_k, order):
            return state
        state = CallState(context.layout, tiles.block_k, order)
        if self.config.target_density is not None:
            dial = self._dials.get((context.transformer, context.branch, context.row))
            if dial is None or dial.step_index != context.step_index:
                dial = self._dials[context.transformer, context.branch, context.row] = Dial(context.step_index)
            state.dial = dial
        self._states.put(key, state)
        first = self._fixed_bits(tiles, order, context).first
        if first is not None:
            self._states.keep(state, first.expand(context.batch, self.model.heads, -1, -1).contiguous())
        return state

    def _last_step(self, context: CallContext) -> int | None:
        steps = context.num_inference_steps
        return None if steps is None else steps - (self.config.dense_last_steps or 0) - 1

    def _calls_left(self, state: CallState, context: CallContext) -> int | None:
        """Return for how many calls, the running one included, the state serves at most; None: nothing tells."""
        last, refresh = self._last_step(context), self.config.refresh_every
        counts = [] if last is None else [last - context.step_index + 1]
        if refresh is not None:
            counts.append(refresh - state.calls)
        return min(counts, default=None)

    def _is_last(self, context: CallContext) -> bool:
        return context.step_index == self._last_step(context)

    def _free(self, context: CallContext) -> None:
        """Forget what no later call of this generation reads: this key, and transformers that had their steps."""
        self._states.drop(key_of(context))
        for key in [key for key in self._states.by_key if key[0] != context.transformer]:
            self._states.drop(key)
