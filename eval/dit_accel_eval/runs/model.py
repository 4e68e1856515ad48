"""A model as the suites run it: its pipeline and schedulers, the call of a clip, and what a run made and cost."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from dit_accel_pipelines.generation.generate import any_pictures_of, attached
from dit_accel_pipelines.generation.loading import transformers_of
from dit_accel_pipelines.generation.memory import begin_peak, peak_memory
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.quiet import quiet_diffusers
from dit_accel_pipelines.generation.solvers import SOLVERS, make_scheduler, scheduler_like
from dit_accel_pipelines.generation.timing import Timings, timed_steps

from dit_accel import ConfigError, UnsupportedModel
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.model_files import read_config
from dit_accel.errors import did_you_mean
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.config import MethodConfig

from ..metrics.metric import Clip
from .clip_files import Encoder
from .counting import Counter, Counts, attended_share, density_map, run_estimate
from .rivals import cached_by

DIGITS = 4  # digits behind the point of seconds
Tables = Mapping[str, Mapping[str, Any]]  # the name of a class or of another project's cache -> its options
OWN = "own"  # the solver that stands for the scheduler which a model ships with


@dataclass(slots=True, kw_only=True)
class Times(Timings):
    """Seconds of a run's stages by so many threads of torch, beside whatever else the machine did."""

    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, to a tenth of a millisecond."""
        seconds = {key: round(getattr(self, key), DIGITS) for key in ("text", "denoise", "decode", "processor")}
        return {"threads": self.threads, **seconds, "steps": [round(step, DIGITS) for step in self.steps]}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRun:
    """What one call of the pipeline made."""

    frames: Clip
    counts: Counts
    attended: float  # share of the pairs that the attention calls computed; 1 is dense
    seconds: float
    times: Times | None = None
    by_step: tuple[tuple[Counts, float], ...] = ()  # what ran in each step, and its share of the pairs, where known
    density: tuple[tuple[float | None, ...], ...] = ()
    memory: Mapping[str, int] | None = None
    encoder: Encoder | None = None  # encodes as the server did that made the frames; None: they came without loss


class SuiteModel:
    """A loaded pipeline that makes clips by their numbers."""

    dtype: str | None = None
    device = torch.device("cpu")

    def __init__(
        self, pipe: Any, *, name: str, weights: str, call: Mapping[str, Any], adapter: Adapter, family: Family,
        prompt: Callable[[int], str], seed: Callable[[int], int],
    ) -> None:  # fmt: skip
        self.pipe, self.prompt, self.seed = pipe, prompt, seed  # of a clip, by its number
        self.name, self.weights, self.call = name, weights, dict(call)
        self.adapter, self.family = adapter, family
        size = run_estimate(adapter, family, self.call)
        self.own_share, self.tokens = size.attention_share, size.layout.tokens
        self.shipped = pipe.scheduler
        self.transformers = transformers_of(pipe)
        self._counter = Counter(self.transformers, adapter)

    def run(
        self, clip: int, *, steps: int, solver: str, scheduler: Mapping[str, Any] | None = None,
        flow_shift: float | None = None, guider: Tables | None = None, methods: Sequence[MethodConfig] = (),
        rival: Tables | None = None, call: Mapping[str, Any] | None = None,
    ) -> ModelRun:  # fmt: skip
        """Make one clip."""
        call = {**self.call, **(call or {})}
        self.pipe.scheduler = arm_scheduler(self.shipped, solver, scheduler or {}, flow_shift)
        self._counter.take()
        generator, counts = torch.Generator().manual_seed(self.seed(clip)), list[Counts]()
        counted = begin_peak()
        with (
            guided_by(self.pipe, guider or {}),
            cached_by(self.pipe, rival) if rival else contextlib.nullcontext(),
            attached(self.pipe, [with_timestep(method, self.pipe) for method in methods], "auto") as attachment,
            quiet_diffusers(),
            timed_steps(self.pipe, Stages(quiet=True), lambda: counts.append(self._counter.take())) as timings,
        ):
            out = (attachment.call if attachment else self.pipe)(
                prompt=self.prompt(clip), **call, num_inference_steps=steps, generator=generator, output_type="np"
            )
            report = attachment.report() if attachment else None
        share, shares = attended_share(report, self.adapter, self.family, call, methods)
        return ModelRun(
            frames=any_pictures_of(out).astype(np.float32, copy=False), counts=sum(counts, self._counter.take()),
            attended=share, seconds=timings.denoise, times=Times(**asdict(timings), threads=torch.get_num_threads()),
            by_step=tuple((count, shares.get(step, 1.0)) for step, count in enumerate(counts)),
            density=density_map(report, len(counts)), memory=peak_memory() if counted else None,
        )  # fmt: skip


@contextlib.contextmanager
def guided_by(pipe: Any, guider: Tables) -> Iterator[None]:
    """Let a pipeline guide by one of diffusers' guiders for the block."""
    if not guider:
        yield
        return
    import diffusers

    check_guided(type(pipe))
    ((name, options),) = guider.items()
    try:
        guide = getattr(diffusers, name)(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} does not accept {dict(options)}: {error}") from None
    previous, pipe.guider = pipe.guider, guide
    try:
        yield
    finally:
        pipe.guider = previous


