"""Runs dimensions over videos: a line each as it is measured, then the official result files.

A run that was stopped goes on where it stopped; a video is measured again if its file, or a network's, has changed.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.files import check_writable, json_text, written_whole

from ..runs.results import Line, append_line, read_lines
from . import rules
from .long import SUBJECT, Long
from .measures import WAYS, Means, flow_by
from .observations import KINDS
from .prompts import FLICKERING, SAMPLES, Prompt, Wanted, for_filter, served
from .rules import VideoScore
from .sampling import Video, read_video

FILTER = "static_filter"
"""What lines of the static filter stand under."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run.

    Attributes:
        name: what its files begin with.
        output: folder of its files.
        means: networks and observations.
        tell: is given a line of progress.
        warn: is given what should be known of the scores.
        long: how long videos are cut and scored; None: videos are scored whole.
    """

    name: str
    output: Path
    means: Means
    tell: Callable[[str], None]
    warn: Callable[[str], None]
    long: Long | None = None

    @property
    def lines(self) -> Path:
        """The file of lines, one a dimension and video."""
        return self.output / f"{self.name}_lines.jsonl"

    @property
    def results(self) -> Path:
        """The official result file."""
        return self.output / f"{self.name}_eval_results.json"

    @property
    def others(self) -> tuple[Path, Path]:
        """The official file of what was to be measured, and that of what the results rest on."""
        return self.output / f"{self.name}_full_info.json", self.output / f"{self.name}_about.json"


def check_results(output: Path, *files: Path) -> None:
    """Make the folder of results, and refuse files there that can't be written, before anything is measured."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {output} can't be made: {error.strerror}; name another folder") from None
    for path in files:
        check_writable(path, "results")


def evaluate(job: Job, wanted: dict[str, list[Wanted]]) -> dict[str, list[Any]]:
    """Measure videos, and return the official result: dimension -> [score, [one entry a video]].

    Args:
        job: the run.
        wanted: dimension -> the videos, by prompt.

    Raises:
        ConfigError: for a video that can't be read or measured, by name.
    """
    used = {name: _used(job, name) for name in wanted}
    found: dict[str, list[Any]] = {}
    for name, videos in wanted.items():
        job.tell(f"{name}: {sum(len(one.paths) for one in videos)} videos")
        # what was observed elsewhere may change without a file's changing, and costs nothing to look up
        scorer = _Scorer(job, name, used[name], kept=not (WAYS[name].observed and job.means.observations.has(name)))
        scores = [
            (path, scorer.score(path, partial(_measured, job, name, one.prompt)))
            for one in videos
            for path in one.paths
        ]
        said = [(path, score) for path, score in scores if score is not None]
        if not said:
            raise ConfigError(f"{name} says nothing of any of the {len(scores)} videos, so it has no score")
        if len(said) < len(scores):
            job.warn(f"{name} says nothing of {len(scores) - len(said)} of {len(scores)} videos, which don't count")
        mean = rules.over_videos([score for _, score in said]) / WAYS[name].scale
        found[name] = [
            mean, [{"video_path": str(path), "video_results": one.value, **one.more} for path, one in said]
        ]  # fmt: skip
    _write(job, wanted, found, used)
    return found


def _used(job: Job, name: str) -> dict[str, str]:
    """Return the hashes of what a dimension's scores rest on; none where observations take the networks' place."""
    if WAYS[name].observed and job.means.observations.has(name):
        return {}
    names = WAYS[name].networks
    if job.long is None:
        return job.means.networks.hashes(names)
    names += ("dinov2",) if name == SUBJECT and job.long.fast is not None else ()
    names += ("raft",) if name == FLICKERING and not job.long.filtered else ()
    return job.means.networks.hashes(names) | job.long.options_text(name)


