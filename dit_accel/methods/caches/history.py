"""What the forwards of one branch gave, and the forecast of the next, weighted as `dit_accel.rules.forecast` says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from ...rules import forecast
from ..site import ForwardContext, sample_of, target_sample, with_sample
from .cache_config import StepCacheConfig
from .correction import DAMPING, ForecastCorrection


@dataclass(frozen=True, slots=True, eq=False)
class StoredStep:
    """What one step gave."""

    step: int  # the step's index
    values: list[Any]  # a tensor for each of the output's: what is stored of it; anything else is stored as it is
    computed: bool = True  # by a forward; else it is a forecast


@dataclass(frozen=True, slots=True, eq=False)
class BranchOutput:
    """What a branch gives in one step, for the branch that runs beside it."""

    values: list[Any]  # what is stored of each of the output's tensors, or would be; anything else as it is
    spec: TreeSpec  # the output's form
    mends: list[Any] | None = None  # what a correction added to each tensor, in float32 or wider; None: nothing

    def of_rows(self, rows: Sequence[int]) -> "BranchOutput":
        """Return the output of some rows."""
        (values, spec), mends = _of_rows(self.values, self.spec, rows), self.mends
        return BranchOutput(values, spec, None if mends is None else _of_rows(mends, self.spec, rows)[0])

    def mended(self, output: Any) -> Any:
        """Return an output of the branch beside it, with what the correction added here."""
        leaves, spec = tree_flatten(output)
        if self.mends is None or len(leaves) != len(self.mends):
            return output
        return tree_unflatten([_plus(leaf, mend) for leaf, mend in zip(leaves, self.mends, strict=True)], spec)


class History:
    """What the forwards of one branch gave, as far as forecasts read it.

    That of a branch beside another holds how far its outputs are from those of the same steps there, so that both are
    forecast alike, however long ago it began.

    Args:
        reach: steps past the last computed one that the predictor is used for; None: all.
        beside: it is of a branch beside another.
        held_on: where what is stored waits; None: where it was made.
    """

    def __init__(
        self, settings: StepCacheConfig, shapes: Any, start: int, reach: int | None, beside: bool,
        held_on: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.beside = beside
        self._settings = settings
        self._reach = reach
        self._start = start
        self._held_on = held_on
        # what corrects computed outputs for the skipped ones before, or None
        self.correction = ForecastCorrection(settings) if settings.predictor == "corrected" and not beside else None
        self.shapes = shapes
        self.points: list[StoredStep] = []
        self.skipped: list[int] = []  # the steps that were forecast since the last computed one
        self._forecast: StoredStep | None = None  # of the last step, where Heun's predictor reads it
        self._spec: TreeSpec | None = None
        self._mends: tuple[int, list[Any]] | None = None

    def gives_other(self, output: Any) -> bool:
        """Tell whether an output has other shapes than the stored one, as a first one that holds text too."""
        return bool(self.points) and tensor_shapes(output) != tensor_shapes(self.last())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held."""
        points = [*self.points, *([self._forecast] if self._forecast else [])]
        return sum(value.nbytes for point in points for value in point.values if isinstance(value, Tensor))

    def last(self) -> Any:
        """Return the last stored values, in the form of an output."""
        assert self._spec is not None
        return tree_unflatten(self.points[-1].values, self._spec)

    def mend(self, output: Any, corrected: Any, step: int) -> None:
        """Note what took the place of a computed output, for branches beside this one."""
        pairs = zip(tree_leaves(corrected), tree_leaves(output), strict=True)
        self._mends = step, [new.to(_wide(new)) - old if isinstance(new, Tensor) else None for new, old in pairs]

    def output_of(self, step: int, end: int) -> BranchOutput:
        """Return the branch's output, computed or forecast, in a step that it has made."""
        assert self._spec is not None
        computed = self.points[-1].step == step
        mends = self._mends[1] if self._mends is not None and self._mends[0] == step else None
        return BranchOutput(self.points[-1].values if computed else self._values(step, end), self._spec, mends)

    @torch.no_grad()
    def take(self, output: Any, latents: Any, step: int, beside: BranchOutput | None = None) -> None:
        """Store what a forward made of its latents; what the same step gave before goes: a scheduler may call twice.

        ``beside`` is what the branch gives that it runs beside.
        """
        leaves, self._spec = tree_flatten(output)
        values = [
            _minus(leaf, base).to(device=self._held_on) if isinstance(leaf, Tensor) else leaf
            for leaf, base in zip(leaves, self._bases(leaves, latents), strict=True)
        ]
        if beside is not None:
            values = [_minus(value, other) for value, other in zip(values, beside.values, strict=True)]
        points = [point for point in self.points if point.computed and point.step != step]
        points = points[-(self._settings.kept_points - 1) :] if self._settings.kept_points > 1 else []
        if self._forecast is not None:
            points.append(self._forecast)
        self.points = [*points, StoredStep(step, values)]
        self.skipped, self._forecast = [], None

    def forecast(self, latents: Any, step: int, end: int, beside: BranchOutput | None = None) -> Any:
        """Return an output in the form of the last one, forecast for a step of a run that ends with step ``end``.

        ``beside`` is what the branch gives that it runs beside; it stands for the output before the first one is
        computed.
        """
        if beside is not None and not self.points:
            return tree_unflatten(self._outputs(beside.values, latents), beside.spec)
        values = self._values(step, end)
        if self._settings.predictor == "heun":
            self._forecast = None if self._is_out_of_reach(step) else StoredStep(step, values, computed=False)
        if not self.skipped or self.skipped[-1] != step:
            self.skipped.append(step)
        if beside is not None:
            values = [_plus(other, value) for value, other in zip(values, beside.values, strict=True)]
        assert self._spec is not None
        return tree_unflatten(self._outputs(values, latents), self._spec)

    def missed(self, output: Any, latents: Any, step: int, end: int) -> list[Tensor | None]:
        """Return for each tensor of an output what its forecast from its latents would be off by; take it afterwards.

        In float32 or wider; None for what is no tensor of floating-point numbers.
        """
        forecasts = self._outputs(self._values(step, end), latents)
        return [
            leaf.to(_wide(leaf)) - forecast if isinstance(leaf, Tensor) and leaf.is_floating_point() else None
            for leaf, forecast in zip(tree_leaves(output), forecasts, strict=True)
        ]

    def sample_missed(self, output: Any, latents: Any, step: int, end: int) -> Tensor:
        """Return the error of a forecast of the prediction, as one tensor."""
        assert self._spec is not None
        return target_sample(tree_unflatten(self.missed(output, latents, step, end), self._spec))

    def growth(self, step: int) -> float:
        """Return the size of a forecast's error in a step, up to a factor, from its distance to the computed steps."""
        computed = [point.step for point in self.points if point.computed]
        return forecast.growth(computed[-self._settings.passed_points :], step)

    def _values(self, step: int, end: int) -> list[Any]:
        """Return the forecast of the values that a step would store."""
        weights, count = self._weights(step, end), len(self.points)
        return [
            _weighted([self.points[i].values[leaf] for i in range(count)], weights)
            if isinstance(value, Tensor)
            else value
            for leaf, value in enumerate(self.points[-1].values)
        ]

    def _outputs(self, values: list[Any], latents: Any) -> list[Any]:
        """Return the leaves of an output of latents, of which some values would be stored."""
        if self._held_on is not None:
            device = next(leaf.device for leaf in tree_leaves(latents) if isinstance(leaf, Tensor))
            values = [value.to(device) if isinstance(value, Tensor) else value for value in values]
        return [_plus(value, base) for value, base in zip(values, self._bases(values, latents), strict=True)]

    def _weights(self, step: int, end: int) -> list[float]:
        settings, steps = self._settings, [point.step for point in self.points]
        if settings.predictor == "hold" or self._is_out_of_reach(step):
            return [0.0] * (len(steps) - 1) + [1.0]
        if settings.predictor == "chebyshev":
            return forecast.chebyshev(steps, step, settings.order, (self._start, end))
        if settings.predictor == "heun":
            before = next((point.step for point in self.points if not point.computed), None)
            return forecast.heun(steps, [skipped for skipped in self.skipped if skipped != step], step, before)
        return forecast.taylor(steps, step, settings.order, DAMPING if settings.predictor == "corrected" else 0.0)

    def _is_out_of_reach(self, step: int) -> bool:
        """Tell whether a step lies farther past the last computed one than the predictor is used for."""
        return self._reach is not None and sum(skipped != step for skipped in self.skipped) >= self._reach

    def _bases(self, leaves: list[Any], latents: Any) -> list[Tensor | None]:
        """Return for each output the part of the latents that is taken off it, None where it is stored whole."""
        if isinstance(latents, list):  # of a row's images the last is made
            latents = [row[-1] if isinstance(row, list) else row for row in latents]
        bases = tree_leaves(latents) if self._settings.stored == "residual" else []
        return [_covering(leaf, bases[i]) if i < len(bases) else None for i, leaf in enumerate(leaves)]


