"""What a judge of two clips is: a class that answers questions, or a command that reads and writes JSON lines."""

import json
import math
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from dit_accel_pipelines.generation.media import Frames

from dit_accel import ConfigError

from ..runs.clip_files import ClipFile


@dataclass(frozen=True, slots=True)
class ShownClip:
    """A clip in a file, of which a judge is shown so many frames at most, evenly over it, and these a second."""

    path: Path
    count: int
    fps: float

    def frames(self) -> Frames:
        """Return the frames that are shown, uint8 [F, height, width, 3]."""
        frames = ClipFile(name=self.path.stem, path=self.path).levels()
        return frames[np.linspace(0, len(frames) - 1, min(self.count, len(frames))).round().astype(int)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about two clips that are to show a prompt."""

    question: str
    prompt: str
    first: ShownClip
    second: ShownClip


class ClipJudge(Protocol):
    """Whatever scores two clips, more is better, on one scale."""

    @property
    def name(self) -> str:
        """What results call it."""
        ...

    @property
    def questions(self) -> Sequence[str]:
        """The questions where none are named."""
        ...

    def answers(self, questions: Sequence[Question]) -> Iterable[tuple[float, float]]:
        """Give for each question the scores of the first clip and of the second."""
        ...


OVERALL = "How good is the clip as a video of its prompt?"  # the question for a command where none is named


@dataclass(frozen=True, slots=True)
class CommandJudge:
    """A command that reads a JSON object a line on its standard input, and prints ``{"scores": [a, b]}`` for each."""

    name: str
    questions: Sequence[str] = (OVERALL,)

    def __post_init__(self) -> None:
        if not shutil.which(shlex.split(self.name)[0]):
            raise ConfigError(
                f"there is no judge {self.name!r}; take a command, likert=MODEL, videoscore2, FILE.py:CLASS"
            )

    def answers(self, questions: Sequence[Question]) -> list[tuple[float, float]]:
        """Return what the command prints, which sees frames as PNG files that are deleted afterwards."""
        from PIL import Image

        with tempfile.TemporaryDirectory(prefix="dit-accel-judge-") as folder:
            files, lines = dict[ShownClip, list[str]](), ""
            for clip in dict.fromkeys(clip for question in questions for clip in (question.first, question.second)):
                frames = clip.frames()
                files[clip] = [f"{folder}/{len(files)}-{number}.png" for number in range(len(frames))]
                for path, frame in zip(files[clip], frames, strict=True):
                    Image.fromarray(frame).save(path)
            for question in questions:
                about = {"question": question.question, "prompt": question.prompt, "fps": question.first.fps}
                shown = {"first": files[question.first], "second": files[question.second]}
                lines += json.dumps(about | shown) + "\n"
            done = subprocess.run(shlex.split(self.name), input=lines, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(f"the judge {self.name!r} ended with exit code {done.returncode}: {last}")
        answers = [line for line in done.stdout.splitlines() if line.strip()]
        if len(answers) != len(questions):
            raise ConfigError(f"the judge {self.name!r} printed {len(answers)} lines for {len(questions)} questions")
        return [self._scores(line) for line in answers]

    def _scores(self, line: str) -> tuple[float, float]:
        try:
            first, second = map(float, json.loads(line)["scores"])
        except (ValueError, KeyError, TypeError):
            first = second = math.nan
        if not (math.isfinite(first) and math.isfinite(second)):
            raise ConfigError(f'the judge {self.name!r} answered {line[:60]!r}; let it print {{"scores": [4, 3.5]}}')
        return first, second
