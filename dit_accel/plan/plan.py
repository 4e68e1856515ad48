"""The attention plan: what one attention call computes, filled in by all active methods together, by merge verbs."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from dit_accel_kernels import EXACT, POOLED, SKIPPED, FrameDecay, Routing, Selection, TileLists, Vote
from torch import Tensor

from ..errors import ConfigError
from .call import Call
from .normalized_guidance import LastChange
from .some_rows import ReusedRows, RowOverride
from .tiling import TILE, full_tiles

Rest = Literal["skip", "pooled"]
"""What becomes of a tile that is not exact: left out, or entered as one key, its tokens' mean."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionPlan:
    """What one attention call computes; the default is plain dense attention. Methods fill it by its verbs alone.

    A verb returns a new plan, and raises `ConfigError` for what one call can't hold together: lists of other tiles or
    in another token order, a second one of what it takes once, or a choice among tiles where it has none yet.
    """

    # subtracted from every key before all else, float32 [B, H, 1, D] (float64 for float64). Alone it changes no result.
    key_mean: Tensor | None = None
    tiles: TileLists | None = None  # exact, pooled and skipped tiles; None: every tile exact
    # int64 [S], position in the tiles' order -> token index; None: the sequence's own order
    token_order: Tensor | None = None
    head_scale: Tensor | None = None  # float32 [H] or [B, H], factor on each head's logits
    frame_decay: FrameDecay | None = None  # factor on logits by frame distance
    identity_mix: Tensor | None = None  # float32 [H] or [B, H] in [0, 1], share of each head's output replaced by V
    identity_rows: Tensor | None = None  # bool [S], the tokens that ``identity_mix`` touches; None: all
    # every head's output is V throughout, as ``identity_mix`` says too: no logit need be computed
    only_values: bool = False
    # which of the exact tiles stay exact in this call, by bits and routing, and its votes
    selection: Selection | None = None
    # rows computed once more under a rule of their own, which replaces what the tiles gave them
    row_override: RowOverride | None = None
    reused: ReusedRows | None = None  # rows that are not computed
    # what stands in place of the call's queries once all is planned, [B, H, S, D]; None: they stay
    queries: Tensor | None = None
    # what changes the output last of all, such as rows that are guided away from others
    guidance: LastChange | None = None
    # in which our kernels multiply queries and keys, ``int8`` or ``fp8``; None: their own dtype
    precision: str | None = None

    @property
    def needs_kernel(self) -> bool:
        """Whether our kernels must run the call; else it goes to the user's own dense attention backend."""
        return not (
            self.tiles is None and self.selection is None and self.frame_decay is None and self.row_override is None
        )

    def kernel_arguments(self, call: Call) -> tuple[TileLists, dict[str, Any]]:
        """Return the tiles and the further arguments of the kernels' call, its keys being centred already."""
        tiles = self.tiles
        if tiles is None:
            tiles = full_tiles(call.q.shape[2], call.tokens, TILE, str(call.q.device))
        return tiles, {
            **call.kernel_layout,
            "scale": call.scale,
            "head_scale": self.head_scale,
            "key_mask": call.key_mask(),
            "frame_decay": self.frame_decay,
            "token_order": self.token_order,
            "identity_mix": self.identity_mix,
            "identity_rows": self.identity_rows,
            "selection": self.selection,
            "precision": self.precision,
            "backend": call.backend,
        }

    @property
    def is_dense(self) -> bool:
        """Whether the tiles leave nothing out; asks no device."""
        full = self.tiles is None or is_full(self.tiles)
        return full and (self.selection is None or (self.selection.keep is None and self.selection.routing is None))

    @property
    def is_plain(self) -> bool:
        """Whether the call is the model's own attention and nothing else."""
        mixed = self.identity_mix is not None or self.head_scale is not None
        changed = not (self.reused is self.queries is self.guidance is None)
        return not (self.needs_kernel or mixed or changed)

    def with_tiles(self, tiles: TileLists, token_order: Tensor | None = None) -> "AttentionPlan":
        """Return the plan with tile lists, which count the tokens in this order, intersected with those it has.

        A tile is exact where both lists have it exact; else it is pooled where either list pools it, and skipped where
        none does.
        """
        if self.tiles is None:
            return replace(self, tiles=tiles, token_order=token_order)
        ours, theirs = self.tiles, tiles
        if (ours.block_q, ours.block_k) != (theirs.block_q, theirs.block_k):
            raise ConfigError(
                f"lists of tiles of {theirs.block_q} x {theirs.block_k} can't be merged with the plan's of "
                f"{ours.block_q} x {ours.block_k}; give both methods one block_size"
            )
        if (ours.num_q, ours.num_k) != (theirs.num_q, theirs.num_k):
            raise ConfigError(
                f"lists over {theirs.num_q} x {theirs.num_k} tokens can't be merged with the plan's over {ours.num_q} "
                f"x {ours.num_k}; both must be made for the call's layout"
            )
        if not _same_order(self.token_order, token_order):
            raise ConfigError(
                "lists in one token order can't be merged with the plan's in another; give both one order"
            )
        if is_full(theirs):
            return self
        return replace(self, tiles=theirs if is_full(ours) else intersection(ours, theirs))

    def whole(self) -> "AttentionPlan":
        """Return the plan with every tile exact; its votes stay."""
        selection = self.selection
        if self.tiles is None or selection is None or selection.vote is None:
            return replace(self, tiles=None, token_order=None, selection=None)
        return replace(self, tiles=self.all_tiles(), selection=replace(selection, keep=None, routing=None))

    def all_tiles(self) -> TileLists:
        """Return lists of all tiles of a plan that has any, all of them exact."""
        tiles = self.tiles
        assert tiles is not None
        return full_tiles(tiles.num_q, tiles.num_k, tiles.block_q, str(tiles.device))

    def only(self, exact: Tensor, *, voting: bool = False) -> "AttentionPlan":
        """Return the plan with these tiles exact and all others left out, bits int32 [B, H, NQ, W].

        ``voting``: its votes and what is pinned in them stay.
        """
        selection = Selection(keep=exact)
        if voting and self.selection is not None:
            selection = replace(self.selection, keep=exact, routing=None, rest="skip")
        return replace(self, tiles=self.all_tiles(), selection=selection)

    def narrow(
        self, *, keep: Tensor | None = None, pinned: Tensor | None = None, rest: Rest = "skip"
    ) -> "AttentionPlan":
        """Return the plan with fewer of its exact tiles left exact in this call.

        A tile stays exact where every method keeps it, or any pins it. What is dropped is pooled where any method that
        drops asks for it.

        Args:
            keep: bits int32 [B, H, NQ, W] of the tiles that stay exact; None: all.
            pinned: bits int32 [NQ, W] of the tiles that nothing drops; None: no further ones.
        """
        self._require_tiles("narrowed")
        known = self.selection or Selection()
        if known.pinned is not None:
            pinned = known.pinned if pinned is None else pinned | known.pinned
        if keep is None:
            return replace(self, selection=replace(known, pinned=pinned))
        if known.keep is not None:
            keep = keep & known.keep
            rest = "pooled" if "pooled" in (rest, known.rest) else "skip"
        return replace(self, selection=replace(known, keep=keep, pinned=pinned, rest=rest))

    def route(self, routing: Routing) -> "AttentionPlan":
        """Return the plan with its exact tiles routed by their pooled scores."""
        self._require_tiles("routed")
        known = self.selection or Selection()
        self._require_free("routing", known.routing)
        return replace(self, selection=replace(known, routing=routing))

    def vote(self, vote: Vote | None, *, reverse: bool = False) -> "AttentionPlan":
        """Return the plan with a vote for the bits of the next call, and the direction in which tiles are visited."""
        self._require_tiles("voted on")
        known = self.selection or Selection()
        self._require_free("vote", known.vote)
        return replace(self, selection=replace(known, vote=vote, reverse=reverse))

    def scale(self, head_scale: Tensor) -> "AttentionPlan":
        """Return the plan with each head's logits multiplied by ``head_scale``, [H] or [B, H], besides what it has."""
        return replace(self, head_scale=head_scale if self.head_scale is None else self.head_scale * head_scale)

    @property
    def skips_logits(self) -> bool:
        """Whether the output is V alone, and nothing that is learnt or replaced needs the attention itself."""
        return self.only_values and self.selection is None and self.row_override is None

    def mix(self, identity_mix: Tensor, rows: Tensor | None = None, *, only_values: bool = False) -> "AttentionPlan":
        """Return the plan with a share of each head's output replaced by V, of what other mixes left.

        Args:
            identity_mix: [H] or [B, H] in [0, 1].
            rows: bool [S], the tokens that are mixed; None: all.
            only_values: the share is 1 for every head and token.
        """
        if self.identity_mix is None:
            return replace(self, identity_mix=identity_mix, identity_rows=rows, only_values=only_values)
        if not _same_order(self.identity_rows, rows):
            raise ConfigError("the plan mixes V into other tokens already; let both methods mix the same tokens")
        mixed = 1 - (1 - self.identity_mix) * (1 - identity_mix)
        return replace(self, identity_mix=mixed, only_values=only_values or self.only_values)

    def without_values(self) -> "AttentionPlan":
        """Return the plan without the share of V that it mixes into the output."""
        return replace(self, identity_mix=None, identity_rows=None, only_values=False)

    def value_share(self, heads: int, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor | None:
        """Return the share of V in the output, [1 or B, H, 1 or S, 1]; None where it has none.

        ``rows``: int64 [G], the tokens that it is wanted for, G in place of S; None: all.
        """
        if self.identity_mix is None:
            return None
        share, mixed = self.identity_mix.to(dtype).reshape(-1, heads)[:, :, None, None], self.identity_rows
        return share if mixed is None else share * (mixed if rows is None else mixed[rows])[:, None]

    def decay(self, frame_decay: FrameDecay) -> "AttentionPlan":
        """Return the plan with a decay of logits by frame distance."""
        self._require_free("frame decay", self.frame_decay)
        return replace(self, frame_decay=frame_decay)

    def centre_keys(self, key_mean: Tensor) -> "AttentionPlan":
        """Return the plan with a mean subtracted from all keys first, [B, H, 1, D]."""
        self._require_free("mean of the keys", self.key_mean)
        return replace(self, key_mean=key_mean)

    def override_rows(self, rows: RowOverride) -> "AttentionPlan":
        """Return the plan with another rule for some query rows."""
        self._require_free("row override", self.row_override)
        return replace(self, row_override=rows)

    def reuse_rows(self, reused: ReusedRows) -> "AttentionPlan":
        """Return the plan with rows that are not computed."""
        self._require_free("set of reused rows", self.reused)
        vote = None if self.selection is None else self.selection.vote
        parts = {"votes": vote, "rows of their own": self.row_override, "a mix of V": self.identity_mix}
        for what, part in parts.items():
            if part is not None:
                raise ConfigError(
                    f"the plan asks for {what}, which takes all rows, and some are to be left out; attach one method"
                )
        return replace(self, reused=reused)

    def of_rows(self, rows: slice | list[int], batch: int, heads: int) -> "AttentionPlan":
        """Return the plan of some rows of a call's batch of B, of H heads, without what it reuses or guides."""
        tiles, selection, parts = self.tiles, self.selection, {}
        if tiles is not None and tiles.groups == batch * heads:
            states = tiles.states().unflatten(0, (batch, heads))[rows].flatten(0, 1)
            parts["tiles"] = TileLists.from_states(states, **tiles.sizes)
        if selection is not None:
            keep, routed = (None if x is None else x[rows] for x in (selection.keep, selection.routed))
            parts["selection"] = replace(selection, keep=keep, routed=routed)
        for name in ("key_mean", "head_scale", "identity_mix"):
            value = getattr(self, name)
            if value is not None and value.ndim > 1 and len(value) == batch:
                parts[name] = value[rows]
        return replace(self, **parts, reused=None, guidance=None)

    def query(self, queries: Tensor) -> "AttentionPlan":
        """Return the plan with other queries [B, H, S, D], which see the keys that were planned for the call's."""
        self._require_free("set of other queries", self.queries)
        return replace(self, queries=queries)

    def followed(self, exact: Tensor) -> "AttentionPlan":
        """Return the plan with its exact tiles fixed, int32 [B, H, NQ, W]: the call neither chooses nor votes."""
        selection = self.selection
        assert selection is not None
        routed = selection.routed if selection.routing is None else exact
        return replace(self, selection=replace(selection, routing=None, vote=None, routed=routed))

    def guide(self, guidance: LastChange) -> "AttentionPlan":
        """Return the plan with rows of the batch guided away from others."""
        self._require_free("set of guided rows", self.guidance)
        return replace(self, guidance=guidance)

    def centred(self, k: Tensor) -> Tensor:
        """Return the keys less the plan's mean, in the keys' dtype; unchanged where the plan has no mean."""
        return k if self.key_mean is None else (k - self.key_mean).to(k.dtype)

    def gradient_before_centring(self, grad: Tensor, mask: Tensor | None) -> Tensor:
        """Return the gradient of the keys as the model gave them, [B, H, S, D], from that of the centred ones.

        The mask is their validity [B, S]; None: all are valid.
        """
        if self.key_mean is None:
            return grad
        wide = grad.to(self.key_mean.dtype)
        total = wide.sum(2, keepdim=True)
        if mask is None:
            return (wide - total / grad.shape[2]).to(grad.dtype)
        share = mask.to(wide.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
        return (wide - share[:, None, :, None] * total).to(grad.dtype)

    def _require_tiles(self, what: str) -> None:
        if self.tiles is None:
            raise ConfigError(
                f"a plan without tiles can't be {what}; call with_tiles first, with full lists if need be"
            )

    def _require_free(self, what: str, known: object) -> None:
        if known is not None:
            raise ConfigError(
                f"the plan has a {what} already, and one attention call takes only one; attach one such method"
            )


class KernelResult(NamedTuple):
    """What one kernel call gave."""

    out: Tensor  # [B, H, S, D]
    # the tiles that a selection left exact, bits int32 [B, H, NQ, W]; None without a selection
    exact: Tensor | None = None
    kept: Tensor | None = None  # those that votes keep, likewise; None without votes
    lse: Any = None  # [B, H, S], where it was wanted; else None
    corrections: tuple[Any, ...] = ()  # how it was corrected since, for the calls that run as it did
    planned: Tensor | None = None  # the output before it was corrected or guided; None where nobody asks


def is_full(tiles: TileLists) -> bool:
    """Tell whether lists keep every tile exact; asks no device."""
    return tiles.tiles_exact == tiles.tiles_total


@lru_cache(maxsize=16)
def intersection(first: TileLists, other: TileLists) -> TileLists:
    """Return lists that are exact where both are, pooled where either pools, and skip the rest; kept for next time."""
    heads = max(first.groups, other.groups)
    if {first.groups, other.groups} - {1, heads}:
        raise ConfigError(
            f"lists of {first.groups} and {other.groups} groups can't be merged; share them between heads, or give one "
            "list per head"
        )
    a, b = first.states(), other.states()
    pooled = (a == POOLED) | (b == POOLED)
    states = torch.where((a == EXACT) & (b == EXACT), EXACT, torch.where(pooled, POOLED, SKIPPED)).to(torch.uint8)
    with torch.inference_mode(False):  # made in inference mode they could not serve a training run later
        return TileLists.from_states(states.clone(), **first.sizes)


def _same_order(order: Tensor | None, other: Tensor | None) -> bool:
    if order is None or other is None:
        return order is other
    return order is other or torch.equal(order, other)