def given_beside(
    histories: Mapping[tuple[Any, ...], History], context: ForwardContext, shapes: Any, end: int, *part: Any
) -> BranchOutput | None:
    """Return the output, in this step, of the branch that a forward runs beside; None: there is none, or not known.

    ``histories``: by transformer, branch and part.
    """
    history = histories.get((context.transformer, context.beside, *part))
    if history is None or not history.points or (context.rows is None and history.shapes != shapes):
        return None
    output = history.output_of(context.step_index, end)
    return output if context.rows is None else output.of_rows(context.rows)


def tensor_shapes(tensors: Any) -> Any:
    """Return shapes, types and devices of tensors in whatever form, which must not change for a forecast."""
    return [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None for x in tree_leaves(tensors)]


@torch.no_grad()
def own_copies(value: Any, lent: Any) -> Any:
    """Return a value that is kept from step to step, with copies of its tensors that share memory with lent ones.

    Schedulers and hand-written loops may write into the tensors of a step once it is over.
    """
    memory = {_memory_of(leaf) for leaf in tree_leaves(lent) if isinstance(leaf, Tensor)}
    copies: dict[int, Tensor] = {}  # a tensor that is kept twice is copied once

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if None not in memory and (place := _memory_of(leaf)) is not None and place not in memory:
            return leaf
        return copies.setdefault(id(leaf), leaf.clone())

    return tree_map(copied, value)


