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
from .correction import Correction


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """What one step gave.

    Attributes:
        step: the step's index.
        time: that, or its noise level.
        values: a tensor for each of the output's: what is stored of it; anything else is stored as it is.
        computed: by a forward; else it is a forecast.
    """

    step: int
    time: float
    values: list[Any]
    computed: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a branch gives in one step, for the branch that runs beside it.

    Attributes:
        values: what is stored of each of the output's tensors, or would be; anything else as it is.
        spec: the output's form.
        mends: what a correction added to each tensor, in float32 or wider; None: nothing.
    """

    values: list[Any]
    spec: TreeSpec
    mends: list[Any] | None = None

    def of_rows(self, rows: Sequence[int]) -> "Given":
        """Return what some rows give."""
        (values, spec), mends = _of_rows(self.values, self.spec, rows), self.mends
        return Given(values, spec, None if mends is None else _of_rows(mends, self.spec, rows)[0])

    def mended(self, output: Any) -> Any:
        """Return an output of the branch beside it, with what the correction added here."""
        leaves, spec = tree_flatten(output)
        if self.mends is None or len(leaves) != len(self.mends):
            return output
        return tree_unflatten([_added(leaf, mend) for leaf, mend in zip(leaves, self.mends, strict=True)], spec)


class History:
    """What the forwards of one branch gave, as far as forecasts read it.

    That of a branch beside another holds how far its outputs are from those of the same steps there, so that both are
    forecast alike, however long ago it began.

    Args:
        settings: how is forecast.
        shapes: of the latents that went in.
        start: the time at which the run began.
        held_on: where what is stored waits; None: where it was made.
        reach: steps past the last computed one that the predictor is used for; None: all.
        beside: it is of a branch beside another.

    Attributes:
        correction: what corrects computed outputs for the skipped ones before, or None.
    """

    def __init__(
        self, settings: StepCacheConfig, shapes: Any, start: float, held_on: torch.device | None = None,
        reach: int | None = None, beside: bool = False,
    ) -> None:  # fmt: skip
        self.beside = beside
        self._settings = settings
        self._reach = reach
        self._start = start
        self._held_on = held_on
        self.correction = Correction(settings.name) if settings.corrected and not beside else None
        self.shapes = shapes
        self.points: list[Point] = []
        self.skipped: list[float] = []
        self._given: Point | None = None  # what the last step gave, where it is a forecast that Heun's reads
        self._spec: TreeSpec | None = None
        self._mends: tuple[int, list[Any]] | None = None

    def gives_other(self, output: Any) -> bool:
        """Tell whether an output has other shapes than what is stored, as a first one that holds the text too."""
        return bool(self.points) and shapes_of(output) != shapes_of(self.last())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held."""
        points = [*self.points, *([self._given] if self._given else [])]
        return sum(value.nbytes for point in points for value in point.values if isinstance(value, Tensor))

    def last(self) -> Any:
        """Return what is stored of the last point, in the form of an output."""
        assert self._spec is not None
        return tree_unflatten(self.points[-1].values, self._spec)

    def mend(self, output: Any, given: Any, step: int) -> None:
        """Note what was given in place of a computed output, for branches beside this one."""
        pairs = zip(tree_leaves(given), tree_leaves(output), strict=True)
        self._mends = step, [one.to(_wide(one)) - of if isinstance(one, Tensor) else None for one, of in pairs]

    def given(self, step: int, time: float, end: float) -> Given | None:
        """Return what the branch gives in a step that it has made already; None before the first."""
        if not self.points or self._spec is None:
            return None
        made = self.points[-1].step == step
        mends = self._mends[1] if self._mends is not None and self._mends[0] == step else None
        return Given(self.points[-1].values if made else self._values(time, end), self._spec, mends)

    def take(self, output: Any, latents: Any, step: int, time: float, given: Given | None = None) -> None:
        """Store what a forward made of its latents; what the same step gave before goes: a scheduler may call twice.

        ``given`` is what the branch gives that it runs beside.
        """
        leaves, self._spec = tree_flatten(output)
        values = [
            _minus(leaf, near).to(self._held_on or leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf, near in zip(leaves, self._bases(leaves, latents), strict=True)
        ]
        if given is not None:
            values = [_minus(one, of) for one, of in zip(values, given.values, strict=True)]
        points = [point for point in self.points if point.computed and point.step != step and point.time != time]
        points = points[-(self._settings.kept_points - 1) :] if self._settings.kept_points > 1 else []
        if self._given is not None and points:
            points.append(self._given)
        self.points = [*points, Point(step, time, values)]
        self.skipped, self._given = [], None

    def forecast(self, latents: Any, step: int, time: float, end: float, given: Given | None = None) -> Any:
        """Return an output in the form of the last one, forecast for a step of a run that ends at a time.

        ``given`` is what the branch gives that it runs beside, which it gives as well before it made a step itself.
        """
        if given is not None and not self.points:
            return tree_unflatten(self._outputs(given.values, latents), given.spec)
        values = self._values(time, end)
        if self._settings.predictor == "heun":
            self._given = None if self._is_out_of_reach(time) else Point(step, time, values, computed=False)
        if not self.skipped or self.skipped[-1] != time:
            self.skipped.append(time)
        if given is not None:
            values = [_added(of, one) for one, of in zip(values, given.values, strict=True)]
        assert self._spec is not None
        return tree_unflatten(self._outputs(values, latents), self._spec)

    def missed(self, output: Any, latents: Any, time: float, end: float) -> list[Tensor | None]:
        """Return for each tensor of an output what its forecast from its latents would be off by; take it afterwards.

        In float32 or wider; None for what is no tensor of floating-point numbers.
        """
        forecasts = self._outputs(self._values(time, end), latents)
        return [
            leaf.detach().to(_wide(leaf)) - made if isinstance(leaf, Tensor) and leaf.is_floating_point() else None
            for leaf, made in zip(tree_leaves(output), forecasts, strict=True)
        ]

    def sample_missed(self, output: Any, latents: Any, time: float, end: float) -> Tensor:
        """Return what a forecast of the prediction would be off by, as one tensor of its own."""
        assert self._spec is not None
        return target_sample(tree_unflatten(self.missed(output, latents, time, end), self._spec))

    def growth(self, time: float) -> float:
        """Return what a forecast for a time is off by, up to a factor, by the computed steps that it goes through."""
        computed = [point.time for point in self.points if point.computed]
        return forecast.growth(computed[-self._settings.passed_points :], time)

    def _values(self, time: float, end: float) -> list[Any]:
        """Return what would be stored of the output of a time."""
        weights, count = self._weights(time, end), len(self.points)
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
        return [
            _plus(value, near) if isinstance(value, Tensor) else value
            for value, near in zip(values, self._bases(values, latents), strict=True)
        ]

    def _weights(self, time: float, end: float) -> list[float]:
        settings, times = self._settings, [point.time for point in self.points]
        if settings.predictor == "hold" or self._is_out_of_reach(time):
            return [0.0] * (len(times) - 1) + [1.0]
        if settings.predictor == "taylor":
            return forecast.taylor(times, time, settings.order, settings.damping or 0.0)
        if settings.predictor == "chebyshev":
            return forecast.chebyshev(times, time, settings.order, (self._start, end))
        before = next((point.time for point in self.points if not point.computed), None)
        return forecast.heun(times, [moment for moment in self.skipped if moment != time], time, before)

    def _is_out_of_reach(self, time: float) -> bool:
        """Tell whether a time lies more skipped steps past the last computed one than the predictor reaches."""
        return self._reach is not None and sum(moment != time for moment in self.skipped) >= self._reach

    def _bases(self, leaves: list[Any], latents: Any) -> list[Tensor | None]:
        """Return for each output the part of the latents that is taken off it, None where it is stored whole."""
        given = tree_leaves(latents) if self._settings.stored == "residual" else []
        return [_covering(leaf, given[i]) if i < len(given) else None for i, leaf in enumerate(leaves)]


def given_beside(
    histories: Mapping[tuple[Any, ...], History], context: ForwardContext, shapes: Any, time: float, end: float,
    *part: Any,
) -> Given | None:  # fmt: skip
    """Return what the branch that a forward runs beside gives in its step; None: there is none, or it is not known.

    Args:
        histories: by transformer, branch and part.
        context: of the forward.
        shapes: of its latents.
        time: of the step.
        end: of the run.
        part: of the forward, where it has a history of its own.
    """
    history = histories.get((context.transformer, context.beside, *part))
    if history is None or (context.rows is None and history.shapes != shapes):
        return None
    given = history.given(context.step_index, time, end)
    return given if given is None or context.rows is None else given.of_rows(context.rows)


def shapes_of(tensors: Any) -> Any:
    """Return what must stay the same for a forecast: shapes, types and devices of tensors in whatever form."""
    return [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None for x in tree_leaves(tensors)]


def own_copies(kept: Any, given: Any) -> Any:
    """Return what is kept from step to step, with a copy of each tensor that shares memory with one that was given.

    Schedulers and hand-written loops may write into the tensors of a step once it is over.

    Args:
        kept: in whatever form.
        given: the tensors of somebody else, in whatever form.
    """
    memory = {_memory_of(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
    copies: dict[int, Tensor] = {}  # a tensor that is kept twice is copied once

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if None not in memory and (place := _memory_of(leaf)) is not None and place not in memory:
            return leaf
        return copies.setdefault(id(leaf), leaf.detach().clone())

    return tree_map(own, kept)


def _memory_of(tensor: Tensor) -> int | None:
    """Return where a tensor's memory lies; None for a wrapper that tells nothing of it, as collectives give."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return None


def _covering(output: Any, latents: Any) -> Tensor | None:
    """Return the first part of the latents, of an output's shape: what is denoised stands before its conditions."""
    if not (isinstance(output, Tensor) and isinstance(latents, Tensor)) or output.ndim != latents.ndim:
        return None
    if any(have < need for have, need in zip(latents.shape, output.shape, strict=True)):
        return None
    return latents[tuple(slice(size) for size in output.shape)]


def _of_rows(leaves: list[Any], spec: TreeSpec, rows: Sequence[int]) -> tuple[list[Any], TreeSpec]:
    """Return some rows of an output, of which each may be a tensor of its own, and their form."""
    output = tree_unflatten(leaves, spec)
    sample: Any = sample_of(output)
    if isinstance(sample, list):
        return tree_flatten(with_sample(output, [sample[row] for row in rows]))
    return [leaf[list(rows)] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


def _added(leaf: Any, more: Any) -> Any:
    """Return the sum of two tensors in the first's type; anything else stays."""
    return _plus(leaf, more) if isinstance(leaf, Tensor) and isinstance(more, Tensor) else leaf


def _minus(output: Any, base: Any) -> Any:
    """Return what is stored of an output, a tensor of its own."""
    if not isinstance(output, Tensor):
        return output
    if base is None or not output.is_floating_point():
        return output.detach().clone()
    return (output.detach().to(_wide(output)) - base.detach().to(_wide(output))).to(output.dtype)


def _plus(value: Tensor, base: Tensor | None) -> Tensor:
    """Return the output of what was stored, a tensor of its own."""
    if base is None or not value.is_floating_point():
        return value.clone()
    return (value.to(_wide(value)) + base.to(_wide(value))).to(value.dtype)


def _weighted(values: list[Tensor], weights: list[float]) -> Tensor:
    """Return the weighted sum of tensors."""
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
