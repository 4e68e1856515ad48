"""Processes that `accelerate launch` started together: which one this is, and where all wait for each other."""

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

PATIENCE = datetime.timedelta(days=14)
"""How long a process waits for another, which may have longer clips."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """The processes of one run.

    Attributes:
        rank: this one's number.
        size: how many there are.
        wait: returns when all have called it; if one fails, the launcher ends the others.
    """

    rank: int
    size: int
    wait: Callable[[], Any]

    @property
    def first(self) -> bool:
        """Whether this process does what is done once: checks, sorting, tables."""
        return self.rank == 0

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's part of a list: every one of the team's parts is another, and together they are all."""
        return items[self.rank :: self.size]


def team() -> Team:
    """Return the team that this process is in; one of its own where nothing launched it."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Team(rank=0, size=1, wait=lambda: None)
    from accelerate import PartialState

    state = PartialState(timeout=PATIENCE)
    return Team(rank=state.process_index, size=state.num_processes, wait=state.wait_for_everyone)
