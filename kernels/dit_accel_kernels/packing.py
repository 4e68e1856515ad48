"""A call's problem flattened to what a custom op takes, tensors and scalars, and back."""

from __future__ import annotations

from typing import Any

from .problem import Problem
from .selection import Routing, Selection, Vote

_PLAIN = (
    "Tensor q, Tensor k, Tensor v, Tensor exact_offsets, Tensor exact_indices, Tensor? pooled_offsets, "
    "Tensor? pooled_indices, Tensor? mask_ids, Tensor? mask_bits, int block_q, int block_k, bool heads_first, "
    "float scale, Tensor? head_scale, Tensor? key_length, Tensor? key_mask, Tensor? token_order, "
    "Tensor? identity_mix, Tensor? identity_rows, bool return_tiles, bool return_lse, str? precision, "
    "str backend"
)
_DECAY = "Tensor? decay_table, Tensor? q_frames, Tensor? k_frames"
_SELECTION = (
    "bool selects, Tensor? keep, str rest, Tensor? pinned, float? beta, str threshold, str? criterion, "
    "float vote_threshold, bool reverse, Tensor? routed"
)
SCHEMA = f"({_PLAIN}, {_DECAY}, {_SELECTION})"
PLAIN = tuple(argument.split()[-1] for argument in _PLAIN.split(", "))
"""Fields of a Problem that go through as they are; `decay` and `selection` follow them, cut into their parts."""


def flatten(problem: Problem) -> tuple[Any, ...]:
    """The problem as the op's arguments, in the order of the schema."""
    decay = (None, None, None) if problem.decay is None else problem.decay
    return (*[getattr(problem, name) for name in PLAIN], *decay, *_flat_selection(problem.selection))


def restore(arguments: tuple[Any, ...]) -> Problem:
    """The problem of the op's arguments: the inverse of `flatten`."""
    end = len(PLAIN)
    decay = arguments[end : end + 3]
    return Problem(
        **dict(zip(PLAIN, arguments, strict=False)),
        decay=None if decay[0] is None else decay,  # pyright: ignore
        selection=_selection(*arguments[end + 3 :]),
    )


def _flat_selection(selection: Selection | None) -> tuple[Any, ...]:
    if selection is None:  # only the first is read
        return False, None, "", None, None, "", None, 0.0, False, None
    routing, vote = selection.routing, selection.vote
    return (
        True, selection.keep, selection.rest, selection.pinned,
        None if routing is None else float(routing.beta), "" if routing is None else routing.threshold,
        None if vote is None else vote.criterion, 0.0 if vote is None else float(vote.threshold), selection.reverse,
        selection.routed,
    )  # fmt: skip


def _selection(
    selects: bool, keep: Any, rest: Any, pinned: Any, beta: float | None, threshold: Any, criterion: Any,
    vote_threshold: float, reverse: bool, routed: Any,
) -> Selection | None:  # fmt: skip
    if not selects:
        return None
    routing = None if beta is None else Routing(beta=beta, threshold=threshold)
    vote = None if criterion is None else Vote(criterion=criterion, threshold=vote_threshold)
    return Selection(
        keep=keep, rest=rest, pinned=pinned, routing=routing, vote=vote, reverse=reverse, routed=routed
    )  # fmt: skip
