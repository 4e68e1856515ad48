"""Measures dimensions of VBench as vbench 0.1.5 does: a line for each video as it is measured, then the official files.

They are those of pixels alone, and those that take CLIP, which is open_clip's. Source: Huang et al., arXiv 2311.17982.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_pipelines.generation.media import Frames, read_video
from torch import Tensor
from torch.nn import functional

from dit_accel import ConfigError
from dit_accel.cli.console import warn
from dit_accel.files import held

from ..metrics.clip_scores import consistent, head_path, no_head
from ..metrics.metric import Sample
from ..metrics.motion import flickering
from ..metrics.openclip import TOGETHER, Weighted
from ..runs.loaded import file_hash
from ..runs.results import Line, append_line, read_lines
from . import dimensions as of_vbench
from .dimensions import DIMENSIONS, FLICKERING, SAMPLES, Prompt, Wanted
from .job import VideoJob, tell
from .official import prompts_path

BASE, LARGE = Weighted("ViT-B-32", tag="openai"), Weighted("ViT-L-14", tag="openai")  # VBench's CLIP models
COLORS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])  # mean, deviation
SIDE = 224  # pixels of its side


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoScore:
    """What is measured of one video."""

    value: float
    parts: int = 1
    more: dict[str, Any] = field(default_factory=dict)


def over_videos(scores: Sequence[VideoScore]) -> float:
    """Return the mean of videos' scores, each weighed by its parts."""
    return sum(score.value * score.parts for score in scores) / sum(score.parts for score in scores)


def pair_consistency(features: Tensor) -> VideoScore:
    """Return the mean over pairs of half the likeness to the frame before and half that to the first."""
    if len(features) < 2:
        raise ConfigError(f"it takes 2 frames, and there are {len(features)}")
    value, pairs = float(consistent(features).double().mean()), len(features) - 1
    return VideoScore(value=value, parts=pairs, more={"video_sim": value * pairs, "cnt_per_video": pairs})


def text_likeness(text: Tensor, frames: Tensor) -> VideoScore:
    """Return the mean cosine of a text's embedding [D] with those of frames [F, D], all of unit length."""
    cosines = (frames @ text).double().tolist()
    return VideoScore(
        value=float(np.mean(cosines)), parts=len(cosines), more={"frame_results": cosines, "cur_sim": cosines[-1]}
    )


def clip_features(by: Weighted, frames: Frames) -> Tensor:
    """Return CLIP's embeddings [F, D] of unit length of frames resized without antialiasing, bicubic."""
    from torchvision.transforms import functional as pictures

    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    pixels = pictures.resize(pixels, [SIDE], pictures.InterpolationMode.BICUBIC, antialias=False)
    pixels = pictures.normalize(pictures.center_crop(pixels, [SIDE]) / 255, *COLORS)
    network = by.embedder().network
    with torch.inference_mode():
        parts = pixels.to(next(network.parameters()).device).split(TOGETHER)
        return torch.cat([network.encode_image(part, normalize=True).float().cpu() for part in parts])


def _aesthetic(frames: Frames, prompt: Prompt) -> VideoScore:
    head = torch.load(head_path(LARGE), map_location="cpu", weights_only=True)
    scores = functional.linear(clip_features(LARGE, frames), head["weight"].float(), head["bias"].float())
    return VideoScore(value=float((scores / 10).mean()))


def _flickering(frames: Frames, prompt: Prompt) -> VideoScore:
    return VideoScore(value=flickering(Sample(frames=np.divide(frames, 255, dtype=np.float32))).value)


def _style(frames: Frames, prompt: Prompt) -> VideoScore:
    clip = BASE.embedder()
    return text_likeness(clip.text(prompt.style), clip.pictures(np.divide(frames, 255, dtype=np.float32)))


