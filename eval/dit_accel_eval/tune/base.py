"""What all tuning runs share: the file to write, what is done so far, and what was found as plain values.

Each `tune_*` is a function of a `Request`, whose methods are attached, of the file to write, of options of its own and
of ``stages``, the progress bars (None shows none). It writes the file and returns what was found, a `Tuned`. It raises
`ConfigError` for what can't be tuned, a file that can't be written, and progress of other settings beside that file; a
run that was stopped goes on after the last part that was whole.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import EMBEDDED, Request

from dit_accel.errors import ConfigError
from dit_accel.files import check_writable, written_whole

VERSION = 1

Part = TypeVar("Part")

Table = tuple[tuple[str, ...], list[tuple[str, ...]], list[str]]
"""Columns, rows and remarks of what was found, for the command line."""


def left_prompts(request: Request, progress: "Progress[Any]", stages: Stages, how: str = "") -> Iterator[str]:
    """Give the prompts of which progress has no part yet, each shown as a stage, with ``how`` behind."""
    done = len(progress.done)
    for number, prompt in enumerate(request.prompts[done:], done + 1):
        stages.stage(f"prompt {number} of {len(request.prompts)}{how}")
        yield prompt


class Tuned:
    """What a tuner found and wrote; a dataclass with ``output``, the file, adds the rest."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        found = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


def check_output(output: Path, suffix: str, *beside: Path) -> None:
    """Refuse an output of another suffix, and files that can't be written: the output's and those beside it."""
    if output.suffix != suffix or not output.parent.is_dir():
        raise ConfigError(f"tune's output must be a {suffix} in a folder that exists, got {output}")
    for path in (output, *beside):
        check_writable(path, "tune's output")


class Progress(Generic[Part]):
    """The parts that a run has done, one a prompt.

    Args:
        output: the file that the run writes; progress lies beside it until `finish`.
        settings: what must be the same for two runs to be one.
        from_plain: makes a part of what JSON gives back; dataclasses are written as objects.

    Raises:
        ConfigError: for progress of other settings, or that can't be read or written.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], from_plain: Callable[[Any], Part]) -> None:
        self._path = output.with_name(f"{output.name}.progress.json")
        check_writable(self._path, "tune's progress file")
        self._settings = json.loads(json.dumps(settings))
        self.done: list[Part] = self._read(from_plain)

    def add(self, part: Part) -> None:
        """Note a part, and write what is done."""
        self.done.append(part)
        content = {"version": VERSION, "settings": self._settings, "prompts": self.done}
        with written_whole(self._path) as temporary:
            temporary.write_text(json.dumps(content, default=dataclasses.asdict), encoding="utf-8")

    def finish(self) -> None:
        """Delete the file: the run's output is whole."""
        self._path.unlink(missing_ok=True)

    def _read(self, from_plain: Callable[[Any], Part]) -> list[Part]:
        if not self._path.exists():
            return []
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            known, prompts = saved["settings"], saved["prompts"]
            if saved["version"] != VERSION:
                raise ValueError(f"version {saved['version']}")
            done = [from_plain(one) for one in prompts]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._path} is not tuning progress that this release can read ({error}); delete it"
            ) from None
        check_settings(self._path, "progress", known, self._settings)
        return done


def check_settings(path: Path, what: str, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a file's progress, which errors call ``what``, if its run had other settings."""
    for name, value in settings.items():
        if known.get(name) != value:
            raise ConfigError(
                f"{path} holds {what} of a run with {name} = {known.get(name)!r}, this one has {value!r}; finish that "
                "run, or delete the file to start again"
            )


def run_settings(request: Request, **further: Any) -> dict[str, Any]:
    """Return what must be the same for two runs of a request to be one, and what else must be."""
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "seed", "dtype", "backend")
    settings = {name: getattr(request, name) for name in names}
    settings |= {"model": request.model or EMBEDDED, **further}
    return {**settings, "prompts": request.prompts, "methods": {one.name: one.to_dict() for one in request.methods}}
