"""The report: what really ran in the last generation, by step and layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dit_accel_kernels import EXACT, TileLists, count_bits, pack_bits
from dit_accel_kernels.cache import StorageCache
from torch import Tensor

from ..plan.layout import TokenLayout
from ..plan.plan import AttentionPlan, CallContext


@dataclass(slots=True)
class PlannedCall:
    """Shares of one planned attention call's tiles; tensors until `settle` reads them, so that no device is waited for.

    `by_head` is the exact share of each head, [H], where a selection chose by head.
    """

    layer: int
    exact: float | Tensor
    pooled: float | Tensor
    by_head: Tensor | Sequence[float] | None = None


@dataclass(slots=True)
class Forward:
    """What one denoising call (transformer, step, branch) ran."""

    dense_layers: int = 0
    calls: list[PlannedCall] = field(default_factory=list)


class Recorder:
    """Counts what runs, one generation long.

    `seen` holds the places whose dense calls are seen when they run; those of compiled blocks are not.
    """

    def __init__(self) -> None:
        self.forwards: dict[tuple[str, int, str], Forward] = {}
        self.notes: list[str] = []
        self.backends: set[str] = set()
        self.measured: list[tuple[CallContext, Tensor]] = []
        self.seen: set[int] = set()

    def measured_call(self, context: CallContext, error: Tensor) -> None:
        """Keep the error that probe rows found in one planned call, [H], relative L2."""
        self.measured.append((context, error))

    def note(self, text: str) -> None:
        """Keep a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def forward(self, transformer: str, branch: str, step_index: int, dense_layers: int) -> None:
        """Count one denoising call and the layers of it that run dense."""
        entry = self.forwards.setdefault((transformer, step_index, branch), Forward())
        entry.dense_layers += dense_layers

    def sparse_call(self, context: CallContext, plan: AttentionPlan) -> None:
        """Count one attention call that follows a plan's lists."""
        tiles = plan.tiles
        exact, pooled = (1.0, 0.0) if tiles is None else (tiles.density, tiles.tiles_pooled / tiles.tiles_total)
        self._calls(context).append(PlannedCall(context.layer, exact, pooled))

    def selected_call(self, context: CallContext, plan: AttentionPlan, exact: Tensor) -> None:
        """Count one attention call whose selection left ``exact``, bits int32 [B, H, NQ, W]."""
        tiles, selection = plan.tiles, plan.selection
        assert tiles is not None
        assert selection is not None
        size = tiles.query_tiles * tiles.key_tiles
        by_head = count_bits(exact).sum(-1).float().mean(0) / size
        left = tiles.density
        if selection.keep is not None and selection.rest == "skip":
            free = selection.keep if selection.pinned is None else selection.keep | selection.pinned
            left = count_bits(exact_bits(tiles, exact.shape[1]) & free).sum(-1).float().mean() / size
        pooled = tiles.tiles_pooled / tiles.tiles_total + (left - by_head.mean()).clamp(min=0)  # rounding may leave -0
        self._calls(context).append(PlannedCall(context.layer, by_head.mean(), pooled, by_head))

    def settle(self) -> None:
        """Turn the shares that are still tensors into numbers, in one transfer a device."""
        waiting: dict[tuple[torch.device, int], list[PlannedCall]] = {}
        for entry in self.forwards.values():
            for call in entry.calls:
                if isinstance(call.by_head, Tensor):
                    waiting.setdefault((call.by_head.device, len(call.by_head)), []).append(call)
        for calls in waiting.values():
            shares = [torch.stack([torch.as_tensor(call.exact), torch.as_tensor(call.pooled)]) for call in calls]
            values = torch.stack([torch.cat([s, call.by_head]) for s, call in zip(shares, calls, strict=True)])  # type: ignore[list-item]
            for call, (exact, pooled, *by_head) in zip(calls, values.tolist(), strict=True):
                call.exact, call.pooled, call.by_head = exact, pooled, tuple(by_head)

    def _calls(self, context: CallContext) -> list[PlannedCall]:
        return self.forwards.setdefault((context.transformer, context.step_index, context.branch), Forward()).calls


_EXACT_BITS: StorageCache[Tensor] = StorageCache()


