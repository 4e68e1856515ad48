"""What a sampling run did, step by step: what ran, what stayed dense and why, and how long it took."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_accel.report.clock import Timing, spell_seconds

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardReport:
    """One forward of a run.

    Attributes:
        step: 0-based.
        branch: whose prompts it was of.
        kind: ``dense``, ``reduced`` (an attention call followed a plan) or ``skipped`` (a cache forecast it).
        elsewhere: it was another node that skipped it.
        seconds: how long it took.
        planned: attention calls that followed a plan.
        exact: share of tiles that these computed exactly; None: there were none.
        dense: why attention calls stayed dense -> how many.
    """

    step: int
    branch: str
    kind: str
    elsewhere: bool
    seconds: float
    planned: int
    exact: float | None
    dense: dict[str, int]

    def __str__(self) -> str:
        parts = []
        if self.kind == "skipped":
            parts.append("skipped by another node" if self.elsewhere else "skipped, forecast by the cache")
        if self.planned:
            parts.append(f"{self.planned} layers at {100 * (self.exact or 0.0):.1f} % of the tiles")
        parts += [f"{count} dense: {why}" for why, count in self.dense.items()]
        what = "; ".join(parts) or "dense"
        return f"step {self.step:3d}  {self.branch:<12} {spell_seconds(self.seconds):>8}  {what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """One sampling run.

    Attributes:
        title: the methods, model and backend.
        problems: what kept methods from acting, a line each.
        forwards: in the order in which they ran.
        notes: what the methods say of the run.
        speedup: what the sampler's loop would have taken with dense forwards alone over what it took, measured without
            its first forward, which warms up or compiles; None: no other one was dense, or most of them compiled.
        dense_seconds: median of the dense forwards; None likewise.
    """

    title: str
    problems: tuple[str, ...]
    forwards: tuple[ForwardReport, ...]
    notes: tuple[str, ...]
    speedup: float | None
    dense_seconds: float | None

    @property
    def summary(self) -> str:
        """The title, and how fast the run was."""
        return f"{self.title}; {self._speed}" if self._speed else self.title

    @property
    def _speed(self) -> str:
        if self.speedup is not None and self.dense_seconds is not None:
            return (
                f"{self.speedup:.2f} times as fast as a loop of {len(self.forwards) - 1} forwards like its own dense "
                f"ones (median {spell_seconds(self.dense_seconds)}); the first forward is not counted"
            )
        nothing = "no forward but the first was dense, so that the run has nothing to compare its time with"
        return nothing if self.forwards else ""

    def __str__(self) -> str:
        problems = (f"! {problem}" for problem in self.problems)
        return "\n".join(filter(None, [self.title, *problems, *map(str, self.forwards), *self.notes, self._speed]))


def report_of(run: Run) -> RunReport:
    """Return the report of a run that has ended."""
    engine = run.engine
    names = ", ".join(config.name for config in run.configs) or "no method"
    title = f"dit-accel: {names} on {run.model_name or 'a model'}"
    if engine is None:
        return RunReport(
            title=title, problems=tuple(run.problems), forwards=(), notes=(), speedup=None, dense_seconds=None
        )
    recorder = engine.recorder
    timing: Timing = recorder.clock.timing()
    title += f", backend {recorder.spell_backend(run.backend)}"
    forwards = []
    for timed in timing.forwards:
        counts = recorder.forwards.get((timed.transformer, timed.step_index, timed.branch))
        calls = [] if counts is None or timed.kind == "skipped" else counts.calls
        why: Counter[str] = Counter() if timed.kind == "skipped" else +run.declined.get(
            (timed.step_index, timed.branch), Counter()
        )  # fmt: skip
        forwards.append(
            ForwardReport(
                step=timed.step_index, branch=timed.branch, kind=timed.kind,
                elsewhere=(timed.step_index, timed.branch) in run.skipped_elsewhere, seconds=timed.seconds,
                planned=len(calls), dense=dict(why),
                exact=sum(float(call.exact) for call in calls) / len(calls) if calls else None,
            )
        )  # fmt: skip
    notes = [*recorder.notes]
    for handler in engine.handlers:
        if (section := handler.report()) is not None:
            notes += [section.title, *(f"  {line}" for line in section.lines)]
    rest = Timing(timing.forwards[1:])
    return RunReport(
        title=title, problems=tuple(run.problems), forwards=tuple(forwards), notes=tuple(notes),
        speedup=rest.speedup, dense_seconds=rest.dense,
    )  # fmt: skip
