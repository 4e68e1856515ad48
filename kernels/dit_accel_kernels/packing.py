"""The attention call flattened to what a custom op takes, tensors and scalars, and back to what backends receive."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_accel_kernels.checks import check_arguments
from dit_accel_kernels.features import FrameDecay
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.selection import Routing, Selection, Vote
from dit_accel_kernels.tiles import TileLists

BACKENDS = ("auto", "triton", "torch", "flex", "reference")

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor exact_offsets, Tensor exact_indices, Tensor? pooled_offsets, "
    "Tensor? pooled_indices, int block_q, int block_k, bool heads_first, float scale, Tensor? head_scale, "
    "Tensor? key_length, Tensor? key_mask, Tensor? decay_table, Tensor? q_frames, Tensor? k_frames, "
    "Tensor? token_order, Tensor? identity_mix, Tensor? identity_rows, bool selects, Tensor? keep, bool pool_rest, "
    "Tensor? pinned, float? beta, bool exact_variance, str? criterion, float vote_threshold, bool reverse, "
    "Tensor? routed, bool return_tiles, bool return_lse, str backend)"
)


PLACES = {argument.split()[-1]: place for place, argument in enumerate(SCHEMA[1:-1].split(", "))}  # in a packed call

DEFAULTS = dict(
    layout="bshd", scale=None, head_scale=None, key_length=None, key_mask=None, frame_decay=None, token_order=None,
    identity_mix=None, identity_rows=None, selection=None, return_tiles=False, return_lse=False, backend="auto",
)  # fmt: skip


def pack_call(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, layout: str, scale: float | None, head_scale: Tensor | None,
    key_length: Tensor | None, key_mask: Tensor | None, frame_decay: FrameDecay | None, token_order: Tensor | None,
    identity_mix: Tensor | None, identity_rows: Tensor | None, selection: Selection | None, return_tiles: bool,
    return_lse: bool, backend: str,
) -> tuple[Any, ...]:  # fmt: skip
    """Check everything and flatten it to what a custom op takes: tensors and scalars."""
    check_arguments(
        q, k, v, tiles, layout=layout, head_scale=head_scale, key_length=key_length, key_mask=key_mask,
        frame_decay=frame_decay, token_order=token_order, identity_mix=identity_mix, identity_rows=identity_rows,
        selection=selection, return_tiles=return_tiles,
    )  # fmt: skip
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, found {backend!r}")
    return (
        q, k, v, tiles.exact_offsets, tiles.exact_indices, tiles.pooled_offsets, tiles.pooled_indices,
        tiles.block_q, tiles.block_k, layout == "bhsd", q.shape[-1] ** -0.5 if scale is None else float(scale),
        head_scale, key_length, key_mask,
        None if frame_decay is None else frame_decay.table,
        None if frame_decay is None else frame_decay.q_frames,
        None if frame_decay is None else frame_decay.k_frames,
        token_order, identity_mix, identity_rows, *_pack_selection(selection), return_tiles, return_lse, backend,
    )  # fmt: skip


def _pack_selection(selection: Selection | None) -> tuple[Any, ...]:
    """A selection as scalars and tensors."""
    if selection is None:
        return False, None, False, None, None, False, None, 0.0, False, None
    routing, vote = selection.routing, selection.vote
    return (
        True, selection.keep, selection.rest == "pooled", selection.pinned,
        None if routing is None else float(routing.beta), routing is not None and routing.threshold == "exact",
        None if vote is None else vote.criterion, 0.0 if vote is None else float(vote.threshold), selection.reverse,
        selection.routed,
    )  # fmt: skip


def _unpack_selection(
    selects: bool, keep: Tensor | None, pool_rest: bool, pinned: Tensor | None, beta: float | None,
    exact_variance: bool, criterion: Any, vote_threshold: float, reverse: bool, routed: Tensor | None,
) -> Selection | None:  # fmt: skip
    if not selects:
        return None
    return Selection(
        keep=keep, rest="pooled" if pool_rest else "skip", pinned=pinned, reverse=reverse, routed=routed,
        routing=None if beta is None else Routing(beta=beta, threshold="exact" if exact_variance else "diag"),
        vote=None if criterion is None else Vote(criterion=criterion, threshold=vote_threshold),
    )  # fmt: skip


def problem_of(
    q: Tensor, k: Tensor, v: Tensor, exact_offsets: Tensor, exact_indices: Tensor, pooled_offsets: Tensor | None,
    pooled_indices: Tensor | None, block_q: int, block_k: int, heads_first: bool, scale: float,
    head_scale: Tensor | None, key_length: Tensor | None, key_mask: Tensor | None, decay_table: Tensor | None,
    q_frames: Tensor | None, k_frames: Tensor | None, token_order: Tensor | None, *selected: Any,
) -> Problem:  # fmt: skip
    """The call in [B, H, S, D] and the caller's token order."""
    decay = None
    if decay_table is not None and q_frames is not None and k_frames is not None:
        decay = (decay_table, q_frames, k_frames)
    if not heads_first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return Problem(
        q=q, k=k, v=v, exact_offsets=exact_offsets, exact_indices=exact_indices, pooled_offsets=pooled_offsets,
        pooled_indices=pooled_indices, block_q=block_q, block_k=block_k, logit_scale=scale,
        head_scale=None if head_scale is None else head_scale.float().reshape(-1, q.shape[1]),
        key_valid=None, decay=decay, token_order=token_order, key_length=key_length, key_mask=key_mask,
        selection=_unpack_selection(*selected),
    )  # fmt: skip