def exact_bits(tiles: TileLists, heads: int) -> Tensor:
    """Return the exact tiles of lists as bits, int32 [B or 1, H or 1, NQ, W]; remembered while the lists live."""

    def build() -> Tensor:
        bits = pack_bits(tiles.states() == EXACT)
        return bits[None] if tiles.groups in (1, heads) else bits.unflatten(0, (-1, heads))

    return _EXACT_BITS.get((tiles.exact_offsets, tiles.exact_indices), (tiles.key_tiles, heads), build)


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
class CallReport:
    """What the planned attention of one layer computed in one denoising call, mean over batch rows.

    Attributes:
        transformer: component name.
        step_index: 0-based step.
        branch: name of the denoising call.
        layer: the attention module's index in its transformer.
        density: exact tiles over all tiles.
        pooled: pooled tiles over all tiles.
        by_head: `density` of each head, [H], where a selection chose by head; else empty.
    """

    transformer: str
    step_index: int
    branch: str
    layer: int
    density: float
    pooled: float
    by_head: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredError:
    """What the planned part of one attention call was off by at its probe rows, before any correction.

    Attributes:
        transformer: component name.
        step_index: 0-based step.
        branch: name of the denoising call.
        layer: the attention module's index in its transformer.
        rows: share of the call's query rows that were probed, each by dense attention beside what the plan computes.
        by_head: norm of (planned - dense) over the norm of dense, of each head, over probe rows and batch.
    """

    transformer: str
    step_index: int
    branch: str
    layer: int
    rows: float
    by_head: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What ran in the last generation, and what "auto" and the recipe resolved to.

    Attributes:
        methods: method name -> its options, every recipe value filled in.
        backend: the kernel backend asked for, and what ``auto`` chose.
        model: component name -> adapter and family.
        steps: one entry a denoising call, in the order of the run.
        notes: remarks of the methods, such as a sequence too short to gain.
        calls: one entry a planned attention call, by layer and head.
        state_bytes: method name -> the most memory that it held from step to step since attach; without those of none.
        measured: errors that probe rows found, one entry a probed call; empty without `DeltaAttention`.
    """

    methods: Mapping[str, Mapping[str, Any]]
    backend: str
    model: Mapping[str, str]
    steps: Sequence[StepReport] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)
    calls: Sequence[CallReport] = field(default_factory=tuple)
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    measured: Sequence[MeasuredError] = field(default_factory=tuple)

    @property
    def density(self) -> float:
        """Exact share of the attention work over the whole run, dense calls counted as 1; without probe rows."""
        calls = sum(step.dense_layers + step.sparse_layers for step in self.steps)
        kept = sum(step.dense_layers + step.sparse_layers * step.density for step in self.steps)
        return kept / calls if calls else 1.0

    @property
    def sparse_density(self) -> float | None:
        """Exact share over the planned attention calls alone, without probe rows; None if there was none."""
        calls = sum(step.sparse_layers for step in self.steps)
        return sum(step.sparse_layers * step.density for step in self.steps) / calls if calls else None

    @property
    def probe_density(self) -> float:
        """What probe rows add to `sparse_density`: they are computed densely, beside the tiles."""
        calls = sum(step.sparse_layers for step in self.steps)
        probed = {(one.transformer, one.step_index, one.branch, one.layer): one.rows for one in self.measured}
        return sum(probed.values()) / calls if calls else 0.0

    def plot(self, path: str | Path) -> None:
        """Write a heat map of what was kept, by step, layer and head, as a PNG; needs matplotlib.

        Raises:
            ConfigError: if nothing followed a plan, or the path is no .png in an existing folder.
            MissingBackend: without matplotlib.
        """
        from .heat_map import write_heat_map

        write_heat_map(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        return {
            "methods": {name: dict(options) for name, options in self.methods.items()},
            "backend": self.backend,
            "model": dict(self.model),
            "density": self.density,
            "sparse_density": self.sparse_density,
            "probe_density": self.probe_density,
            "steps": [{name: getattr(step, name) for name in step.__slots__} for step in self.steps],
            "notes": list(self.notes),
            "calls": [{name: getattr(call, name) for name in call.__slots__} for call in self.calls],
            "state_bytes": dict(self.state_bytes),
            "measured": [{name: getattr(one, name) for name in one.__slots__} for one in self.measured],
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
            probed = f", {self.probe_density:.3f} more in dense probe rows" if self.measured else ""
            lines.append(f"sparse calls: {self.sparse_density:.3f} exact, {pooled:.3f} pooled{probed}")
        lines += [f"{name} held {size / 2**20:.3g} MiB from step to step" for name, size in self.state_bytes.items()]
        if self.measured:
            lines.append(_spell_measured(self.measured))
        return "\n".join([*lines, *self.notes])


def step_reports(recorder: Recorder) -> tuple[StepReport, ...]:
    """Turn what the recorder counted into one `StepReport` a denoising call."""
    return tuple(
        StepReport(
            transformer=transformer,
            step_index=step_index,
            branch=branch,
            dense_layers=entry.dense_layers,
            sparse_layers=len({call.layer for call in entry.calls}),
            density=_mean([call.exact for call in entry.calls], 1.0),
            pooled=_mean([call.pooled for call in entry.calls], 0.0),
        )
        for (transformer, step_index, branch), entry in recorder.forwards.items()
    )


def call_reports(recorder: Recorder) -> tuple[CallReport, ...]:
    """Turn what the recorder counted into one `CallReport` a layer of a denoising call."""
    found = []
    for (transformer, step_index, branch), entry in recorder.forwards.items():
        by_layer: dict[int, list[PlannedCall]] = {}
        for call in entry.calls:
            by_layer.setdefault(call.layer, []).append(call)
        for layer, calls in by_layer.items():
            heads = [call.by_head for call in calls if call.by_head is not None]
            found.append(
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
    return tuple(found)


def measured_errors(recorder: Recorder, share_of: Callable[[TokenLayout], float]) -> tuple[MeasuredError, ...]:
    """Turn what probe rows found into one `MeasuredError` a probed call; ``share_of`` gives their share of the rows."""
    return tuple(
        MeasuredError(
            transformer=context.transformer,
            step_index=context.step_index,
            branch=context.branch,
            layer=context.layer,
            rows=share_of(context.layout),
            by_head=tuple(error.tolist()),
        )
        for context, error in recorder.measured
    )


def _mean(shares: Sequence[float | Tensor], otherwise: float) -> float:
    return sum(float(share) for share in shares) / len(shares) if shares else otherwise


def _spell(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _spell_measured(measured: Sequence[MeasuredError]) -> str:
    found = [(error, one, head) for one in measured for head, error in enumerate(one.by_head)]
    worst, one, head = max(found, key=lambda entry: entry[0])
    mean = sum(error for error, *_ in found) / len(found)
    where = f"step {one.step_index}, layer {one.layer}, head {head}"
    return f"error at probe rows, before correction: {mean:.3f} mean, {worst:.3f} worst ({where})"
