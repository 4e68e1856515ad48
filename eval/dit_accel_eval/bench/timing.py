"""Times real shapes with random weights: dense on every backend, methods, diffusers' caches; a step and its layers.

Arms take turns, so that what else the machine does falls on all alike. Random weights say nothing of quality, nor of
what a cache or a method that looks at values would decide on a real model; the work that ran stands beside each time.
"""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from dit_accel_pipelines.generation.quiet import quiet_diffusers

import dit_accel
from dit_accel import ConfigError
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.estimate.estimate import Estimate, estimate
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.config import MethodConfig

from ..runs.conditions import processor
from ..runs.counting import Counter, Counts, attended, work
from ..runs.results import Line
from .real_shapes import Inputs, make_model, to_device

Made = TypeVar("Made")

WARM = 2
"""Steps with which every arm is run before it counts: compilation, allocation, lists of tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is timed.

    Attributes:
        family: the model's sizes, with as many layers as are made.
        planned: the plan of the dense run, with the size.
    """

    adapter: Adapter
    family: Family
    planned: Estimate
    transformer: Any
    inputs: Inputs
    steps: int
    device: torch.device
    counter: Counter


@dataclass(slots=True, kw_only=True)
class BenchArm:
    """One arm and what its runs took.

    Attributes:
        kind: ``dense``, ``method`` or ``native``.
        backend: diffusers' attention backend; None: the default.
        reason: why it can't run here; None: it can.
        steps: seconds of every step.
        blocks: seconds of every block that ran.
        attention: seconds of every self-attention that ran.
        counts: what ran in one run; None: nothing yet.
        attended: share of the pairs that ran.
    """

    name: str
    kind: str
    methods: tuple[MethodConfig, ...] = ()
    backend: str | None = None
    reason: str | None = None
    steps: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    counts: Counts | None = None
    attended: float = 1.0

    def rounds(self, count: int) -> np.ndarray:
        """Return the mean seconds of a step in each of ``count`` rounds; their median is what a line tells."""
        return np.array(self.steps).reshape(count, -1).mean(1)


def now(device: torch.device) -> float:
    """Return the time in seconds, after all that the device has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def make_bench(
    adapter: Adapter,
    family: Family,
    *,
    layers: int,
    steps: int,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> Bench:
    """Make the model and its inputs.

    Raises:
        ConfigError: for sizes or layers that the model can't have.
    """
    if layers < 1 or layers > family.layers:
        raise ConfigError(
            f"{family.name} has {family.layers} layers, got --layers {layers}; ask for 1 to {family.layers}"
        )
    family = dataclasses.replace(family, layers=layers)
    planned = estimate(adapter, family, height=height, width=width, num_frames=num_frames, num_inference_steps=steps)
    sizes = dict(height=planned.height, width=planned.width, num_frames=planned.num_frames)
    transformer, inputs = make_model(adapter, family, layers, planned.layout, **sizes)
    with _silent():
        transformer = transformer.to(device, dtype).requires_grad_(False)
    return Bench(
        adapter=adapter, family=family, planned=planned, transformer=transformer, steps=steps, device=device,
        inputs=to_device(inputs, device, dtype), counter=Counter([transformer], adapter, partial(now, device)),
    )  # fmt: skip


def arms_of(methods: Sequence[MethodConfig], *, native_caches: bool = True) -> list[BenchArm]:
    """Return the arms: dense by every backend of diffusers, the methods by themselves and together, native caches."""
    import diffusers
    from diffusers.models.attention_dispatch import AttentionBackendName

    arms = [BenchArm(name=f"dense, {one.value}", kind="dense", backend=one.value) for one in AttentionBackendName]
    arms += [BenchArm(name=method.name, kind="method", methods=(method,)) for method in methods]
    if len(methods) > 1:
        together = " + ".join(method.name for method in methods)
        arms.append(BenchArm(name=together, kind="method", methods=tuple(methods)))
    taylor = diffusers.TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True)
    for one in (diffusers.FirstBlockCacheConfig(threshold=0.05), taylor) if native_caches else ():
        # those that take no numbers of a model, and no callback of a pipeline
        arms.append(BenchArm(name=type(one).__name__, kind="native", methods=(DiffusersCache(config=one),)))
    return arms


def run_bench(
    bench: Bench, arms: Sequence[BenchArm], *, rounds: int, say: Callable[[str], None] = lambda text: None
) -> list[Line]:
    """Run all arms in turn, round by round, and return a line for each, those that can't run here with their reason."""
    for arm in arms:
        arm.reason = _warmed(bench, arm)
        if arm.reason is not None and arm.kind != "dense":
            say(f"{arm.name} can't run here: {arm.reason}")
    running = [arm for arm in arms if arm.reason is None]
    if not any(arm.kind == "dense" for arm in running):
        raise ConfigError(f"no attention backend of diffusers runs here: {arms[0].reason}")
    takes = {arm.name: partial(_run, bench, arm, bench.steps) for arm in running}
    list(in_turn(takes, rounds, warm_up=0, begin=lambda number: say(f"round {number} of {rounds}")))
    dense = min((arm for arm in running if arm.kind == "dense"), key=lambda arm: float(np.median(arm.rounds(rounds))))
    assert dense.counts is not None
    return [_line(bench, arm, dense, rounds) for arm in arms]


