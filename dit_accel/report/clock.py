"""Seconds of a run's forwards, dense ones apart from those that methods made shorter: whether the run got faster."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

Kind = Literal["dense", "reduced", "skipped", "extended"]
"""Of a forward: as the model runs it; some attention call followed a plan, or some blocks were skipped; skipped whole
by a cache; with a further forward inside, as guidance by a perturbed branch has it."""

KINDS: tuple[Kind, ...] = get_args(Kind)
Key = tuple[str, int, str]
"""Transformer, step and branch of a forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedForward:
    """One forward of the last generation.

    Attributes:
        transformer: component name.
        step_index: 0-based step.
        branch: name of the denoising call.
        kind: what it ran.
        seconds: how long it took, methods around it included.
        before: seconds since the forward before it ended; 0 for the first.
    """

    transformer: str
    step_index: int
    branch: str
    kind: Kind
    seconds: float
    before: float


class Clock:
    """Times forwards without waiting for the device: by events on a GPU, which `timing` reads."""

    def __init__(self) -> None:
        self._spans: list[tuple[Key, Kind, Any, Any]] = []

    def stamp(self, device: torch.device) -> Any:
        """Return this moment of a device's work."""
        if device.type not in ("cuda", "xpu"):
            return time.perf_counter()
        event = torch.get_device_module(device).Event(enable_timing=True)
        event.record()
        return event

    def add(self, key: Key, kind: Kind, begin: Any, end: Any) -> None:
        """Keep a forward that lies between two stamps."""
        self._spans.append((key, kind, begin, end))

    def timing(self) -> "Timing":
        """Return the seconds of every forward, in their order; waits for the last one on a GPU."""
        forwards, last = [], None
        for (transformer, step, branch), kind, begin, end in self._spans:
            forwards.append(
                TimedForward(
                    transformer=transformer, step_index=step, branch=branch, kind=kind, seconds=_between(begin, end),
                    before=0.0 if last is None else _between(last, begin),
                )
            )  # fmt: skip
            last = end
        return Timing(tuple(forwards))


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the forwards of a run took.

    Attributes:
        forwards: one entry each, in the order of the run; those of a training step are not timed.
    """

    forwards: tuple[TimedForward, ...] = field(default=())

    def seconds(self, kind: Kind) -> tuple[float, ...]:
        """Return the seconds of the forwards of one kind."""
        return tuple(one.seconds for one in self.forwards if one.kind == kind)

    @property
    def total(self) -> float:
        """Seconds of all forwards."""
        return sum(one.seconds for one in self.forwards)

    @property
    def elapsed(self) -> float:
        """Seconds from the first forward's begin to the last one's end."""
        return self.total + sum(one.before for one in self.forwards)

    @property
    def dense(self) -> float | None:
        """Median seconds of a dense forward; None if there was none."""
        return statistics.median(found) if (found := self.seconds("dense")) else None

    @property
    def speedup(self) -> float | None:
        """Time that the run would have taken with dense forwards alone, over what it took; None if none was dense.

        It counts the transformer's forwards: not the text encoder, nor the decoder.
        """
        return None if self.dense is None or not self.total else len(self.forwards) * self.dense / self.total

    def lines(self) -> list[str]:
        """Return the first lines of a report."""
        if not self.forwards:
            return []
        parts = [
            f"{len(seconds)} {kind} of {spell_seconds(statistics.median(seconds))}"
            for kind in KINDS
            if (seconds := self.seconds(kind))
        ]
        forwards = f"forwards: {', '.join(parts)} each (median); {spell_seconds(self.total)} in all"
        if self.speedup is None:
            return [f"measured speed-up: unknown, since no forward was dense; {forwards}"]
        return [f"measured speed-up: {self.speedup:.2f} over dense forwards alone; {forwards}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the times as plain values."""
        each = [{name: getattr(one, name) for name in one.__slots__} for one in self.forwards]
        return {"speedup": self.speedup, "dense_seconds": self.dense, "total_seconds": self.total, "forwards": each}


def spell_seconds(seconds: float) -> str:
    """Return seconds with three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
