"""Times forwards of real shapes with random weights: dense by every backend, and methods; a step and its layers."""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from dit_accel_pipelines.generation.quiet import quiet_diffusers

import dit_accel
from dit_accel import ConfigError
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.errors import DitAccelError
from dit_accel.estimate.prediction import Prediction, estimate
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.presets import PRESETS

from ..runs.counting import Counter, Counts, attended_share, work
from ..runs.results import Line
from .loop import Beside, OutOfMemoryError, device_time, in_turn, quartiles, reason_of, timed_on
from .memory import free_memory, memory_of_logits, memory_of_model
from .options import BenchOptions, Shape
from .real_shapes import Inputs, find_family, make_model, to_device

WARM = 2  # steps at most with which every arm is run before it counts: compilation, allocation, lists of tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """What is made of a shape: the family with the layers and heads that are made, and its dense run's plan."""

    shape: Shape
    adapter: Adapter
    family: Family
    all_heads: int
    dense: Prediction

    @classmethod
    def of(cls, shape: Shape, options: BenchOptions) -> "BenchPlan":
        """Return the plan of a shape; `ConfigError` for sizes, layers or heads that the model can't have."""
        adapter, family = find_family(shape.family)
        most = {"layers": family.layers, "heads": family.heads}
        requested = {"layers": options.layers, "heads": options.heads or family.heads}
        for name, number in requested.items():
            if number > most[name]:
                has = f"{family.name} has {most[name]} {name}"
                raise ConfigError(f"{has}, got --{name} {number}; ask for 1 to {most[name]}")
        part = dataclasses.replace(family, **requested, ffn_dim=family.ffn_dim * requested["heads"] // family.heads)
        sizes: dict[str, Any] = shape.sizes
        dense = estimate(adapter, part, num_inference_steps=options.num_inference_steps, **sizes)
        return cls(shape=shape, adapter=adapter, family=part, all_heads=family.heads, dense=dense)

    @property
    def sizes(self) -> dict[str, Any]:
        """Height, width and frames, by the names that estimates give them."""
        return {name: getattr(self.dense, name) for name in ("height", "width", "num_frames")}

    def speedup(self, methods: Sequence[MethodConfig]) -> float:
        """Return how many times faster `dit-accel plan` says that such a run is with methods."""
        steps = self.dense.num_inference_steps
        return estimate(self.adapter, self.family, num_inference_steps=steps, methods=methods, **self.sizes).speedup


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A model that is timed."""

    plan: BenchPlan
    transformer: Any
    inputs: Inputs
    device: torch.device
    counter: Counter
    free: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the model."""
        return self.transformer.dtype

    def __call__(self, arm: "BenchArm", steps: int) -> "ArmRun":
        """Run an arm, after which the model is as before."""
        from diffusers.models.attention_dispatch import attention_backend

        self.counter.take()
        nothing, methods = contextlib.nullcontext(), arm.methods
        backend = attention_backend(arm.backend) if arm.backend else nothing  # set_attention_backend would last
        attached = dit_accel.attach(self.transformer, *methods, preset="none") if methods else nothing
        with _silent(), backend, attached as attachment:
            seconds = list(_denoise(self, steps))
            report = attachment.report() if attachment is not None else None
        share = attended_share(report, self.plan.adapter, self.plan.family, self.plan.sizes, methods)[0]
        return ArmRun(steps=seconds, **self.counter.seconds, counts=self.counter.take(), attended=share)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchArm:
    """One arm: methods, or dense attention by one of diffusers' backends."""

    name: str
    methods: tuple[MethodConfig, ...] = ()
    backend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """What one run of an arm took."""

    steps: list[float]
    blocks: list[float]
    attention: list[float]
    counts: Counts
    attended: float = 1.0


def run_shapes(
    shapes: Sequence[Shape], arms: Sequence[BenchArm], *, options: BenchOptions, device: torch.device,
    dtype: torch.dtype, say: Callable[[str], None] = lambda text: None,
) -> Iterator[Line]:  # fmt: skip
    """Give the lines of one shape after another, those of least work first; the longest may find no time."""
    plans = sorted((BenchPlan.of(shape, options) for shape in shapes), key=lambda plan: plan.dense.total_flops)
    deadline, rate = time.perf_counter() + options.budget, math.inf
    for number, plan in enumerate(plans, 1):
        started, expected = time.perf_counter(), plan.dense.total_flops / rate
        later = sum(other.dense.total_flops for other in plans[number:]) / rate
        if started + expected > deadline:
            say(f"{plan.shape.name} is left out: it would take about {expected:,.0f} s; raise --budget")
            continue
        say(f"{plan.shape.name}, {plan.dense.layout.tokens:,} tokens")
        with Beside(plan, bench_of, (plan.shape, options), device, dtype, free_memory(device)) as bench:
            lines = run_bench(bench, arms, rounds=options.rounds, deadline=deadline - later, say=say)
        rounds = next(line["rounds"] for line in lines if "rounds" in line)
        rate = plan.dense.total_flops / (time.perf_counter() - started) * (1 + rounds) / 2
        yield from lines


def bench_of(shape: Shape, options: BenchOptions, device: torch.device, dtype: torch.dtype) -> Bench:
    """Make a shape's model and its inputs, in the process that runs it."""
    plan = BenchPlan.of(shape, options)
    transformer, inputs = make_model(plan.adapter, plan.family, plan.dense)
    with _silent():
        transformer = transformer.to(device, dtype).requires_grad_(False)
    counter = Counter([transformer], plan.adapter, partial(device_time, device))
    inputs = to_device(inputs, device, dtype)
    return Bench(plan=plan, transformer=transformer, inputs=inputs, device=device, counter=counter)


def bench_arms(methods: Sequence[MethodConfig]) -> list[BenchArm]:
    """Return the arms: dense by diffusers' attention backends, the methods by themselves and together."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName if backend.value != "_native_math"]  # never the fastest
    arms = [BenchArm(name=f"dense, {backend}", backend=backend) for backend in known]
    arms += [BenchArm(name=method.name, methods=(method,)) for method in methods]
    if len(methods) > 1:
        arms.append(BenchArm(name=" + ".join(method.name for method in methods), methods=tuple(methods)))
    return arms


def preset_arms() -> list[BenchArm]:
    """Return the arms of real sizes: dense, and the sparse part of each preset, acting in every step and layer."""
    sparse = [(level, choice.config) for level, preset in PRESETS.items() for choice in preset
              if isinstance(choice.config, SparseConfig)]  # fmt: skip
    named = [BenchArm(name=f"{config.name} of {level}", methods=(sparse_part(config),)) for level, config in sparse]
    return [BenchArm(name="dense"), *named]


def sparse_part(method: MethodConfig) -> MethodConfig:
    """Return a sparse method acting in every step and layer, at any size; another as it is."""
    always: Any = dict(dense_steps=0, dense_last_steps=0, dense_layers=0, dense_above_sigma=None, min_tokens=None)
    return dataclasses.replace(method, **always) if isinstance(method, SparseConfig) else method


def run_bench(
    bench: Bench | Beside, arms: Sequence[BenchArm], *, rounds: int, deadline: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
) -> list[Line]:  # fmt: skip
    """Run all arms in turn, round by round, and return a line for each, those that can't run here with their reason."""
    steps = bench.plan.dense.num_inference_steps
    model = memory_of_model(bench.plan, bench.dtype)
    memory = {arm.name: model + memory_of_logits(bench.plan, arm.backend) for arm in arms}
    failed: dict[str, DitAccelError] = {}

    def attempt(arm: BenchArm, steps: int) -> ArmRun | None:
        try:
            if bench.free is not None and memory[arm.name] > bench.free:
                there = f"{bench.free / 2**30:.1f} GiB are free"
                raise OutOfMemoryError(f"is refused: it needs about {memory[arm.name] / 2**30:.1f} GiB, and {there}")
            return bench(arm, steps) if arm.name not in failed else None
        except Exception as error:
            failed[arm.name] = reason_of(error)
            return None

    for arm in arms:
        attempt(arm, min(WARM, steps))
    takes = {arm.name: partial(attempt, arm, steps) for arm in arms if arm.name not in failed}
    runs: dict[str, list[ArmRun]] = {name: [] for name in takes}
    for number, results in enumerate(in_turn(takes, rounds, deadline=deadline) if takes else (), 1):
        say(f"round {number} of {rounds} is done")
        for name, ran in results.items():
            runs[name] += [ran] if ran is not None else []
    running = [arm for arm in arms if arm.name not in failed]
    if all(arm.methods for arm in running):
        raise ConfigError(f"no attention backend of diffusers runs here: {failed[arms[0].name]}")
    dense = min((arm.name for arm in running if not arm.methods), key=lambda name: np.median(_rounds(runs[name])))
    figures = {arm.name: _figures(bench.plan, arm, runs[arm.name], dense, runs[dense]) for arm in running}
    figures |= {name: {"reason": str(error), "out_of_memory": isinstance(error, OutOfMemoryError)}
              for name, error in failed.items()}  # fmt: skip
    return [_about(bench, arm) | {"memory": memory[arm.name]} | figures[arm.name] for arm in arms]


def _rounds(runs: Sequence[ArmRun]) -> np.ndarray:
    """Return the mean seconds of a step in each round; their median is what a line tells."""
    return np.array([np.mean(ran.steps) for ran in runs])


@torch.no_grad()
def _denoise(bench: Bench, steps: int) -> Iterator[float]:
    """Run steps as a pipeline without guidance does, and give the seconds of each."""
    name, none = bench.plan.adapter.latents, lambda *args, **kwargs: contextlib.nullcontext()
    context = getattr(bench.transformer, "cache_context", none)  # a few have none, and timesteps tell
    clock = bench.plan.adapter.timestep
    x, timestep = bench.inputs[name], bench.inputs[clock]
    for step in range(steps):
        inputs = {**bench.inputs, name: x, clock: timestep * 2 * (1 - step / steps)}
        started = device_time(bench.device)
        with context("cond", step_index=step, num_inference_steps=steps):
            out = bench.transformer(**inputs, return_dict=False)[0]
        yield device_time(bench.device) - started
        if out.shape == x.shape:
            x = x - out / steps


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep back what diffusers and torch say of every backend that is tried."""
    with quiet_diffusers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _about(bench: Bench | Beside, arm: BenchArm) -> Line:
    plan = bench.plan
    return {
        "shape": plan.shape.name, "arm": arm.name, "kind": "method" if arm.methods else "dense",
        "family": plan.family.name, "layers": plan.family.layers, "heads": plan.family.heads,
        "all_heads": plan.all_heads, **plan.sizes, "tokens": plan.dense.layout.tokens,
        "steps": plan.dense.num_inference_steps, "methods": {method.name: method.to_dict() for method in arm.methods},
        **timed_on(bench.device, bench.dtype),
    }  # fmt: skip


def _figures(plan: BenchPlan, arm: BenchArm, runs: Sequence[ArmRun], against: str, dense: Sequence[ArmRun]) -> Line:
    """Return what an arm took; ratios are to the fastest dense backend: of the steps, and of one attention layer."""
    last, seconds, steps = runs[-1], _rounds(runs), plan.dense.num_inference_steps
    ours, other = ([x for ran in ones for x in ran.attention] for ones in (runs, dense))
    done = work(last.counts, dense[-1].counts / steps, last.attended, plan.dense.attention_share) / steps
    flops = done * plan.dense.total_flops / plan.dense.forwards
    return {
        "rounds": len(runs), "step_seconds": quartiles(seconds), "ratio": quartiles(_rounds(dense) / seconds),
        "block_seconds": quartiles([x for ran in runs for x in ran.blocks]), "attention_seconds": quartiles(ours),
        "attention_ratio": float(np.median(other) / np.median(ours)), "against": against, "work": done,
        "attended": last.attended, "flops_a_step": flops, "tflops": flops / float(np.median(seconds)) / 1e12,
        "predicted": plan.speedup(arm.methods) if arm.methods else None,
    }  # fmt: skip
