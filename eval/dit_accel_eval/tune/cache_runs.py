"""Runs that compute every step while a step cache is attached, and note what it would measure."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, settle

import dit_accel
from dit_accel import ConfigError
from dit_accel.files import written_whole
from dit_accel.methods.caches.calibrated import CalibratedConfig, CalibratedHandler
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.site import ForwardContext
from dit_accel.methods.toml import to_toml

from .base import Progress, check_output, left_prompts, run_settings

Config = TypeVar("Config", bound=CalibratedConfig)

Note = dict[str, Any]
"""What was noted of one forward, as plain values; with ``transformer`` and ``step``."""

Watch = Callable[[CalibratedHandler, ForwardContext, Any], Note]
"""(handler, context, output) -> a note of a forward of the branch that decides."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What was noted of a model in so many steps; progress is to be finished when the output is written."""

    model: str
    steps: int
    progress: Progress[list[Note]]

    @property
    def prompts(self) -> list[list[Note]]:
        """The notes of each prompt, in the order of the run."""
        return self.progress.done


def watched_runs(
    request: Request, output: Path, config: CalibratedConfig, new_watch: Callable[[], Watch], stages: Stages | None
) -> Watched:
    """Generate every prompt of a request with all steps computed, and return what was noted of the forwards.

    Args:
        request: what to generate; its methods are attached, with ``config`` in place of one of its type.
        output: TOML file that is to be written.
        config: of the cache; its numbers are not used.
        new_watch: makes what notes one prompt's forwards.
        stages: progress bars; None shows none.
    """
    check_output(output, ".toml")
    others = [method for method in request.methods if not isinstance(method, type(config))]
    request, *_ = settle(dataclasses.replace(request, methods=(config, *others)))
    progress: Progress[list[Note]] = Progress(output, run_settings(request), list)
    stages = stages or Stages(quiet=True)
    stages.stage("loading")
    pipe = load_pipeline(request)
    with dit_accel.attach(pipe, *request.methods, preset="none", backend=request.backend) as attachment:
        handlers = attachment._execution.handlers
        cache: Any = next(handler for handler in handlers if isinstance(handler, CalibratedHandler))
        for prompt in left_prompts(request, progress, stages):
            watch, notes = new_watch(), list[Note]()
            cache.computed = lambda context, decider, output, w=watch, n=notes: n.append(w(cache, context, output))
            run(pipe, prompt, request, stages=stages)
            progress.add(notes)
    steps = 1 + max(note["step"] for notes in progress.done for note in notes)
    return Watched(model=cache.model.name, steps=steps, progress=progress)


def config_of(request: Request, config_type: type[Config]) -> Config:
    """Return the request's config of a cache; one that has numbers is refused."""
    config = next((one for one in request.methods if isinstance(one, config_type)), config_type())
    for name in (config.numbers, "family", "measured_on"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"tune {config.name} measures the {config.numbers} itself, got {config.name}.{name} = "
                f"{getattr(config, name)!r}; leave it out"
            )
    return config


def write_config(output: Path, config: MethodConfig, about: Sequence[str]) -> None:
    """Write the TOML that ``--config`` takes, whole or not at all, with remarks above it."""
    with written_whole(output) as temporary:
        remarks = "".join(f"# {line}\n" for line in about)
        temporary.write_text(remarks + to_toml([config]), encoding="utf-8")
