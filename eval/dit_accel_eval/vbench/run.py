"""Measures dimensions of videos: a line each as it is measured, then the official result files."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.media import read_video

from dit_accel import ConfigError
from dit_accel.cli.console import warn
from dit_accel.files import held

from ..runs.results import Line, append_line, read_lines
from . import prompts as of_prompts
from .dimensions import DIMENSIONS
from .job import VideoJob, tell
from .measures import WAYS, VideoScore, over_videos
from .official import prompts_path
from .prompts import FLICKERING, SAMPLES, Wanted

LINES, RESULTS, INFO, ABOUT = "lines.jsonl", "eval_results.json", "full_info.json", "about.json"
"""Files: of lines, one a dimension and video; of official results; of what was measured; of what they rest on."""

UNFILTERED = (
    "it is for videos that stand still; --official ENV filters them by the vbench package, or say with --filtered that "
    "they have passed its filter"
)


def measure(job: VideoJob) -> dict[str, list[Any]]:
    """Measure videos, and return the official result: dimension -> [score, [one entry a video]]."""
    of_prompts.files_in(job.clips)
    wanted = _wanted(job)
    job.check_files(LINES, RESULTS, INFO, ABOUT)
    with held(job.file(LINES), "the results file"):
        results = {name: _dimension(job, name, videos) for name, videos in wanted.items()}
    about = {name: {"networks": WAYS[name].hashes(), "videos": len(entries)} for name, (_, entries) in results.items()}
    info = [{"prompt_en": item.prompt.text, "dimension": [name], "video_list": [str(path) for path in item.paths]}
            for name, videos in wanted.items() for item in videos]  # fmt: skip
    for what, content in ((INFO, info), (ABOUT, about), (RESULTS, results)):
        job.write(what, content)
    return results


def _wanted(job: VideoJob) -> dict[str, list[Wanted]]:
    """Return dimension -> its videos."""
    if job.custom:
        of_prompts.check_custom(job.dimensions)
        names = _measurable(job, [name for name in DIMENSIONS if name not in of_prompts.FIXED])
        if FLICKERING in names:
            warn(f"{FLICKERING} can't tell flicker from motion; give videos that stand still")
        return dict.fromkeys(names, of_prompts.custom_videos(job.clips, job.prompts))
    every = of_prompts.read_full_info(prompts_path(job.full_info))
    names = _measurable(job, [name for name in DIMENSIONS if any(name in prompt.dimensions for prompt in every)])
    some = every if job.subset is None else of_prompts.first_of(every, names, job.subset)
    wanted = {}
    for name in names:
        if name != FLICKERING:
            wanted[name] = of_prompts.all_videos_of(some, job.clips, name, job.samples or SAMPLES)
        else:
            wanted[name] = _still(job, of_prompts.videos_of(some, job.clips, name))
    return wanted


def _measurable(job: VideoJob, usual: Sequence[str]) -> list[str]:
    """Return the dimensions to measure: those requested, or all usual ones that can be, warning of the others."""
    names, moving = job.dimensions or usual, {} if job.filtered or job.custom else {FLICKERING: UNFILTERED}
    known = [name for name in names if name in WAYS]
    reasons = {name: reason for name in known if (reason := moving.get(name) or WAYS[name].missing())}
    elsewhere = [name for name in names if name not in WAYS]
    texts = [f"{name} can't be measured: {reason}" for name, reason in reasons.items()]
    if elsewhere:
        texts += [f"{', '.join(elsewhere)} can't be measured here; --official ENV measures them by the vbench package"]
    if texts and (job.dimensions or len(reasons) + len(elsewhere) == len(names)):
        raise ConfigError("; ".join(texts))
    for text in texts:
        warn(text)
    return [name for name in known if name not in reasons]


def _dimension(job: VideoJob, name: str, wanted: Sequence[Wanted]) -> list[Any]:
    """Measure one dimension; returns its official result."""
    tell(f"{name}: {sum(len(videos.paths) for videos in wanted)} videos")
    used = WAYS[name].hashes()
    earlier = {_key(line): line for line in read_lines(job.file(LINES)) if line["dimension"] == name}
    scores: list[tuple[Path, VideoScore]] = []
    for videos in wanted:
        for path in videos.paths:
            stat = path.stat()
            line: Line = {"dimension": name, "video": path.name, "size": stat.st_size, "changed": stat.st_mtime_ns,
                          "networks": used}  # fmt: skip
            if (before := earlier.get(_key(line))) is None:
                try:
                    frames = np.stack([np.asarray(frame) for frame in read_video(path)])
                    before = line | asdict(WAYS[name].measure(frames, videos.prompt))
                except ConfigError as error:
                    raise ConfigError(f"{name} can't be measured of {path}: {error}") from None
                append_line(job.file(LINES), before)
            scores.append((path, VideoScore(value=before["value"], parts=before["parts"], more=before["more"])))
    entries = [{"video_path": str(path), "video_results": score.value, **score.more} for path, score in scores]
    return [over_videos([score for _, score in scores]), entries]


def _key(line: Line) -> str:
    return json.dumps([line[part] for part in ("video", "size", "changed", "networks")], sort_keys=True)


def _still(job: VideoJob, wanted: Sequence[Wanted]) -> list[Wanted]:
    """Return the prompts that have still videos; warns of those with fewer than 5, and refuses where there is none."""
    still = [videos for videos in wanted if videos.paths]
    few, none = sum(len(videos.paths) < SAMPLES for videos in wanted), len(wanted) - len(still)
    if not still:
        raise ConfigError(f"there are no still videos of {FLICKERING}, so it has no score; generate some")
    if few:
        warn(f"{few} of {len(wanted)} prompts of {FLICKERING} have fewer than {SAMPLES} videos, {none} have none")
    return still
