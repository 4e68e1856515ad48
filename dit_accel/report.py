"""The report: what really ran in the last generation, by step and layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .plan import AttentionPlan, Moment


@dataclass(slots=True)
class _Forward:
    """Counts of one denoising call (transformer, branch, step)."""

    dense_layers: int = 0
    sparse_layers: set[int] = field(default_factory=set)
    exact: int = 0
    pooled: int = 0
    total: int = 0


class Recorder:
    """Counts what runs, one generation long."""

    def __init__(self) -> None:
        self.forwards: dict[tuple[str, int, str], _Forward] = {}
        self.notes: list[str] = []
        self.backends: set[str] = set()

    def note(self, text: str) -> None:
        """Keep a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def forward(self, transformer: str, branch: str, step_index: int, dense_layers: int) -> None:
        """Count one denoising call and the layers of it that run dense."""
        entry = self.forwards.setdefault((transformer, step_index, branch), _Forward())
        entry.dense_layers += dense_layers

    def sparse_call(self, moment: Moment, plan: AttentionPlan) -> None:
        """Count one attention call that follows a plan; a layer that calls for each row of the batch counts once."""
        key = (moment.transformer, moment.step_index, moment.branch)
        entry = self.forwards.setdefault(key, _Forward())
        entry.sparse_layers.add(moment.layer)
        if plan.tiles is not None:
            entry.exact += plan.tiles.tiles_exact
            entry.pooled += plan.tiles.tiles_pooled
            entry.total += plan.tiles.tiles_total


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One denoising call of the last generation.

    Attributes:
        transformer: component name.
        step_index: 0-based step.
        branch: name of the denoising call.
        dense_layers: attention calls that went to the user's own dense backend.
        sparse_layers: attention calls that followed a plan.
        density: exact tiles of the planned calls over all their tiles; 1 if there was none.
        pooled: pooled tiles of the planned calls over all their tiles.
    """

    transformer: str
    step_index: int
    branch: str
    dense_layers: int
    sparse_layers: int
    density: float
    pooled: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ran in the last generation, and what "auto" and the recipe resolved to.

    Attributes:
        methods: method name -> its options, every recipe value filled in.
        backend: the kernel backend asked for, and what ``auto`` chose.
        model: component name -> adapter and family.
        steps: one entry a denoising call, in the order of the run.
        notes: remarks of the methods, such as a sequence too short to gain.
    """

    methods: Mapping[str, Mapping[str, Any]]
    backend: str
    model: Mapping[str, str]
    steps: Sequence[StepReport] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def density(self) -> float:
        """Exact share of the attention work over the whole generation, dense calls counted as 1."""
        calls = sum(step.dense_layers + step.sparse_layers for step in self.steps)
        kept = sum(step.dense_layers + step.sparse_layers * step.density for step in self.steps)
        return kept / calls if calls else 1.0

    @property
    def sparse_density(self) -> float | None:
        """Exact share over the planned attention calls alone; None if there was none."""
        calls = sum(step.sparse_layers for step in self.steps)
        return sum(step.sparse_layers * step.density for step in self.steps) / calls if calls else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "methods": {name: dict(options) for name, options in self.methods.items()},
            "backend": self.backend,
            "model": dict(self.model),
            "density": self.density,
            "sparse_density": self.sparse_density,
            "steps": [{name: getattr(step, name) for name in step.__slots__} for step in self.steps],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{name}: {_spell(options)}" for name, options in self.methods.items()] or ["no method attached"]
        lines += [f"{component}: {what}" for component, what in self.model.items()]
        lines.append(f"backend: {self.backend}")
        if not self.steps:
            return "\n".join([*lines, "nothing has run yet"])
        dense = sum(step.dense_layers for step in self.steps)
        sparse = sum(step.sparse_layers for step in self.steps)
        lines.append(f"attention calls: {dense} dense, {sparse} sparse; density {self.density:.3f} over the run")
        if self.sparse_density is not None:
            pooled = sum(step.sparse_layers * step.pooled for step in self.steps) / sparse
            lines.append(f"sparse calls: {self.sparse_density:.3f} exact, {pooled:.3f} pooled")
        return "\n".join([*lines, *self.notes])


def step_reports(recorder: Recorder) -> tuple[StepReport, ...]:
    """Turn the recorder's counts into one `StepReport` a denoising call."""
    return tuple(
        StepReport(
            transformer=transformer,
            step_index=step_index,
            branch=branch,
            dense_layers=entry.dense_layers,
            sparse_layers=len(entry.sparse_layers),
            density=entry.exact / entry.total if entry.total else 1.0,
            pooled=entry.pooled / entry.total if entry.total else 0.0,
        )
        for (transformer, step_index, branch), entry in recorder.forwards.items()
    )


def _spell(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