@dataclass(frozen=True, slots=True)
class Way:
    """How a dimension is measured of one video, and what it takes: a CLIP model, and the aesthetic head of one."""

    measure: Callable[[Frames, Prompt], VideoScore]
    clip: Weighted | None = None
    head: Weighted | None = None

    def missing(self) -> str | None:
        """Return why it can't be measured, with what to do; None if it can."""
        return (self.clip and self.clip.missing()) or (self.head and no_head(self.head))

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the files that it takes, by what they are."""
        files = {str(self.clip): self.clip and self.clip.path(), "aesthetic": self.head and head_path(self.head)}
        return {name: file_hash(file) for name, file in files.items() if file is not None}


WAYS: dict[str, Way] = {
    "background_consistency": Way(lambda frames, prompt: pair_consistency(clip_features(BASE, frames)), BASE),
    "temporal_flickering": Way(_flickering),
    "aesthetic_quality": Way(_aesthetic, LARGE, LARGE),
    "appearance_style": Way(_style, BASE),
}
"""Dimension -> how; the networks of the others are the official package's alone."""


LINES, RESULTS, INFO, ABOUT = "lines.jsonl", "eval_results.json", "full_info.json", "about.json"
"""Files: of lines, one a dimension and video; of official results; of what was measured; of what they rest on."""


def measure(job: VideoJob) -> dict[str, list[Any]]:
    """Measure videos, and return the official result: dimension -> [score, [one entry a video]]."""
    of_vbench.files_in(job.clips)
    wanted = _wanted(job)
    job.check_files(LINES, RESULTS, INFO, ABOUT)
    with held(job.file(LINES), "the results file"):
        results = {name: _dimension(job, name, videos) for name, videos in wanted.items()}
    about = {name: {"networks": WAYS[name].hashes(), "videos": len(entries)} for name, (_, entries) in results.items()}
    info = [{"prompt_en": prompt.text, "dimension": [name], "video_list": [*map(str, paths)]}
            for name, videos in wanted.items() for prompt, paths in videos]  # fmt: skip
    for what, content in ((INFO, info), (ABOUT, about), (RESULTS, results)):
        job.write(what, content)
    return results


def _wanted(job: VideoJob) -> dict[str, list[Wanted]]:
    """Return dimension -> its videos."""
    if job.custom:
        of_vbench.check_custom(job.dimensions)
        names = _measurable(job, [name for name in DIMENSIONS if name not in of_vbench.FIXED])
        if FLICKERING in names:
            warn(f"{FLICKERING} can't tell flicker from motion; give videos that stand still")
        return dict.fromkeys(names, of_vbench.custom_videos(job.clips, job.prompts))
    every = of_vbench.read_full_info(prompts_path(job.full_info))
    names = _measurable(job, [name for name in DIMENSIONS if any(name in prompt.dimensions for prompt in every)])
    some = every if job.subset is None else of_vbench.first_of(every, names, job.subset)
    wanted = {}
    for name in names:
        if name != FLICKERING:
            wanted[name] = of_vbench.all_videos_of(some, job.clips, name, job.samples or SAMPLES)
        else:
            wanted[name] = _still(job, of_vbench.videos_of(some, job.clips, name))
    return wanted


def _measurable(job: VideoJob, usual: Sequence[str]) -> list[str]:
    """Return the dimensions to measure: those requested, or all usual ones that can be, warning of the others."""
    still = "it is for videos that stand still; --official ENV filters them by the vbench package, or say with "
    still += "--filtered that they have passed its filter"
    names, moving = job.dimensions or usual, {} if job.filtered or job.custom else {FLICKERING: still}
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
    tell(f"{name}: {sum(len(paths) for _, paths in wanted)} videos")
    used = WAYS[name].hashes()
    earlier = {_key(line): line for line in read_lines(job.file(LINES)) if line["dimension"] == name}
    scores: list[tuple[Path, VideoScore]] = []
    for prompt, paths in wanted:
        for path in paths:
            stat = path.stat()
            line: Line = {"dimension": name, "video": path.name, "size": stat.st_size, "changed": stat.st_mtime_ns,
                          "networks": used}  # fmt: skip
            if (before := earlier.get(_key(line))) is None:
                try:
                    frames = np.stack([np.asarray(frame) for frame in read_video(path)])
                    before = line | asdict(WAYS[name].measure(frames, prompt))
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
    still = [videos for videos in wanted if videos[1]]
    few, none = sum(len(paths) < SAMPLES for _, paths in wanted), len(wanted) - len(still)
    if not still:
        raise ConfigError(f"there are no still videos of {FLICKERING}, so it has no score; generate some")
    if few:
        warn(f"{few} of {len(wanted)} prompts of {FLICKERING} have fewer than {SAMPLES} videos, {none} have none")
    return still
