"""Seconds of a run and its forwards, dense ones apart from those that methods made shorter: whether it got faster."""

import statistics
import sys
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

MOSTLY = 0.5
"""Share of a run's time from which what started in it leaves nothing to measure."""


def now() -> float:
    """Return the processor's clock, in seconds."""
    return time.perf_counter()


def graphs() -> int:
    """Count the graphs that torch has compiled in this process: a forward in which it rises compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # private to torch: without it slow first forwards tell alone
    return getattr(dynamo, "counters", {}).get("stats", {}).get("unique_graphs", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedForward:
    """One forward of the last generation."""

    transformer: str  # component name
    step_index: int  # 0-based step
    branch: str  # name of the denoising call
    kind: Kind  # what it ran
    seconds: float  # how long it took, methods around it included
    before: float  # seconds since the forward before it ended; 0 for the first
    # seconds in which the methods planned its attention calls, tile lists included, on the processor
    lists: float = 0.0
    # seconds of its self-attention calls, their planning included; None: not measured in this forward
    attention: float | None = None
    text: float | None = None  # seconds of attention calls over the text alone, beside those; None likewise
    fetching: float | None = None  # seconds for which it waited for weights that are offloaded; None likewise
    compiled: bool = False  # whether torch compiled in it


@dataclass(slots=True)
class _Span:
    """A forward between two stamps, with what was measured inside it."""

    key: Key
    kind: Kind
    begin: Any
    end: Any
    lists: float
    parts: dict[Part, list[tuple[Any, Any]]] | None
    compiled: bool

    def seconds_of(self, part: Part) -> float | None:
        """Return the seconds of a part; None: not measured."""
        times = (self.parts or {}).get(part)
        return None if times is None else sum(_between(begin, end) for begin, end in times)


class Clock:
    """Times forwards without waiting for the device: by events on a GPU, which `timing` reads.

    Of the forwards with the numbers 1, 2, 4, 8 ... it times the parts too: few enough to cost nothing on a GPU, and
    some of every kind.
    """

    def __init__(self) -> None:
        self._spans: list[_Span] = []
        self._begun, self._graphs = -1, 0
        self.call: float | None = None  # seconds of the pipeline's whole call; None: it is not over, or was not seen
        self.lists = 0.0  # seconds of planning in the forward that runs
        # what was timed in the forward that runs; None: its parts are not timed
        self.parts: dict[Part, list[tuple[Any, Any]]] | None = None

    def begin(self, device: torch.device) -> Any:
        """Begin a forward: return its stamp, and choose whether its parts are timed."""
        self._begun += 1
        self._graphs = graphs()
        self.lists = 0.0
        self.parts = {} if self._begun and not self._begun & (self._begun - 1) else None
        return self.stamp(device)

    def stamp(self, device: torch.device) -> Any:
        """Return this moment of a device's work."""
        if device.type not in ("cuda", "xpu"):
            return now()
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
        compiled = graphs() != self._graphs
        self._spans.append(_Span(key, kind, begin, self.stamp(device), self.lists, parts, compiled))

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
                    fetching=span.seconds_of("fetching"), compiled=span.compiled,
                )
            )  # fmt: skip
            last = span.end
        return Timing(tuple(forwards), self.call)


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a run and its forwards took.

    Attributes:
        forwards: one entry each, in the order of the run; those of a training step are not timed.
        call: seconds of the pipeline's whole call, text encoder and decoder included; None: it was not seen.
    """

    forwards: tuple[TimedForward, ...] = field(default=())
    call: float | None = None

    def seconds(self, kind: Kind) -> tuple[float, ...]:
        """Return the seconds of the forwards of one kind."""
        return tuple(forward.seconds for forward in self.forwards if forward.kind == kind)

    @property
    def total(self) -> float:
        """Seconds of all forwards."""
        return sum(forward.seconds for forward in self.forwards)

    @property
    def elapsed(self) -> float:
        """Seconds of the denoising loop: from the first forward's begin to the last one's end."""
        return self.total + sum(forward.before for forward in self.forwards)

    @property
    def whole(self) -> float:
        """Seconds of the pipeline's whole call, or of the denoising loop where the call was not seen."""
        return max(self.call or 0.0, self.elapsed)

    @property
    def dense(self) -> float | None:
        """Median seconds of a dense forward in which nothing started; None if there was none."""
        return self.usual("dense")

    def usual(self, kind: Kind) -> float | None:
        """Return the median seconds of the forwards of a kind in which nothing started; None: there was none."""
        starts, forwards = self.starts, enumerate(self.forwards)
        seconds = [forward.seconds for place, forward in forwards if forward.kind == kind and place not in starts]
        return statistics.median(seconds) if seconds else None

    @property
    def starts(self) -> frozenset[int]:
        """Places of the forwards in which something started that later ones have.

        Those in which torch compiled, and of each transformer the first of a kind, if it took more than twice the
        median of the others.
        """
        starts, seen = set[int](), set[tuple[str, Kind]]()
        for place, forward in enumerate(self.forwards):
            first = (forward.transformer, forward.kind) not in seen
            seen.add((forward.transformer, forward.kind))
            if forward.compiled or (first and self._is_slow(forward)):
                starts.add(place)
        return frozenset(starts)

    def _is_slow(self, forward: TimedForward) -> bool:
        seconds = [other.seconds for other in self.forwards if other.kind == forward.kind and other is not forward]
        return bool(seconds) and forward.seconds > 2 * statistics.median(seconds)

    @property
    def started(self) -> float:
        """Seconds that those forwards took beyond the usual ones of their kind."""
        forwards = (self.forwards[place] for place in self.starts)
        return sum(max(0.0, forward.seconds - (self.usual(forward.kind) or 0.0)) for forward in forwards)

    @property
    def speedup(self) -> float | None:
        """What a dense call would have taken over what this one took; None where `not_measured` says why not.

        It is that of the whole call, as of a stopwatch around it, or of the denoising loop where the call was not seen.
        The dense run's seconds are these and what each forward saved beside the median dense one; what started in this
        run alone, such as compilation, counts in neither.
        """
        return self._speedup(self.whole)

    @property
    def loop_speedup(self) -> float | None:
        """The same of the denoising loop alone, which is what `dit-accel plan` predicts."""
        return self._speedup(self.elapsed)

    def _speedup(self, seconds: float) -> float | None:
        if self.not_measured or self.dense is None:
            return None
        if self.is_dense:
            return 1.0
        steady = seconds - self.started
        return (steady + len(self.forwards) * self.dense - (self.total - self.started)) / steady

    @property
    def is_dense(self) -> bool:
        """Whether no forward was shortened, so that what they differ by is the machine's doing."""
        return all(forward.kind == "dense" for forward in self.forwards)

    @property
    def not_measured(self) -> str:
        """Why there is no speed-up, in words; "" where there is one."""
        if not self.total:
            return "unknown, since nothing was timed"
        if not self.seconds("dense"):
            return "unknown, since no forward was dense"
        starts = [self.forwards[place] for place in self.starts]
        if any(self.usual(forward.kind) is None for forward in starts) or self.started > MOSTLY * self.elapsed:
            what = "compiled" if any(forward.compiled for forward in starts) else "started"
            return f"not measured: forwards {what} for {spell_seconds(self.started)}; run once more"
        return ""

    def share(self, part: Part, kind: Kind) -> float | None:
        """Return a part's median share of the forwards of a kind in which it was timed; None: in none."""
        each = [
            seconds / forward.seconds
            for forward in self.forwards
            if forward.kind == kind and (seconds := getattr(forward, part)) is not None and forward.seconds
        ]
        return min(1.0, statistics.median(each)) if each else None

    def lines(self, predicted: str = "") -> list[str]:
        """Return the first lines of a report; ``predicted`` stands behind what was measured of the loop."""
        if not self.forwards:
            return []
        parts = [
            f"{len(seconds)} {kind} of {spell_seconds(statistics.median(seconds))}"
            for kind in KINDS
            if (seconds := self.seconds(kind))
        ]
        taken = f"{spell_seconds(self.elapsed)} in the loop"
        if self.call is not None:
            taken += f", {spell_seconds(self.call)} in the whole call"
        forwards = f"forwards: {', '.join(parts)} each (median); {taken}"
        if self.not_measured:
            return [f"measured speed-up: {self.not_measured}{predicted}; {forwards}"]
        if self.is_dense:
            return [f"measured speed-up: 1.00{predicted}, since every forward was dense; {forwards}"]
        measured = f"{self.loop_speedup:.2f} of the denoising loop{predicted}"
        if self.call is not None:
            measured = f"{self.speedup:.2f} of the whole call, {measured}"
        return [f"measured speed-up: {measured}; {forwards}"]

    def to_dict(self) -> dict[str, Any]:
        """Return the times as plain values."""
        each = [{name: getattr(forward, name) for name in forward.__slots__} for forward in self.forwards]
        return {
            "speedup": self.speedup, "loop_speedup": self.loop_speedup, "dense_seconds": self.dense,
            "total_seconds": self.total, "elapsed_seconds": self.elapsed, "call_seconds": self.call,
            "attention_share": self.share("attention", "dense"), "forwards": each,
        }  # fmt: skip


def spell_seconds(seconds: float) -> str:
    """Return seconds with three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
