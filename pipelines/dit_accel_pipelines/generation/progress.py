"""Progress, notes and warnings on stderr; the bars show on a terminal only."""

import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dit_accel.cli.console import TALK, note, warn


class Stages:
    """One progress bar for each stage; ``quiet`` leaves warnings alone, ``silent`` not even these."""

    def __init__(self, *, quiet: bool = False, silent: bool = False) -> None:
        self._silent, self.quiet = silent, quiet or silent
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=TALK,
            disable=self.quiet or not TALK.is_terminal,
        )
        self._task: Any = None
        self._made, self._outputs, self._started = 0, 1, 0.0

    def __enter__(self) -> "Stages":
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._progress.__exit__(kind, error, trace)

    def stage(self, description: str, total: int | None = None, done: int = 0) -> None:
        """End the stage before and begin one of ``total`` parts (None: not known), of which some are done."""
        self._finish()
        self._task = self._progress.add_task(description, total=total, completed=done)

    def advance(self) -> None:
        """Count one part of the stage."""
        self._progress.advance(self._task)

    def outputs(self, count: int) -> None:
        """Begin so many outputs, of which each is told when it is made, with the time that the others take."""
        self._made, self._outputs, self._started = 0, count, time.monotonic()

    def output_made(self, output: Path) -> None:
        """Say which of the outputs is made now, and how long the rest takes if each takes as long as those so far."""
        self._made += 1
        if self.quiet or self._outputs == 1:
            return
        left = (time.monotonic() - self._started) / self._made * (self._outputs - self._made)
        rest = f", about {timedelta(seconds=round(left))} to go" if self._made < self._outputs else ""
        TALK.print(f"{output.name}, {self._made} of {self._outputs}{rest}", markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Say what the user may want to know, unless quiet was requested."""
        if not self.quiet:
            note(text)

    def warn(self, text: str) -> None:
        """Say what the user probably wants to change, also when quiet was requested."""
        if not self._silent:
            warn(text)

    def _finish(self) -> None:
        if self._task is None:
            return
        done = next(task for task in self._progress.tasks if task.id == self._task)
        total = done.total if done.total is not None else max(done.completed, 1)
        self._progress.update(self._task, total=total, completed=total, visible=self._outputs == 1)
