"""Tunes StaticCache: which steps of a run are computed, so that the forecasts of the others cost least.

Every prompt is generated with all steps computed, which tells what any forecast would have been off by, and once more
with one early step skipped, which tells how errors grow until the end. Sources: DPCache, LeMiCa (arXiv 2511.00090).
Where we depart from them: errors are those of the chosen predictor, by the two last computed steps, weighted by how far
the solver moves and how they grow; and the solver's own steps are searched beside.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import resolve
from dit_accel_pipelines.generation.solvers import BEST, is_flow, make_scheduler
from torch import Tensor

from dit_accel import ConfigError, StaticCache
from dit_accel.attachment.steps import noise_level
from dit_accel.methods.caches.block_numbers import spell_numbers
from dit_accel.methods.find import find_transformers, resolve_model
from dit_accel.rules import forecast

from ..metrics.pixels import psnr
from ..runs.loaded import TuningRequest
from .base import Tuned, TuningRun, replaced_method, write_config

COLUMNS = 2**20
"""Values of every step that are multiplied at a time, in float64."""


@dataclass(slots=True)
class Trace:
    """What a scheduler saw and made in a run, float32 on the CPU."""

    # noise level before each step, and after the last; None where the scheduler does not say
    sigmas: list[float | None] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)  # before each step, and after the last, each [D]
    # of the model, guided, as the scheduler takes them, one a step, each [D]
    outputs: list[Tensor] = field(default_factory=list)

    def products(self, residual: bool) -> np.ndarray:
        """Return the mean product of any two steps' outputs, [N, N]; ``residual``: minus the latents, where alike."""
        values = torch.stack(self.outputs)
        if residual and self.outputs[0].shape == self.latents[0].shape:
            values -= torch.stack(self.latents[:-1])
        parts = [part.double() @ part.double().mT for part in values.split(COLUMNS, 1)]
        return (torch.stack(parts).sum(0) / values.shape[1]).numpy()

    def moved(self, other: "Trace") -> list[float]:
        """Measure the RMS distance of another run's latents before each step and at the end."""
        return [float((a - b).square().mean().sqrt()) for a, b in zip(self.latents, other.latents, strict=True)]


