"""The dimensions of VBench that are measured here, from a video's frames to its score, as vbench 0.1.5 computes them.

They are those of pixels alone, and those that take CLIP, which is open_clip's. Source: Huang et al., arXiv 2311.17982.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from dit_accel_pipelines.generation.media import Frames
from torch import Tensor
from torch.nn import functional

from dit_accel import ConfigError

from ..metrics.clip_scores import head_path, no_head
from ..metrics.openclip import TOGETHER, Weighted
from ..runs.loaded import file_hash
from .prompts import Prompt

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


def _check_pairs(frames: int) -> None:
    if frames < 2:
        raise ConfigError(f"it takes at least 2 frames, and there are {frames}")


def pair_consistency(features: Tensor) -> VideoScore:
    """Return the mean over pairs of half the likeness to the frame before and half that to the first."""
    _check_pairs(len(features))
    before = (features[1:] * features[:-1]).sum(1).clamp(min=0)
    first = (features[1:] * features[0]).sum(1).clamp(min=0)
    value, pairs = float(((before + first) / 2).double().mean()), len(features) - 1
    return VideoScore(value=value, parts=pairs, more={"video_sim": value * pairs, "cnt_per_video": pairs})


def frame_flickering(frames: Frames) -> VideoScore:
    """Return one minus the mean absolute difference of neighbouring 8-bit frames over 255."""
    _check_pairs(len(frames))
    levels = frames.astype(np.int16)
    changes = [float(np.abs(second - first).mean()) for first, second in itertools.pairwise(levels)]
    return VideoScore(value=(255 - float(np.mean(changes))) / 255)


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


def _style(frames: Frames, prompt: Prompt) -> VideoScore:
    """Return the mean cosine of the style's embedding with those of the frames, all of unit length."""
    clip = BASE.embedder()
    text, pictures = clip.text(prompt.style), clip.pictures(np.divide(frames, 255, dtype=np.float32))
    cosines = (pictures @ text).double().tolist()
    more = {"frame_results": cosines, "cur_sim": cosines[-1]}
    return VideoScore(value=float(np.mean(cosines)), parts=len(cosines), more=more)


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
    "temporal_flickering": Way(lambda frames, prompt: frame_flickering(frames)),
    "aesthetic_quality": Way(_aesthetic, LARGE, LARGE),
    "appearance_style": Way(_style, BASE),
}
"""Dimension -> how; the networks of the others are the official package's alone."""
