"""Several processes that share the prompts of one request, as `accelerate launch` and `torchrun` start them.

Each takes every n-th prompt, on a device of its own, and one that ends early leaves the others' outputs whole: unlike
those of `ranks` they never talk to each other. Or groups of them do, which make each output together.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dit_accel.errors import ConfigError

from .parallel import check_processes

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One of the processes that a launcher started."""

    rank: int = 0  # its number
    count: int = 1  # how many there are, on all machines
    local_rank: int = 0  # its number on this machine
    local_count: int = 1  # how many run on this machine
    together: int = 1  # how many neighbours make each output together

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.count and 0 <= self.local_rank < self.local_count <= self.count):
            raise ConfigError(
                f"RANK={self.rank} of WORLD_SIZE={self.count} and LOCAL_RANK={self.local_rank} of LOCAL_WORLD_SIZE="
                f"{self.local_count} contradict each other; start with accelerate launch or torchrun, or unset them"
            )
        if self.together != 1:
            check_processes(self.count, self.together)

    @property
    def first(self) -> bool:
        """Whether this one writes and tells what it and its neighbours make together."""
        return self.rank % self.together == 0

    def own(self, listed: Sequence[T]) -> list[T]:
        """Return every n-th of a list, this process's part of it; those that work together have one part."""
        return list(listed[self.rank // self.together :: self.count // self.together])

    def device(self, requested: str | None) -> str | None:
        """Return the device of this process, given what the user named: of one kind, each takes the next."""
        import torch

        if self.local_count == 1 or (requested is None and not torch.accelerator.is_available()):
            return requested
        kind = requested or str(torch.accelerator.current_accelerator())
        kind, _, number = kind.partition(":")
        if requested and number:
            raise ConfigError(
                f"--device {requested} puts all {self.local_count} processes of this machine on one device; write "
                f"--device {kind}, or leave it out, so that each takes its own"
            )
        if kind == "cpu":
            return kind
        there = torch.get_device_module(kind).device_count()
        if self.local_count > there:
            raise ConfigError(
                f"{self.local_count} processes of this machine take a device each, and it has {there} {kind} devices; "
                "start at most as many"
            )
        return f"{kind}:{self.local_rank}"


def started_process(environ: Mapping[str, str] = os.environ, *, together: int = 1) -> Process:
    """Find which of a launcher's processes this is, by the variables that it sets; the only one without them."""
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return Process(together=together)
    variables: dict[str, Any] = {"LOCAL_RANK": environ["RANK"], "LOCAL_WORLD_SIZE": environ["WORLD_SIZE"], **environ}
    names = {"rank": "RANK", "count": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_count": "LOCAL_WORLD_SIZE"}
    try:
        return Process(**{field: int(variables[name]) for field, name in names.items()}, together=together)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        text = ", ".join(f"{name}={variables[name]}" for name in names.values())
        raise ConfigError(f"a launcher's variables must be whole numbers, got {text}; unset them") from None
