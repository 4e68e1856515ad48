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

Part = Literal["attention", "text", "fetching"]
"""Of a forward: its self-attention calls; those over the text alone, beside them; the wait for offloaded weights."""

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
        lists: seconds in which the methods planned its attention calls, tile lists included, on the processor.
        attention: seconds of its self-attention calls, their planning included; None: not measured in this forward.
        text: seconds of attention calls over the text alone, beside those; None likewise.
        fetching: seconds for which it waited for weights that are offloaded; None likewise.
    """

    transformer: str
    step_index: int
    branch: str
    kind: Kind
    seconds: float
    before: float
    lists: float = 0.0
    attention: float | None = None
    text: float | None = None
    fetching: float | None = None


@dataclass(slots=True)
class _Span:
    """A forward between two stamps, with what was measured inside it."""

    key: Key
    kind: Kind
    begin: Any
    end: Any
    lists: float
    parts: dict[Part, list[tuple[Any, Any]]] | None

    def seconds_of(self, part: Part) -> float | None:
        """Return the seconds of a part; None: not measured."""
        found = (self.parts or {}).get(part)
        return None if found is None else sum(_between(begin, end) for begin, end in found)


class Clock:
    """Times forwards without waiting for the device: by events on a GPU, which `timing` reads.

    Of the forwards with the numbers 1, 2, 4, 8 ... it times the parts too: few enough to cost nothing on a GPU, and
    some of every kind.

    Attributes:
        lists: seconds of planning in the forward that runs.
        parts: what was timed in the forward that runs; None: its parts are not timed.
    """

    def __init__(self) -> None:
        self._spans: list[_Span] = []
        self._begun = -1
        self.lists = 0.0
        self.parts: dict[Part, list[tuple[Any, Any]]] | None = None

    def begin(self, device: torch.device) -> Any:
        """Begin a forward: return its stamp, and choose whether its parts are timed."""
        self._begun += 1
        self.lists = 0.0
        self.parts = {} if self._begun and not self._begun & (self._begun - 1) else None
        return self.stamp(device)

    def stamp(self, device: torch.device) -> Any:
        """Return this moment of a device's work."""
        if device.type not in ("cuda", "xpu"):
            return time.perf_counter()
        event = torch.get_device_module(device).Event(enable_timing=True)
        event.record()
        return event

    def add_part(self, part: Part, begin: Any, device: torch.device) -> None:
        """Keep a part of the forward that runs, from a stamp until now."""
        if self.parts is not None:
            self.parts.setdefault(part, []).append((begin, self.stamp(device)))

    def end(self, key: Key, kind: Kind, begin: Any, device: torch.device, attention_calls: int) -> None:
        """Keep the forward that began at a stamp and ends now.

        Its attention is taken as timed only where all its calls were: those in compiled blocks are not seen.
        """
        parts, self.parts = self.parts, None
        if parts is not None and len(parts.get("attention", ())) < attention_calls:
            parts.pop("attention", None)
        self._spans.append(_Span(key, kind, begin, self.stamp(device), self.lists, parts))

    def timing(self) -> "Timing":
        """Return the seconds of every forward, in their order; waits for the last one on a GPU."""
        forwards, last = [], None
        for span in self._spans:
            transformer, step, branch = span.key
            forwards.append(
                TimedForward(
                    transformer=transformer, step_index=step, branch=branch, kind=span.kind,
                    seconds=_between(span.begin, span.end),
                    before=0.0 if last is None else _between(last, span.begin),
                    lists=span.lists, attention=span.seconds_of("attention"), text=span.seconds_of("text"),
                    fetching=span.seconds_of("fetching"),
                )
            )  # fmt: skip
            last = span.end
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

    def share(self, part: Part, kind: Kind) -> float | None:
        """Return a part's median share of the forwards of a kind in which it was timed; None: in none."""
        each = [
            seconds / one.seconds
            for one in self.forwards
            if one.kind == kind and (seconds := getattr(one, part)) is not None and one.seconds
        ]
        return min(1.0, statistics.median(each)) if each else None

    def lines(self, predicted: str = "") -> list[str]:
        """Return the first lines of a report; ``predicted`` stands behind what was measured."""
        if not self.forwards:
            return []
        parts = [
            f"{len(seconds)} {kind} of {spell_seconds(statistics.median(seconds))}"
            for kind in KINDS
            if (seconds := self.seconds(kind))
        ]
        forwards = f"forwards: {', '.join(parts)} each (median); {spell_seconds(self.total)} in all"
        if self.speedup is None:
            return [f"measured speed-up: unknown, since no forward was dense{predicted}; {forwards}"]
        return [f"measured speed-up: {self.speedup:.2f}{predicted} over dense forwards alone; {forwards}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the times as plain values."""
        each = [{name: getattr(one, name) for name in one.__slots__} for one in self.forwards]
        return {
            "speedup": self.speedup, "dense_seconds": self.dense, "total_seconds": self.total,
            "elapsed_seconds": self.elapsed, "attention_share": self.share("attention", "dense"), "forwards": each,
        }  # fmt: skip


def spell_seconds(seconds: float) -> str:
    """Return seconds with three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