@contextlib.contextmanager
def traced(scheduler: Any) -> Iterator[Trace]:
    """Give the trace of the one run that a scheduler makes inside the block."""
    step, trace = scheduler.step, Trace()
    signature = inspect.signature(step)

    @functools.wraps(step)
    def noted(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        trace.sigmas.append(noise_level(scheduler))
        trace.outputs.append(_flat(arguments["model_output"]))
        trace.latents[len(trace.sigmas) - 1 :] = [_flat(arguments["sample"])]
        result = step(*args, **kwargs)
        trace.latents.append(_flat(result[0] if isinstance(result, tuple) else result.prev_sample))
        return result

    scheduler.step = noted  # on the object; its class stays as it is
    try:
        yield trace
    finally:
        del scheduler.step
    trace.sigmas.append(noise_level(scheduler))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().flatten().clone()


Predictor = Literal["hold", "taylor", "heun", "chebyshev"]
Listed = tuple[float, tuple[int, ...]]
Lists = dict[int, Listed]
"""Number of computed steps -> the error that their best list is expected to leave, and the list."""

ROUNDS = 3  # how often `searched` weighs the prompts anew
SETTLES = 3  # steps after a skipped one until its error has passed a solver's corrector and history, and only grows


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipCosts:
    """What it costs to skip all steps between two computed ones.

    The cost is the mean square, over prompts, of what the forecasts of the gap add to the latents: the errors of its
    steps, each times its weight, summed before they are squared, since those of one gap point the same way.
    """

    products: np.ndarray  # float64 [P, N, N]: by prompt the mean product of what steps i and j store
    weights: np.ndarray  # float64 [P, N]: how far the solver moves in a step, times how much of its error is left
    times: Sequence[float]  # of each step and of the run's end, N + 1: what the polynomial is one of
    predictor: Predictor
    order: int = 1
    _known: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @property
    def reads(self) -> int:
        """How many computed steps a forecast depends on; none of Heun's is forgotten."""
        steps = len(self.times) - 1
        return {"hold": 1, "taylor": self.order + 1, "heun": steps, "chebyshev": 2 * self.order + 2}[self.predictor]

    def __call__(self, path: Sequence[int], upto: int) -> float:
        """Return the cost of the steps from a list's last one to ``upto``, which is computed next, or the run's end."""
        key = (*path[-self.reads :], upto)
        if key not in self._known:
            self._known[key] = self._squares(path, upto)
        return float(self._known[key].mean())

    def of_list(self, path: Sequence[int]) -> np.ndarray:
        """Return what a whole list costs each prompt, [P]."""
        gaps = zip(range(1, len(path) + 1), [*path[1:], len(self.times) - 1], strict=True)
        return np.sum([self._squares(path[:count], upto) for count, upto in gaps], 0)

    def _squares(self, path: Sequence[int], upto: int) -> np.ndarray:
        rows, skipped = self.forecasts(path[-self.reads :], upto), [*range(path[-1] + 1, upto)]
        rows[np.arange(len(rows)), skipped] -= 1.0
        off = self.weights[:, skipped] @ rows
        return np.maximum(np.einsum("pn,pnm,pm->p", off, self.products, off), 0.0)

    def forecasts(self, path: Sequence[int], upto: int) -> np.ndarray:
        """Return the weights of the computed steps in each forecast from a list's last step to ``upto``, [gap, N]."""
        units = np.eye(len(self.times) - 1)
        before: tuple[float, np.ndarray] | None = None  # the forecast right before the last step, which Heun's reads
        if self.predictor == "heun" and len(path) > 1 and path[-1] - path[-2] > 1:
            before = self.times[path[-1] - 1], self.forecasts(path[:-1], path[-1])[-1]
        steps = [*path[-self.reads :]] if self.predictor != "heun" else [*path[-2:]]
        values, times = [units[step] for step in steps], [self.times[step] for step in steps]
        if before is not None:
            values.insert(1, before[1])
            times.insert(1, before[0])
        rows = np.zeros((upto - path[-1] - 1, len(units)))
        for row, step in enumerate(range(path[-1] + 1, upto)):
            rows[row] = np.array(self._weights(times, path[-1], step, before)) @ np.array(values)
        return rows

    def _weights(
        self, times: Sequence[float], last: int, step: int, before: tuple[float, np.ndarray] | None
    ) -> Sequence[float]:
        at = self.times[step]
        if self.predictor == "taylor":
            return forecast.taylor(times, at, self.order)
        if self.predictor == "chebyshev":
            return forecast.chebyshev(times, at, self.order, (self.times[0], self.times[-1]))
        if self.predictor == "heun":
            skipped = [self.times[index] for index in range(last + 1, step)]
            return forecast.heun(times, skipped, at, None if before is None else before[0])
        return [1.0]


def best_lists(cost: Callable[[Sequence[int], int], float], steps: int, computed: int) -> Lists:
    """Return for each number of computed steps up to ``computed`` the least sum of costs and the list that has it.

    Source: DPCache, whose state is the last computed step; LeMiCa (arXiv 2511.00090) takes the least largest gap. Here
    the state is the last two, exact for forecasts that read two. The first step is always computed.
    """
    best: dict[tuple[int, int], Listed] = {(-1, 0): (0.0, (0,))}
    lists: Lists = {}
    for count in range(1, computed + 1):
        lists[count] = min((so_far + cost(path, steps), path) for so_far, path in best.values())
        longer: dict[tuple[int, int], Listed] = {}
        for so_far, path in best.values():
            for following in range(path[-1] + 1, steps):
                candidate = so_far + cost(path, following), (*path, following)
                longer[path[-1], following] = min(candidate, longer.get((path[-1], following), candidate))
        best = longer
    return lists


def grown(moved: Sequence[float], early: int) -> np.ndarray:
    """Return how much an error that is made in each step has grown by the run's end, [N]."""
    steps = len(moved) - 1
    since = [moved[min(max(step + 1, early + SETTLES), steps)] for step in range(steps)]
    return moved[-1] / np.array(since) if min(since) > 0 else np.ones(steps)


def searched(costs: SkipCosts, computed: int) -> Lists:
    """Return `best_lists` by the mean logarithm of the prompts' costs, as a mean PSNR has it, and their errors.

    A logarithm is no sum over gaps; weighing each prompt by one over what the last list cost it comes down to it.
    """
    steps, scale = len(costs.times) - 1, np.ones(len(costs.products))
    lists: Lists = {}
    for _ in range(ROUNDS):
        even = dataclasses.replace(costs, products=costs.products / scale[:, None, None])
        lists = best_lists(even, steps, computed)
        total = costs.of_list(lists[computed][1])
        scale = total if total.min() > 0 else scale
    roots = {count: np.sqrt(costs.of_list(path)) for count, (_, path) in lists.items()}
    return {
        count: (float(np.exp(np.log(roots[count]).mean())) if roots[count].min() > 0 else 0.0, path)
        for count, (_, path) in lists.items()
    }


FREE = ("predictor", "order", "stored")  # options of `StaticCache` that a request may set: how is forecast, not when
EARLY = 0.1  # share of the run at which a step is skipped to see errors grow
FINER = 4  # how many times as many steps as the longest placement has the runs make to which PSNR is taken


@dataclass(frozen=True, slots=True)
class Placement:
    """So many steps of UniPC with a noise shift, None: the model's own; without ``text`` the model's own solver."""

    steps: int
    shift: float | None = None
    text: str = ""

    @classmethod
    def read(cls, text: str) -> "Placement":
        """Read ``30`` or ``30@8``."""
        steps, _, shift = text.partition("@")
        try:
            read = cls(int(steps), float(shift) if shift else None, text)
        except ValueError:
            read = cls(0)
        if read.steps < 1 or not 0 < (read.shift or 1.0) < math.inf:
            raise ConfigError(f"a placement is a number of steps, and a noise shift behind @ as in 30@8, got {text!r}")
        return read


def tune_schedule(
    request: TuningRequest, output: Path, *, computed: int = 12, placement: Sequence[str] = (),
    stages: Stages | None = None,
) -> Tuned:  # fmt: skip
    """Search the best list of so many computed steps, for ``--config``.

    Found are the ``placements``, the best first, each with its ``lists`` by numbers of computed steps, the RMS
    ``error`` of the last latents that they are expected to leave and, where several are tried, its ``psnr``.
    """
    config, rest = _config(request)
    tried = [Placement.read(text) for text in placement] or [Placement(resolve(request)[0].num_inference_steps or 0)]
    for steps in (option.steps for option in tried):
        if not 2 <= computed <= steps:
            raise ConfigError(f"tune schedule computes from 2 to all of {steps} steps, got computed = {computed}")
    half = len(request.prompts) if len(tried) == 1 else len(request.prompts) // 2
    if not half:
        raise ConfigError("tune schedule takes 2 prompts or more to choose among placements, got 1; add some")
    settings = {"placement": [option.text for option in tried], "computed": computed, "cache": config.to_dict()}
    runs = TuningRun(dataclasses.replace(request, methods=rest), output, ".toml", stages, **settings)
    with runs.attached(config):  # refuses methods that don't go together
        tuner = _Tuner(runs, config)
    parts = [runs.search(
        [(option.text or option.steps, prompt) for prompt in request.prompts[:half]],
        lambda point, option=option: tuner.calibrated(option, point[1]), lambda point: f"{point[0]} steps, {point[1]}",
    ) for option in tried]  # fmt: skip
    lists = [_searched(of, config, computed) for of in parts]
    paths = [of[computed][1] for of in lists]
    choosing = [("choosing", prompt) for prompt in request.prompts[half:]]
    judged = runs.search(choosing, lambda point: tuner.judged(point[1], tried, paths), " by ".join)
    quality = np.mean(judged, 0).tolist() if judged else [None]
    order = sorted(range(len(tried)), key=lambda place: -(quality[place] or 0))
    best, path = tried[order[0]], paths[order[0]]
    about = f"{tuner.model}: {computed} of {best.steps} steps, {half} prompts."
    run = {"num_inference_steps": best.steps, "solver": BEST if best.text else None, "flow_shift": best.shift}
    shares = tuple(round(step / (best.steps - 1), 6) for step in path)
    set_by_run = {key: value for key, value in run.items() if value is not None}
    config = dataclasses.replace(config, compute_at=shares)
    write_config(output, config, [f"Searched by dit-accel tune schedule on {about}"], set_by_run)
    runs.finish()
    placements = [
        {"steps": tried[at].steps, "flow_shift": tried[at].shift, "psnr": quality[at],
         "lists": {count: list(path) for count, (_, path) in lists[at].items()},
         "error": {count: error for count, (error, _) in lists[at].items()}}
        for at in order
    ]  # fmt: skip
    rows = [  # all lists where one placement was tried
        (row["steps"], row["flow_shift"] or "own", count, row["error"][count], row["psnr"] or "", spell_numbers(path))
        for row in placements
        for count, path in row["lists"].items()
        if count == computed or len(placements) == 1 < count
    ]
    return Tuned(
        found={"model": tuner.model, "computed": computed, "placements": placements},
        columns=("of", "noise shift", "computed", "error", "PSNR", "steps"),
        rows=[tuple(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows],
        remarks=["error: RMS that the forecasts are expected to leave in the latents at the end"],
    )


def _config(request: TuningRequest) -> tuple[StaticCache, tuple[Any, ...]]:
    """Return the request's cache, and its other methods; a cache that says when is computed is refused."""
    config, rest = replaced_method(request, StaticCache, StaticCache(predictor="taylor"))
    for name, value in config.to_dict().items():
        if name not in FREE and value != getattr(StaticCache(), name):
            raise ConfigError(f"tune schedule finds what is computed, got staticcache.{name} = {value!r}; leave it out")
    if config.predictor == "corrected":
        raise ConfigError("tune schedule knows no error of staticcache.predictor = 'corrected'; use 'taylor'")
    return config, rest


def _listed(config: StaticCache, steps: int, path: Sequence[int]) -> StaticCache:
    return dataclasses.replace(config, steps=tuple(int(step in path) for step in range(steps)))


def _searched(parts: Sequence[dict[str, Any]], config: StaticCache, computed: int) -> Lists:
    """Return the best lists of up to so many computed steps by what was measured on prompts."""
    products, sigmas = np.array([part["products"] for part in parts]), parts[0]["sigmas"]
    weights = np.array([np.abs(np.diff(part["sigmas"])) * grown(part["moved"], part["early"]) for part in parts])
    times = [*map(float, range(len(sigmas) - 1)), len(sigmas) - 2.0]
    assert config.predictor != "corrected"  # refused before
    costs = SkipCosts(products=products, weights=weights, times=times, predictor=config.predictor, order=config.order)
    return searched(costs, computed)


class _Tuner:
    """The generations of a search."""

    def __init__(self, runs: TuningRun, config: StaticCache) -> None:
        self._runs, self._config = runs, config
        self._shipped = runs.pipe.scheduler
        transformers = find_transformers(runs.pipe)
        self.model = resolve_model(next(iter(transformers)), transformers).name
        if len(transformers) > 1 or not is_flow(self._shipped.config):
            raise ConfigError(
                f"tune schedule takes a flow-matching model of one transformer, {self.model} has "
                f"{' and '.join(transformers)} and {type(self._shipped).__name__}; set staticcache.compute_at by hand"
            )

    def calibrated(self, placement: Placement, prompt: str) -> dict[str, Any]:
        """Return the products of what a prompt's run stores, its noise levels, and how far an early error moves it."""
        steps, early = placement.steps, max(1, round(EARLY * placement.steps))
        dense = self._run(placement, prompt)[1]
        if len(dense.outputs) != steps or None in dense.sigmas:
            raise ConfigError(
                f"tune schedule needs a scheduler that makes one call a step and tells its noise levels, got "
                f"{len(dense.outputs)} calls in {steps} steps of {type(self._shipped).__name__}; give --placement"
            )
        skipping = _listed(self._config, steps, [step for step in range(steps) if step != early])
        other = self._run(placement, prompt, skipping)[1]
        products = dense.products(self._config.stored == "residual").tolist()
        return {"products": products, "sigmas": dense.sigmas, "moved": dense.moved(other), "early": early}

    def judged(self, prompt: str, tried: Sequence[Placement], paths: Sequence[Sequence[int]]) -> list[float]:
        """Return the PSNR of each placement's list on a prompt, to a run of many more steps."""
        converged = self._run(Placement(FINER * max(option.steps for option in tried), text="finer"), prompt)[0]
        return [
            psnr(self._run(placement, prompt, _listed(self._config, placement.steps, path))[0], converged)
            for placement, path in zip(tried, paths, strict=True)
        ]

    def _run(self, placement: Placement, prompt: str, *caches: StaticCache) -> tuple[np.ndarray, Trace]:
        """Return a run's frames, in [0, 1], and what its solver saw."""
        scheduler = self._shipped if not placement.text else make_scheduler(self._shipped, BEST, placement.shift)
        self._runs.pipe.scheduler = scheduler
        with self._runs.attached(*caches), traced(scheduler) as trace:
            result = self._runs.run(prompt, num_inference_steps=placement.steps)
        return result.frames.astype(np.float32) / 255, trace