def check_guided(pipeline: type) -> None:
    """Refuse a class of pipelines that takes no guider."""
    if "guider" not in inspect.signature(pipeline).parameters:
        others = "HunyuanVideo 1.5's, HunyuanImage's and Motif-Video's pipelines do"
        remedy = "leave it out, or set guidance_scale in the suite's call"
        raise ConfigError(f"{pipeline.__name__} takes no guider; {others}: {remedy}")


def with_timestep(method: MethodConfig, pipe: Any = None) -> MethodConfig:
    """Return one of diffusers' caches with the callback that tells it the timestep, which a file can't hold."""
    if not isinstance(method, DiffusersCache) or getattr(method.config, "current_timestep_callback", ()) is not None:
        return method
    config: Any = copy.copy(method.config)
    config.current_timestep_callback = lambda: pipe.current_timestep
    return DiffusersCache(config=config)


def check_scheduler(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what is none of diffusers' schedulers of another's noise schedule, or an option that it has not."""
    taken = check_options("scheduler", name, ())
    if not {"use_flow_sigmas", "shift", "trained_betas"} & {*taken}:
        others = "UniPCMultistepScheduler or FlowMatchHeunDiscreteScheduler"
        raise ConfigError(f"{name} takes no noise schedule but its own; take, say, {others}")
    check_options("scheduler", name, options)


def check_options(kind: str, name: str, options: Iterable[str], known: Collection[str] | None = None) -> list[str]:
    """Return the options that one of diffusers' classes takes; refuse a name of another kind, or another option."""
    import diffusers

    known = [entry for entry in dir(diffusers) if entry.endswith("Scheduler")] if known is None else known
    if name not in known:
        raise ConfigError(f"diffusers has no {kind} {name!r}; {did_you_mean(name, known)}")
    taken = [*inspect.signature(getattr(diffusers, name)).parameters]
    for option in options:
        if option not in taken:
            raise ConfigError(f"{name} has no option {option!r}; {did_you_mean(option, taken)}")
    return taken


def shipped_scheduler(source: str) -> Any:
    """Return the scheduler that a model ships with, from its config alone."""
    import diffusers

    config = read_config(source, "scheduler/scheduler_config.json")
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise UnsupportedModel(f"{source} ships with {config.get('_class_name')!r}, which diffusers does not have")
    return cls.from_config(config)


def arm_scheduler(shipped: Any, solver: str, options: Mapping[str, Any], flow_shift: float | None) -> Any:
    """Return a fresh scheduler of the model's own noise schedule."""
    if solver in SOLVERS:
        return make_scheduler(shipped, solver, flow_shift)
    if solver != OWN:
        return scheduler_like(shipped, solver, **options)
    if flow_shift is not None:
        raise ConfigError(f"the own scheduler keeps its noise schedule, got flow_shift {flow_shift}; leave it out")
    return type(shipped).from_config(shipped.config)
