"""What all tuning runs share: generations of a request's prompts, what is done so far, and what was found.

Each `tune_*` is a function of a `Request`, whose methods are attached, of the file to write, of options of its own and
of ``stages``, the progress bars (None shows none). It writes the file and returns what was found, a `Tuned`. It raises
`ConfigError` for what can't be tuned, a file that can't be written, and progress of other settings beside that file; a
run that was stopped goes on after the last part that was whole.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import EMBEDDED, Request, settle
from dit_accel_pipelines.generation.side_car import Generation
from dit_accel_pipelines.processes.ranks import Ranks

import dit_accel
from dit_accel.attachment.layers import Observer
from dit_accel.errors import ConfigError
from dit_accel.files import check_writable, written_whole
from dit_accel.methods.base import AttentionHandler, Model, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.toml import to_toml

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a tuner found and wrote.

    Attributes:
        output: the file.
        found: everything by name, as plain values for JSON.
        columns: heads of the table that the command line shows.
        rows: of that table.
        remarks: lines below it.
    """

    output: Path
    found: Mapping[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {"output": str(self.output), **self.found}


class Runs:
    """The generations of a tuning run, with the loaded model; what they gave is kept beside the output until `finish`.

    Args:
        request: what to generate, with the methods that are attached.
        output: the file that is to be written, of this ``suffix``.
        stages: progress bars; None shows none.
        ranks: the processes that share the run, of which the first reads and writes; None: this one alone.
        settings: what else must be the same for two runs to be one.

    Attributes:
        request: the settled one.
        pipe: the pipeline, nothing attached.
        done: the parts that are done, plain values.

    Raises:
        ConfigError: for files that can't be written, and for what is kept of other settings or can't be read.
    """

    def __init__(
        self, request: Request, output: Path, suffix: str, stages: Stages | None, ranks: Ranks | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        if output.suffix != suffix or not output.parent.is_dir():
            raise ConfigError(f"tune's output must be a {suffix} in a folder that exists, got {output}")
        self._path, self._ranks = output.with_name(f"{output.name}.progress.json"), ranks or Ranks()
        for path, what in ((output, "output"), (self._path, "progress file")):
            check_writable(path, f"tune's {what}")
        self.request = settle(request)[0]
        self._settings = json.loads(json.dumps({**run_settings(self.request), **settings}))
        self.done: list[Any] = self._ranks.shared(self._read)
        self.stages = stages or Stages(quiet=True)
        self.stages.stage("loading")
        self.pipe = load_pipeline(self.request)

    def _read(self) -> list[Any]:
        if not self._path.exists():
            return []
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            known, done = saved["settings"], list(saved["prompts"])
            if saved["version"] != VERSION:
                raise ValueError(f"version {saved['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._path} is not tuning progress that this release can read ({error}); delete it"
            ) from None
        for name, value in self._settings.items():
            if known.get(name) != value:
                raise ConfigError(
                    f"{self._path} holds progress of a run with {name} = {known.get(name)!r}, this one has {value!r}; "
                    "finish that run, or delete the file to start again"
                )
        return done

    def add(self, part: Any) -> None:
        """Note a part that is done, and keep it."""
        self.done.append(part)
        if self._ranks.first:
            with written_whole(self._path) as temporary:
                content = {"version": VERSION, "settings": self._settings, "prompts": self.done}
                temporary.write_text(json.dumps(content), encoding="utf-8")

    def finish(self) -> None:
        """Delete what was kept: the run's output is whole."""
        self._path.unlink(missing_ok=True)

    def attached(self, *further: MethodConfig) -> AbstractContextManager[Any]:
        """Attach further methods and the request's for as long as the context lasts, and give the attachment."""
        methods = *further, *self.request.methods
        return dit_accel.attach(self.pipe, *methods, preset="none", backend=self.request.backend)

    def left(self, how: str = "") -> Iterator[str]:
        """Give the prompts of which no part is done yet, each shown as a stage, with ``how`` behind."""
        done = len(self.done)
        for number, prompt in enumerate(self.request.prompts[done:], done + 1):
            self.stages.stage(f"prompt {number} of {len(self.request.prompts)}{how}")
            yield prompt

    def run(self, prompt: str, attachment: Any = None, **changes: Any) -> Generation:
        """Generate a prompt by the request with some changes."""
        request = dataclasses.replace(self.request, **changes)
        return run(self.pipe, prompt, request, attachment=attachment, stages=self.stages)


def run_settings(request: Request) -> dict[str, Any]:
    """Return what must be the same for two runs of a request to be one."""
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "seed", "dtype", "backend")
    settings = {name: getattr(request, name) for name in names}
    settings |= {"model": request.model or EMBEDDED, "prompts": request.prompts}
    return {**settings, "methods": {one.name: one.to_dict() for one in request.methods}}


def write_config(
    output: Path, config: MethodConfig, about: Sequence[str], run: Mapping[str, Any] | None = None
) -> None:
    """Write the TOML that ``--config`` takes, whole or not at all, with remarks above it and what a run sets."""
    with written_whole(output) as temporary:
        temporary.write_text("".join(f"# {line}\n" for line in about) + to_toml([config], run), encoding="utf-8")


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