class _Scorer:
    """Scores videos by one measure; takes those from an earlier run's lines whose file and networks haven't changed."""

    def __init__(self, job: Job, name: str, used: dict[str, str], *, kept: bool = True) -> None:
        self.job, self.name, self.used = job, name, used
        lines = read_lines(job.lines) if kept else []
        self.earlier = {self._key(line): line for line in lines if line["dimension"] == name}

    @staticmethod
    def _key(line: Line) -> str:
        return json.dumps([line[part] for part in ("video", "size", "changed", "networks")], sort_keys=True)

    def score(self, path: Path, measure: Callable[[Video], VideoScore | None]) -> VideoScore | None:
        """Return a video's score, and keep it as a line; None where the measure says nothing about it."""
        stat = path.stat()
        line: Line = {"dimension": self.name, "video": path.name, "size": stat.st_size, "changed": stat.st_mtime_ns,
                      "networks": self.used}  # fmt: skip
        before = self.earlier.get(self._key(line))
        if before is not None:
            return VideoScore(value=before["value"], parts=before["parts"], more=before["more"])
        try:
            score = measure(read_video(path))
        except ConfigError as error:
            raise ConfigError(f"{self.name} can't be measured of {path}: {error}") from None
        if score is not None:
            append_line(self.job.lines, line | {"value": score.value, "parts": score.parts, "more": score.more})
        return score


def _measured(job: Job, name: str, prompt: Prompt, video: Video) -> VideoScore | None:
    def measure(one: Video) -> VideoScore | None:
        return WAYS[name].measure(one, prompt, job.means)

    if job.long is None:
        return measure(video)
    return job.long.score(name, video, prompt.dimensions, measure, job.means.networks)


def no_filter(job: Job) -> str | None:
    """Return why the static filter of temporal flickering can't run, None if it can."""
    reason = job.means.networks.missing(("raft",))
    if reason is None:
        return None
    return (
        f"{FLICKERING} is measured of videos that stand still, which RAFT tells: {reason}; or say with --filtered that "
        "the videos have passed the filter"
    )


def filtered(job: Job, prompts: Sequence[Prompt], folder: Path) -> list[Wanted]:
    """Return the first 5 still videos of each prompt of temporal flickering, by the official static filter with RAFT.

    The first are by the order of `for_filter`, not those of the lowest numbers. Refused where none stands still.
    """
    flow = flow_by(job.means.networks)
    scorer = _Scorer(job, FILTER, job.means.networks.hashes(("raft",)))

    def stands(video: Video) -> VideoScore:
        return VideoScore(value=rules.is_static(video.frames, flow))

    kept = []
    for one in for_filter(prompts, folder):
        still: list[Path] = []
        for path in one.paths:
            score = scorer.score(path, stands) if len(still) < SAMPLES else None
            still += [path] if score is not None and score.value else []
        kept.append(Wanted(prompt=one.prompt, paths=tuple(still)))
    return _still(job, kept)


def already_filtered(job: Job, prompts: Sequence[Prompt], folder: Path) -> list[Wanted]:
    """Return up to 5 videos of each prompt of temporal flickering, which have passed a static filter before."""
    kept = []
    for prompt in served(prompts, FLICKERING):
        paths = [folder / f"{prompt.text}-{number}.mp4" for number in range(SAMPLES)]
        kept.append(Wanted(prompt=prompt, paths=tuple(path for path in paths if path.is_file())))
    return _still(job, kept)


def _still(job: Job, kept: Sequence[Wanted]) -> list[Wanted]:
    few = [one for one in kept if len(one.paths) < SAMPLES]
    found = [one for one in kept if one.paths]
    if not found:
        raise ConfigError(f"none of the videos of {FLICKERING} stands still, so it has no score; generate stiller ones")
    if few:
        none = [one.prompt.text for one in few if not one.paths]
        job.warn(
            f"{len(few)} of {len(kept)} prompts of {FLICKERING} have fewer than {SAMPLES} still videos, {len(none)} "
            f"have none{f', such as {none[0]!r}' if none else ''}"
        )
    return found


def _write(
    job: Job, wanted: dict[str, list[Wanted]], found: dict[str, list[Any]], used: dict[str, dict[str, str]]
) -> None:
    """Write the official files, and beside them what the scores rest on."""
    by = {name: () if used[name] else job.means.observations.by.get(KINDS.get(name, ""), ()) for name in found}
    about = {
        name: {"networks": used[name], "observed_by": sorted(by[name]), "videos": len(entries)}
        for name, (_, entries) in found.items()
    }
    entries = [
        {"prompt_en": one.prompt.text, "dimension": [name], "video_list": [str(path) for path in one.paths]}
        for name, videos in wanted.items()
        for one in videos
    ]
    for path, held in zip((*job.others, job.results), (entries, about, found), strict=True):
        with written_whole(path) as temporary:
            temporary.write_text(json_text(held) + "\n", encoding="utf-8")
