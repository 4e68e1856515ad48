"""The report: what really ran in the last generation, by step and layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import MissingBackend
from .clock import Key, Timing
from .recorder import CallShares, Recorder
from .sections import Section
from .why import RunCauses, why_not_faster

VERSION = 2
"""Of what `Report.to_dict` gives, as `dit_accel.report.schema.report_schema` describes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One denoising call of the last generation."""

    transformer: str  # component name
    step_index: int  # 0-based step
    branch: str  # name of the denoising call
    dense_layers: int  # attention calls that went to the user's own dense backend
    sparse_layers: int  # attention calls that followed a plan
    density: float  # exact tiles of the planned calls over all their tiles; 1 if there was none
    pooled: float  # pooled tiles of the planned calls over all their tiles
    # why -> calls that stayed dense in layers in which methods act: ``mask`` for one that is not key padding,
    # ``backend`` where dense attention is faster on this processor
    stayed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReport:
    """What the planned attention of one layer computed in one denoising call (see `StepReport`), mean over rows."""

    transformer: str
    step_index: int
    branch: str
    layer: int  # the attention module's index in its transformer
    density: float  # exact tiles over all tiles
    pooled: float  # pooled tiles over all tiles
    by_head: tuple[float, ...] = ()  # `density` of each head, [H], where a selection chose by head; else empty


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedSpeedup:
    """The speed-up that `dit-accel plan` predicts for a run's size, steps and methods."""

    speedup: float  # of the denoising loop, over dense forwards alone
    # methods that save what is known only while they run, so that nothing of theirs is in it
    uncounted: Sequence[str] = ()
    # how the model's linear layers compute, in its dense forwards too, such as ``in int8``; empty: in 16 bits
    linears: str = ""

    def __str__(self) -> str:
        predicted = f"predicted {self.speedup:.2f}"
        if self.linears:
            predicted += f" with linear layers {self.linears},"
        if not self.uncounted:
            return predicted.removesuffix(",")
        names = " and ".join(self.uncounted)
        if 0.995 <= self.speedup <= 1.005:
            return f"not predicted: what {names} saves is known only while it runs"
        return f"{predicted} without {names}, whose saving is known only while it runs"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Report:
    """What ran in the last generation, and what "auto" and the recipe resolved to.

    Attributes:
        methods: method name -> its options, every recipe value filled in.
        backend: the requested kernel backend, what ``auto`` chose, how the torch backend computed (by its compiled
            loop, or else why not), and in which precision queries and keys were multiplied, if not in their own.
        model: component name -> adapter and family.
        steps: one entry per denoising call, in the order of the run.
        notes: remarks of the methods, such as a sequence too short to gain, and the problem.
        problem: why what is attached did not act, and what to do; "" where nothing is wrong.
        calls: one entry per planned attention call, by layer and head.
        state_bytes: method name -> the most memory that it held from step to step since attach; methods that held none
            are left out.
        sections: what individual methods report.
        timing: how long the forwards took, and the speed-up that this measures.
        predicted: what `dit-accel plan` predicts for this run; None: of a model with the sizes of no released one.
    """

    methods: Mapping[str, Mapping[str, Any]]
    backend: str
    model: Mapping[str, str]
    steps: Sequence[StepReport] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)
    problem: str = ""
    calls: Sequence[CallReport] = field(default_factory=tuple)
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    sections: Sequence[Section] = field(default_factory=tuple)
    timing: Timing = field(default_factory=Timing, compare=False)
    predicted: PredictedSpeedup | None = None

    @property
    def density(self) -> float:
        """Exact share of the attention work over the whole run, dense calls counted as 1."""
        calls = sum(step.dense_layers + step.sparse_layers for step in self.steps)
        exact = sum(step.dense_layers + step.sparse_layers * step.density for step in self.steps)
        return exact / calls if calls else 1.0

    @property
    def sparse_density(self) -> float | None:
        """Exact share over the planned attention calls alone; None if there was none."""
        calls = sum(step.sparse_layers for step in self.steps)
        return sum(step.sparse_layers * step.density for step in self.steps) / calls if calls else None

    def section(self, method: str) -> Section | None:
        """Return one method's section, by the method's name; None where it has none."""
        return next((section for section in self.sections if section.method == method), None)

    def why_not_faster(self) -> list[str]:
        """Return a line for each cause of the time that the run still took, largest first, and what to do."""
        if not self.methods:
            return []
        dense: dict[Key, float] = {}
        stayed: dict[Key, Mapping[str, float]] = {}
        for step in self.steps:
            key, calls = (step.transformer, step.step_index, step.branch), step.dense_layers + step.sparse_layers
            stayed[key] = {why: min(1.0, count / max(1, calls)) for why, count in step.stayed.items()}
            if step.sparse_layers:
                dense[key] = step.dense_layers / calls
        ran = {(step.transformer, step.branch, step.dense_layers + step.sparse_layers) for step in self.steps}
        logs = {part.method: log for part in self.sections if isinstance(log := part.data.get("forwards"), list)}
        return why_not_faster(
            RunCauses(
                timing=self.timing, methods=self.methods, logs=logs, dense_layers=dense, stayed=stayed,
                notes=tuple(note for note in self.notes if note != self.problem), problem=self.problem,
                cached=len(ran) > len({key[:2] for key in ran}),
            )
        )  # fmt: skip

    def first_lines(self) -> list[str]:
        """Tell whether the methods helped: the speed-up measured and predicted, and why it was not more."""
        beside = f" ({self.predicted})" if self.predicted else ""
        lines = self.timing.lines(beside) if self.methods else []
        return [*lines, *(f"why not faster: {cause}" for cause in self.why_not_faster())]

    def plot(self, path: str | Path) -> None:
        """Write what was kept, by step, layer and head, and which steps were skipped, as a PNG.

        Raises:
            ConfigError: if nothing followed a plan and no step was a cache's to skip, or the path is not a .png in
                an existing folder.
            MissingBackend: without a package that draws reports.
        """
        draw = drawing("plot")
        if draw is None:
            raise MissingBackend("report().plot needs a package that draws reports, found none; reinstall dit-accel")
        draw(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON; `dit_accel.report.schema.report_schema` describes them."""
        predicted = self.predicted
        return {
            "version": VERSION,
            "measured_speedup": self.timing.speedup,
            "predicted_speedup": predicted and predicted.speedup,
            "not_in_prediction": list(predicted.uncounted) if predicted else [],
            "methods": {name: dict(options) for name, options in self.methods.items()},
            "backend": self.backend,
            "model": dict(self.model),
            "density": self.density,
            "sparse_density": self.sparse_density,
            "steps": [{name: getattr(step, name) for name in step.__slots__} for step in self.steps],
            "notes": list(self.notes),
            "calls": [{name: getattr(call, name) for name in call.__slots__} for call in self.calls],
            "state_bytes": dict(self.state_bytes),
            "sections": {section.method: dict(section.data) for section in self.sections},
            "timing": self.timing.to_dict(),
            "why_not_faster": self.why_not_faster(),
        }

    def __repr__(self) -> str:
        return (
            f"<Report: {', '.join(self.methods) or 'no method'}; {len(self.steps)} calls, density {self.density:.3f}>"
        )

    def _repr_html_(self) -> str | None:
        draw = drawing("html")
        return None if draw is None else draw(self)

    def __str__(self) -> str:
        lines = self.first_lines()
        lines += ["in detail:"] * bool(lines)
        lines += [f"{name}: {_spell(options)}" for name, options in self.methods.items()] or ["no method attached"]
        lines += [f"{component}: {what}" for component, what in self.model.items()]
        lines.append(f"backend: {self.backend}")
        if not self.steps:
            return "\n".join([*lines, "nothing has run yet", *self.notes])
        dense = sum(step.dense_layers for step in self.steps)
        sparse = sum(step.sparse_layers for step in self.steps)
        lines.append(f"attention calls: {dense} dense, {sparse} sparse; density {self.density:.3f} over the run")
        if self.sparse_density is not None:
            pooled = sum(step.sparse_layers * step.pooled for step in self.steps) / sparse
            lines.append(f"sparse calls: {self.sparse_density:.3f} exact, {pooled:.3f} pooled")
        lines += [str(section) for section in self.sections]
        lines += [f"{name} held {size / 2**20:.3g} MiB from step to step" for name, size in self.state_bytes.items()]
        return "\n".join([*lines, *self.notes])


def drawing(kind: str) -> Callable[..., Any] | None:
    """Load the entry point of ``dit_accel.drawings`` of a kind, such as ``plot`` or ``html``; None: there is none."""
    entry = next(iter(entry_points(group="dit_accel.drawings", name=kind)), None)
    return None if entry is None else entry.load()


def step_reports(recorder: Recorder) -> tuple[StepReport, ...]:
    """Turn what the recorder counted into one `StepReport` per denoising call."""
    return tuple(
        StepReport(
            transformer=transformer,
            step_index=step_index,
            branch=branch,
            dense_layers=entry.dense_layers,
            sparse_layers=len({call.layer for call in entry.calls}),
            density=_mean([call.exact for call in entry.calls], 1.0),
            pooled=_mean([call.pooled for call in entry.calls], 0.0),
            stayed={why: count for why, count in entry.stayed.items()},
        )
        for (transformer, step_index, branch), entry in recorder.forwards.items()
    )


def call_reports(recorder: Recorder) -> tuple[CallReport, ...]:
    """Turn what the recorder counted into one `CallReport` per layer of a denoising call."""
    reports = []
    for (transformer, step_index, branch), entry in recorder.forwards.items():
        by_layer: dict[int, list[CallShares]] = {}
        for call in entry.calls:
            by_layer.setdefault(call.layer, []).append(call)
        for layer, calls in by_layer.items():
            heads = [call.by_head for call in calls if call.by_head is not None]
            reports.append(
                CallReport(
                    transformer=transformer,
                    step_index=step_index,
                    branch=branch,
                    layer=layer,
                    density=_mean([call.exact for call in calls], 1.0),
                    pooled=_mean([call.pooled for call in calls], 0.0),
                    by_head=tuple(_mean(head, 1.0) for head in zip(*heads, strict=True)),
                )
            )
    return tuple(reports)


def _mean(shares: Sequence[float | Tensor], otherwise: float) -> float:
    return sum(float(share) for share in shares) / len(shares) if shares else otherwise


def _spell(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in options.items())


def _short(value: Any) -> str:
    """Return an option as a line can hold it: of more than eight values the first and the last, and how many."""
    if isinstance(value, (tuple, list)) and len(value) > 8:
        return f"[{value[0]}, {value[1]}, ... {value[-1]}; {len(value)} values]"
    return str(value)
