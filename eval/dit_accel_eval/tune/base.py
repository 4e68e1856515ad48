"""What all tuners share: a search that scores the points of a space and keeps each score, and what was found.

Each `tune_*` attaches a request's methods, writes a file and returns what it found; without ``stages`` it shows no
progress. It refuses what can't be tuned, a file that can't be written, and scores of other settings beside that file.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import EMBEDDED, Request, check_words, resolve
from dit_accel_pipelines.generation.side_car import Generation
from dit_accel_pipelines.processes.ranks import Ranks

import dit_accel
from dit_accel.attachment.layers import Observer
from dit_accel.errors import ConfigError
from dit_accel.files import check_writable, write_text
from dit_accel.methods.base import AttentionHandler, Model, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.toml import to_toml

from ..runs.loaded import TuningRequest

VERSION = 2
Config = TypeVar("Config", bound=MethodConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a tuner found, as plain values, and a table of it."""

    found: Mapping[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()


class TuningRun:
    """The loaded model of a tuning run, its generations, and the scores, which are kept beside the output."""

    def __init__(
        self, request: TuningRequest, output: Path, suffix: str, stages: Stages | None, ranks: Ranks | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        if output.suffix != suffix or not output.parent.is_dir():
            raise ConfigError(f"tune's output must be a {suffix} in a folder that exists, got {output}")
        self._path, self._ranks = output.with_name(f"{output.name}.progress.json"), ranks or Ranks()
        for path, what in ((output, "output"), (self._path, "progress file")):
            check_writable(path, f"tune's {what}")
        self.request, self.prompts = resolve(request)[0], request.prompts
        if request.embedded:
            for prompt in self.prompts:
                check_words(prompt, request.embedded)
        self._settings = json.loads(json.dumps({**run_settings(self), **settings}))
        self._scores: dict[str, Any] = {_key(point): score for point, score in self._ranks.shared(self._read)}
        self.stages = stages or Stages(quiet=True)
        self.stages.stage("loading")
        self.pipe = load_pipeline(self.request)

    def _read(self) -> list[Any]:
        if not self._path.exists():
            return []
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            known, scores = saved["settings"], [(point, score) for point, score in saved["scores"]]
            if saved["version"] != VERSION:
                raise ValueError(f"version {saved['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._path} is no tuning progress of this release ({error}); delete it") from None
        for name, value in self._settings.items():
            if known.get(name) != value:
                raise ConfigError(
                    f"{self._path} holds progress of a run with {name} = {known.get(name)!r}, this one has {value!r}; "
                    "finish that run, or delete the file to start again"
                )
        return scores

    def search(self, space: Sequence[Any], score: Callable[[Any], Any], words: Callable[[Any], str] = str) -> list[Any]:
        """Return the score of each point of a space; one that an earlier run scored is not scored again."""

        def scored(point: Any) -> Any:
            self.stages.stage(words(point))
            return score(point)

        self._ranks.spread([point for point in space if _key(point) not in self._scores], scored, self._keep)
        return [self._scores[_key(point)] for point in space]

    def over_prompts(self, score: Callable[[str], Any]) -> list[Any]:
        """Return the score of each of the request's prompts."""
        prompts = self.prompts
        words = lambda number: f"prompt {number + 1} of {len(prompts)}"  # noqa: E731
        return self.search(range(len(prompts)), lambda number: score(prompts[number]), words)

    def _keep(self, point: Any, score: Any) -> None:
        self._scores[_key(point)] = score
        if self._ranks.first:
            scores = [(json.loads(key), value) for key, value in self._scores.items()]
            write_text(self._path, json.dumps({"version": VERSION, "settings": self._settings, "scores": scores}))

    @property
    def scored(self) -> int:
        """How many points have a score."""
        return len(self._scores)

    def finish(self) -> None:
        """Delete the scores: the run's output is whole."""
        self._path.unlink(missing_ok=True)

    def attached(self, *further: MethodConfig) -> AbstractContextManager[Any]:
        """Attach further methods and the request's for as long as the context lasts, and give the attachment."""
        backend: Any = self.request.backend
        return dit_accel.attach(self.pipe, *further, *self.request.methods, preset="none", backend=backend)

    def run(self, prompt: str, attachment: Any = None, **changes: Any) -> Generation:
        """Generate a prompt by the request with some changes."""
        request = dataclasses.replace(self.request, prompt=prompt, **changes)
        return run(self.pipe, request, attachment=attachment, stages=self.stages)


def _key(point: Any) -> str:
    return json.dumps(point)


def replaced_method(request: Request, config_type: type[Config], usual: Config | None = None) -> tuple[Config, Any]:
    """Return the request's config of a type, else the usual one, and the request's other methods."""
    rest = tuple(method for method in request.methods if not isinstance(method, config_type))
    known = (method for method in request.methods if isinstance(method, config_type))
    return next(known, usual or config_type()), rest


def run_settings(runs: TuningRun) -> dict[str, Any]:
    """Return what must be the same for two runs of a request to be one."""
    request = runs.request
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "seed", "dtype", "backend")
    settings = {name: getattr(request, name) for name in names}
    settings |= {"model": request.model or EMBEDDED, "prompts": runs.prompts}
    return {**settings, "methods": {method.name: method.to_dict() for method in request.methods}}


def write_config(
    output: Path, config: MethodConfig, about: Sequence[str], run: Mapping[str, Any] | None = None
) -> None:
    """Write the TOML that ``--config`` takes, whole or not at all, with remarks above it and what a run sets."""
    write_text(output, "".join(f"# {line}\n" for line in about) + to_toml([config], run))


class WatchConfig(MethodConfig):
    """Asks for `Watch`."""

    name = "watch"


class Watch(AttentionHandler):
    """Sends every attention call through the plan, which it leaves as it is, so that observers see it."""

    config_type = WatchConfig
    phase = Phase.LISTS


@contextmanager
def watched_attention(attachment: Any, look: Observer) -> Iterator[None]:
    """Hand every attention call inside the block to a function."""
    execution = attachment.engine
    handlers, adapter = execution.handlers, execution.layers[0].state.adapter
    execution.use((Watch(WatchConfig(), Model(adapter=adapter, family=None, heads=0, layers=0)), *handlers))
    try:
        with attachment.observe(look):
            yield
    finally:
        execution.use(handlers)
