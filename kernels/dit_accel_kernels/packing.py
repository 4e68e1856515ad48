"""A call's problem flattened to what a custom op takes, tensors and scalars, and back."""

from dataclasses import fields
from typing import Any

from .problem import Problem
from .selection import Routing, Selection, Vote

_FIELDS = [field for field in fields(Problem) if field.name not in ("key_valid", "decay", "selection")]
_PLAIN = ", ".join(f"{str(field.type).replace(' | None', '?')} {field.name}" for field in _FIELDS)
_DECAY = "Tensor? decay_table, Tensor? q_frames, Tensor? k_frames"
_SELECTION = (
    "bool selects, Tensor? keep, str rest, Tensor? pinned, float? beta, str threshold, str? criterion, "
    "float? vote_threshold, bool reverse, Tensor? routed"
)
SCHEMA = f"{_PLAIN}, {_DECAY}, {_SELECTION}"
PLAIN = tuple(field.name for field in _FIELDS)
"""Fields of a Problem that go through as they are; `decay` and `selection` follow them, cut into their parts."""


def flatten(problem: Problem) -> tuple[Any, ...]:
    """The problem as the op's arguments, in the order of the schema."""
    decay = (None, None, None) if problem.decay is None else problem.decay
    given = problem.selection or Selection()
    routing = (None, "") if given.routing is None else (float(given.routing.beta), given.routing.threshold)
    vote = (None, None) if given.vote is None else (given.vote.criterion, float(given.vote.threshold))
    selection = (given.keep, given.rest, given.pinned, *routing, *vote, given.reverse, given.routed)
    return (*[getattr(problem, name) for name in PLAIN], *decay, problem.selection is not None, *selection)


def restore(arguments: tuple[Any, ...]) -> Problem:
    """The problem of the op's arguments: the inverse of `flatten`."""
    end = len(PLAIN)
    table, q_frames, k_frames, selects, *chosen = arguments[end:]
    keep, rest, pinned, beta, threshold, criterion, vote_threshold, reverse, routed = chosen
    routing = None if beta is None else Routing(beta=beta, threshold=threshold)
    vote = None if criterion is None else Vote(criterion=criterion, threshold=vote_threshold)
    more = dict(keep=keep, rest=rest, pinned=pinned, routing=routing, vote=vote, reverse=reverse, routed=routed)
    return Problem(
        **dict(zip(PLAIN, arguments, strict=False)),
        decay=None if table is None else (table, q_frames, k_frames),
        selection=Selection(**more) if selects else None,
    )