def _memory_of(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory; None for a wrapper that tells none, as collectives give."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return None


def _covering(output: Any, latents: Any) -> Tensor | None:
    """Return the part of the latents that the output predicts, or None; conditions stand behind it on each axis."""
    if not (isinstance(output, Tensor) and isinstance(latents, Tensor)) or output.ndim != latents.ndim:
        return None
    if any(have < need for have, need in zip(latents.shape, output.shape, strict=True)):
        return None
    return latents[tuple(slice(size) for size in output.shape)]


def _of_rows(leaves: list[Any], spec: TreeSpec, rows: Sequence[int]) -> tuple[list[Any], TreeSpec]:
    """Return some rows of an output, which may be a list of a tensor a row, and the form of the result."""
    output = tree_unflatten(leaves, spec)
    sample: Any = sample_of(output)
    if isinstance(sample, list):
        return tree_flatten(with_sample(output, [sample[row] for row in rows]))
    return [leaf[list(rows)] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


def _minus(output: Any, base: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    if base is None or not output.is_floating_point():
        return output.clone()
    return (output.to(_wide(output)) - base.to(_wide(output))).to(output.dtype)


def _plus(value: Any, base: Any) -> Any:
    """Return the output that a stored value stands for, as a new tensor; what is no tensor is returned unchanged."""
    if not isinstance(value, Tensor):
        return value
    if base is None or not value.is_floating_point():
        return value.clone()
    return (value.to(_wide(value)) + base.to(_wide(value))).to(value.dtype)


def _weighted(values: list[Tensor], weights: list[float]) -> Tensor:
    last = values[-1]
    if len(values) == 1 or not last.is_floating_point():
        return last
    total = torch.zeros_like(last, dtype=_wide(last))
    for value, weight in zip(values, weights, strict=True):
        if weight:
            total.add_(value.to(total.dtype), alpha=weight)
    return total.to(last.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the type in which is summed: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