def in_turn(
    arms: Mapping[str, Callable[[], Made]], rounds: int, *, warm_up: int = 1,
    begin: Callable[[int], None] = lambda number: None,
) -> Iterator[dict[str, Made]]:  # fmt: skip
    """Give what the arms made in each round, all in turn, so that what else the machine does falls on all alike.

    Args:
        arms: name -> what runs.
        rounds: that count.
        warm_up: rounds before them that don't.
        begin: is called with the number of a round that counts, before it.
    """
    for number in range(1 - warm_up, rounds + 1):
        if number > 0:
            begin(number)
        made = {name: arm() for name, arm in arms.items()}
        if number > 0:
            yield made


def _warmed(bench: Bench, arm: BenchArm) -> str | None:
    """Run an arm a little; returns why it can't run here, None if it can."""
    try:
        _run(bench, arm, WARM)
    except ConfigError as error:
        return str(error)
    except Exception as error:  # a backend that is not installed, or does not fit: each has errors of its own
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    arm.steps.clear()
    arm.blocks.clear()
    arm.attention.clear()
    return None


def _run(bench: Bench, arm: BenchArm, steps: int) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    bench.counter.take()
    nothing = contextlib.nullcontext()
    backend = attention_backend(arm.backend) if arm.backend else nothing  # not set_attention_backend, which would last
    with (
        _silent(),
        backend,
        dit_accel.attach(bench.transformer, *arm.methods, preset="none") if arm.methods else nothing as attachment,
    ):
        arm.steps += list(_denoise(bench, steps))
        report = attachment.report() if attachment is not None else None
    sizes = dict(height=bench.planned.height, width=bench.planned.width, num_frames=bench.planned.num_frames)
    arm.attended = attended(report, bench.adapter, bench.family, sizes, arm.methods)[0]
    arm.blocks += bench.counter.seconds["blocks"]
    arm.attention += bench.counter.seconds["attention"]
    arm.counts = bench.counter.take()


@torch.no_grad()
def _denoise(bench: Bench, steps: int) -> Iterator[float]:
    """Run steps as a pipeline without guidance does, and give the seconds of each."""
    name, none = bench.adapter.latents, lambda *args, **kwargs: contextlib.nullcontext()
    context = getattr(bench.transformer, "cache_context", none)  # a few have none, and timesteps tell
    x, timestep = bench.inputs[name], bench.inputs[bench.adapter.timestep]
    for step in range(steps):
        inputs = {**bench.inputs, name: x, bench.adapter.timestep: timestep * 2 * (1 - step / steps)}
        started = now(bench.device)
        with context("cond", step_index=step, num_inference_steps=steps):
            out = bench.transformer(**inputs, return_dict=False)[0]
        yield now(bench.device) - started
        if out.shape == x.shape:
            x = x - out / steps


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep back what diffusers and torch say of every backend that is tried."""
    with quiet_diffusers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(bench: Bench, arm: BenchArm, dense: BenchArm, rounds: int) -> Line:
    """Return an arm's line; ``ratio`` is how many times faster than the fastest dense backend its steps are."""
    planned = bench.planned
    line: Line = {
        "arm": arm.name, "kind": arm.kind, "family": bench.family.name, "layers": bench.family.layers,
        "height": planned.height, "width": planned.width, "num_frames": planned.num_frames,
        "tokens": planned.layout.tokens, "steps": bench.steps, "rounds": rounds,
        "methods": {one.name: one.to_dict() for one in arm.methods}, "dtype": str(bench.transformer.dtype)[6:],
        "device": _device(bench.device), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if arm.reason is not None:
        return line | {"reason": arm.reason}
    assert arm.counts is not None
    assert dense.counts is not None
    share = planned.attention_share
    done = work(arm.counts, dense.counts / bench.steps, arm.attended, share) / bench.steps
    per_step = planned.total_flops / planned.forwards
    totals = arm.rounds(rounds)
    ratios = dense.rounds(rounds) / totals
    predicted = estimate(
        bench.adapter, bench.family, height=planned.height, width=planned.width, num_frames=planned.num_frames,
        num_inference_steps=bench.steps, methods=arm.methods,
    )  # fmt: skip
    return line | {
        "step_seconds": quartiles(totals), "block_seconds": quartiles(arm.blocks),
        "attention_seconds": quartiles(arm.attention), "ratio": quartiles(ratios), "against": dense.name,
        "work": done, "attended": arm.attended, "flops_a_step": per_step * done,
        "tflops": per_step * done / float(np.median(totals)) / 1e12,
        "predicted": predicted.speedup if arm.kind == "method" else None,
    }  # fmt: skip


def quartiles(values: Sequence[float] | np.ndarray) -> Mapping[str, float]:
    """Return the median and the quartiles; nan where nothing ran."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) if len(values) else [math.nan] * 3
    return {"median": float(middle), "low": float(low), "high": float(high)}


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
