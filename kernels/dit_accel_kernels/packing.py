"""The attention call flattened to what a custom op takes, tensors and scalars, and back to what backends receive."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from torch import Tensor

from dit_accel_kernels.checks import check_arguments
from dit_accel_kernels.features import FrameDecay
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.selection import Routing, Selection, Vote
from dit_accel_kernels.tiles import TileLists

BACKENDS = ("auto", "triton", "fa4", "torch", "flex", "reference")

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor exact_offsets, Tensor exact_indices, Tensor? pooled_offsets, "
    "Tensor? pooled_indices, int block_q, int block_k, bool heads_first, float scale, Tensor? head_scale, "
    "Tensor? key_length, Tensor? key_mask, Tensor? decay_table, Tensor? q_frames, Tensor? k_frames, "
    "Tensor? token_order, Tensor? identity_mix, Tensor? identity_rows, bool selects, Tensor? keep, bool pool_rest, "
    "Tensor? pinned, float? beta, bool exact_variance, str? criterion, float vote_threshold, bool reverse, "
    "Tensor? routed, bool return_tiles, bool return_lse, str backend)"
)


Packed = namedtuple("Packed", [argument.split()[-1] for argument in SCHEMA[1:-1].split(", ")])
"""A call flattened to tensors and scalars, by the names of the schema."""

DEFAULTS = dict(
    layout="bshd", scale=None, head_scale=None, key_length=None, key_mask=None, frame_decay=None, token_order=None,
    identity_mix=None, identity_rows=None, selection=None, return_tiles=False, return_lse=False, backend="auto",
)  # fmt: skip


def pack_call(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, layout: str, scale: float | None, head_scale: Tensor | None,
    key_length: Tensor | None, key_mask: Tensor | None, frame_decay: FrameDecay | None, token_order: Tensor | None,
    identity_mix: Tensor | None, identity_rows: Tensor | None, selection: Selection | None, return_tiles: bool,
    return_lse: bool, backend: str,
) -> Packed:  # fmt: skip
    """Check everything and flatten it to what a custom op takes: tensors and scalars."""
    check_arguments(
        q, k, v, tiles, layout=layout, head_scale=head_scale, key_length=key_length, key_mask=key_mask,
        frame_decay=frame_decay, token_order=token_order, identity_mix=identity_mix, identity_rows=identity_rows,
        selection=selection, return_tiles=return_tiles,
    )  # fmt: skip
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, found {backend!r}")
    decay = dict(decay_table=None, q_frames=None, k_frames=None)
    if frame_decay is not None:
        decay = dict(decay_table=frame_decay.table, q_frames=frame_decay.q_frames, k_frames=frame_decay.k_frames)
    return Packed(
        q=q, k=k, v=v, exact_offsets=tiles.exact_offsets, exact_indices=tiles.exact_indices,
        pooled_offsets=tiles.pooled_offsets, pooled_indices=tiles.pooled_indices, block_q=tiles.block_q,
        block_k=tiles.block_k, heads_first=layout == "bhsd",
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale), head_scale=head_scale,
        key_length=key_length, key_mask=key_mask, **decay, token_order=token_order,
        identity_mix=identity_mix, identity_rows=identity_rows, **_pack_selection(selection),
        return_tiles=return_tiles, return_lse=return_lse, backend=backend,
    )  # fmt: skip


def _pack_selection(selection: Selection | None) -> dict[str, Any]:
    """A selection as scalars and tensors; what stands for none is not read."""
    chosen = Selection() if selection is None else selection
    routing, vote = chosen.routing, chosen.vote
    return dict(
        selects=selection is not None, keep=chosen.keep, pool_rest=chosen.rest == "pooled", pinned=chosen.pinned,
        beta=None if routing is None else float(routing.beta),
        exact_variance=routing is not None and routing.threshold == "exact",
        criterion=None if vote is None else vote.criterion,
        vote_threshold=0.0 if vote is None else float(vote.threshold), reverse=chosen.reverse, routed=chosen.routed,
    )  # fmt: skip


def _unpack_selection(call: Packed) -> Selection | None:
    if not call.selects:
        return None
    routing = None
    if call.beta is not None:
        routing = Routing(beta=call.beta, threshold="exact" if call.exact_variance else "diag")
    return Selection(
        keep=call.keep, rest="pooled" if call.pool_rest else "skip", pinned=call.pinned, reverse=call.reverse,
        routed=call.routed, routing=routing,
        vote=None if call.criterion is None else Vote(criterion=call.criterion, threshold=call.vote_threshold),
    )  # fmt: skip


def problem_of(call: Packed) -> Problem:
    """The call in [B, H, S, D] and the caller's token order."""
    q, k, v = (x if call.heads_first else x.transpose(1, 2) for x in call[:3])
    return Problem(
        q=q, k=k, v=v, exact_offsets=call.exact_offsets, exact_indices=call.exact_indices,
        pooled_offsets=call.pooled_offsets, pooled_indices=call.pooled_indices, block_q=call.block_q,
        block_k=call.block_k, logit_scale=call.scale, key_valid=None,
        head_scale=None if call.head_scale is None else call.head_scale.float().reshape(-1, q.shape[1]),
        decay=None if call.decay_table is None else (call.decay_table, call.q_frames, call.k_frames),
        token_order=call.token_order, key_length=call.key_length, key_mask=call.key_mask,
        selection=_unpack_selection(call),
    )  # fmt: skip
