"""An embedded model as the suites run it: its pipeline, the call of a clip, and what a run made and cost."""

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dit_accel_assets import held_out_prompts, model_defaults, model_names, model_path
from dit_accel_pipelines.generate import attached
from dit_accel_pipelines.memory import begin_peak, peak_memory
from dit_accel_pipelines.pipeline_call import PipelineCall, pipeline_class
from dit_accel_pipelines.progress import Stages
from dit_accel_pipelines.quiet import quiet_diffusers
from dit_accel_pipelines.request import check_words
from dit_accel_pipelines.solvers import make_scheduler
from dit_accel_pipelines.timing import Timings, timed_steps

from dit_accel import ConfigError
from dit_accel.adapters.model_files import read_model_files
from dit_accel.errors import did_you_mean
from dit_accel.methods.caches.native import DiffusersCache
from dit_accel.methods.config import MethodConfig

from .counting import Counter, Counts, attended, attended_by_step, density_map, own_share
from .metrics.metric import Clip

DIGITS = 4
"""Digits behind the point of seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of a run's stages, beside whatever else the machine did.

    Attributes:
        threads: of torch.
        text: until the first step begins: encoding the prompt, and what else is prepared.
        denoise: all steps.
        decode: from the last step to the frames.
        steps: of each step.
    """

    threads: int
    text: float
    denoise: float
    decode: float
    steps: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, to a tenth of a millisecond."""
        told = {key: round(getattr(self, key), DIGITS) for key in ("text", "denoise", "decode")}
        return {"threads": self.threads, **told, "steps": [round(one, DIGITS) for one in self.steps]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one call of the pipeline made.

    Attributes:
        frames: [F, height, width, 3] in [0, 1].
        counts: the blocks and attention calls that ran.
        attended: the share of the pairs that the attention calls computed; 1 is dense.
        seconds: of the denoising loop.
        times: what its stages took; None where that is not known.
        by_step: what ran in each step, and the share of the pairs that its attention calls computed; empty where that
            is not known.
        density: `density_map` of what ran.
        memory: the most bytes that were held meanwhile, by `peak_memory`; None where that is not known.
    """

    frames: Clip
    counts: Counts
    attended: float
    seconds: float
    times: Times | None = None
    by_step: tuple[tuple[Counts, float], ...] = ()
    density: tuple[tuple[float | None, ...], ...] = ()
    memory: Mapping[str, int] | None = None


class EmbeddedModel:
    """A loaded embedded model.

    Args:
        name: a name of the catalog.
        call: arguments of the pipeline's call besides the model's defaults, such as ``num_frames``.
        prompt: of all clips, whose number is then only the seed; None: each number's held-out prompt.

    Raises:
        ConfigError: for an unknown model, arguments that its pipeline does not take, or words that it never saw.
    """

    def __init__(self, name: str, call: Mapping[str, Any], prompt: str | None = None) -> None:
        from diffusers import DiffusionPipeline

        check_name(name)
        if prompt is not None:
            check_words(prompt, name)
        self.name = name
        self._prompt = prompt
        self.weights = weights_hash(name)
        with quiet_diffusers():
            self.pipe: Any = DiffusionPipeline.from_pretrained(model_path(name), dtype=torch.float32)
        self.call = settled_call(name, call)
        self.adapter, self.family = read_model_files(str(model_path(name))).identify()
        self.own_share = own_share(self.adapter, self.family, self.call)
        self.shipped = self.pipe.scheduler
        self._counter = Counter(self.pipe.transformer, self.adapter)

    def prompt(self, clip: int) -> str:
        """Return the prompt of a clip, whose number is its seed."""
        return held_out_prompts(self.name, clip + 1)[clip] if self._prompt is None else self._prompt

    def run(
        self,
        clip: int,
        *,
        steps: int,
        solver: str,
        flow_shift: float | None = None,
        methods: Sequence[MethodConfig] = (),
        call: Mapping[str, Any] | None = None,
    ) -> Run:
        """Make one clip.

        Args:
            clip: number of the prompt, and seed of the noise.
            steps: denoising steps.
            solver: a name of `SOLVERS`.
            flow_shift: noise shift; None: the model's own.
            methods: what is attached.
            call: arguments that differ from the model's own.
        """
        call = {**self.call, **(call or {})}
        self.pipe.scheduler = make_scheduler(self.shipped, solver, flow_shift)
        self._counter.take()
        generator, counts = torch.Generator().manual_seed(clip), list[Counts]()
        counted = begin_peak()
        with (
            attached(self.pipe, [_told_timestep(method, self.pipe) for method in methods], "auto") as attachment,
            quiet_diffusers(),
            timed_steps(self.pipe, Stages(quiet=True), lambda: counts.append(self._counter.take())) as timings,
        ):
            out = self.pipe(self.prompt(clip), **call, num_inference_steps=steps, generator=generator, output_type="np")
            report = attachment.report() if attachment else None
        shares = attended_by_step(report, self.adapter, self.family, call, methods)
        return Run(
            frames=_frames(out),
            counts=sum(counts, self._counter.take()),
            attended=attended(report, self.adapter, self.family, call, methods),
            seconds=timings.denoise,
            times=_times(timings),
            by_step=tuple((one, shares.get(step, 1.0)) for step, one in enumerate(counts)),
            density=density_map(report, len(counts)),
            memory=peak_memory() if counted else None,
        )


def _times(timings: Timings) -> Times:
    return Times(
        threads=torch.get_num_threads(), text=timings.text, denoise=timings.denoise, decode=timings.decode,
        steps=tuple(timings.steps),
    )  # fmt: skip


def check_name(name: str) -> None:
    """Refuse a model that is not embedded, with the nearest that is.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in model_names():
        raise ConfigError(f"{name!r} is no embedded model; {did_you_mean(name, model_names())}")


@functools.cache
def weights_hash(name: str) -> str:
    """Return 12 hexadecimal digits that tell a model's weights from others', by all its safetensors files."""
    folder, found = model_path(name), hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        found.update(path.relative_to(folder).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def settled_call(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's call: its defaults, without steps, changed by what was given.

    Raises:
        ConfigError: for an argument that its pipeline does not take.
    """
    call = PipelineCall.of(pipeline_class(read_model_files(str(model_path(name)))))
    known = [key for key in call.parameters if key not in ("self", "prompt", "num_inference_steps", "generator")]
    for key in given:
        if key not in known:
            raise ConfigError(f"a suite's call of {name} takes no {key!r}; {did_you_mean(key, known)}")
    defaults = {key: value for key, value in model_defaults(name).items() if key in known}
    return {**defaults, **given}


def _told_timestep(method: MethodConfig, pipe: Any) -> MethodConfig:
    """Return one of diffusers' caches with the callback that tells it the timestep, which a file can't hold."""
    if not isinstance(method, DiffusersCache) or getattr(method.config, "current_timestep_callback", ()) is not None:
        return method
    config: Any = copy.copy(method.config)
    config.current_timestep_callback = lambda: pipe.current_timestep
    return DiffusersCache(config=config)


def _frames(out: Any) -> Clip:
    """Return a pipeline's frames [F, height, width, 3] in [0, 1]; a picture is one frame."""
    pictures = out.frames[0] if hasattr(out, "frames") else out.images[:1]
    return np.asarray(pictures, dtype=np.float32)
