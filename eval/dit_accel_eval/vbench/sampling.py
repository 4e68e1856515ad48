"""Which frames VBench's dimensions look at, and how those are sized for each network.

Where the official code resizes tensors it does so without antialiasing, 8-bit ones with rounding; where it resizes
pictures, Pillow's filters hold. Source: vbench 0.1.5, utils.py and the dimensions' files.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel import ConfigError

Frames = npt.NDArray[np.uint8]
"""[F, height, width, 3]."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and deviation by colour."""

SIDE = 224
"""Pixels of the short side that the networks of features and actions take."""

CAPTIONED = 384
"""Pixels of the side of what Tag2Text takes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Video:
    """A video in memory: its file's name, frames uint8 [F, height, width, 3], and frames per second."""

    name: str
    frames: Frames
    fps: float


def read_video(path: Path) -> Video:
    """Read a video file, .gif by Pillow and any other by ffmpeg.

    Raises:
        ConfigError: if it can't be read, or has no frames.
    """
    try:
        frames, fps = _gif(path) if path.suffix.lower() == ".gif" else _video(path)
    except (OSError, RuntimeError, KeyError, StopIteration) as error:
        text = getattr(error, "strerror", None) or str(error).strip()
        reason = (text.splitlines() or ["it is no video"])[-1]
        raise ConfigError(f"video {path} can't be read ({reason}); give a video file, such as .mp4") from None
    if not len(frames) or not fps > 0:
        raise ConfigError(f"video {path} has {len(frames)} frames at {fps:g} a second; give a video file, such as .mp4")
    return Video(name=path.name, frames=frames, fps=fps)


def _video(path: Path) -> tuple[Frames, float]:
    from imageio_ffmpeg import read_frames

    with path.open("rb"):
        pass  # ffmpeg has no clear error for a file that is missing
    reader = read_frames(path)
    about = next(reader)  # what the file says of itself comes first
    width, height = about["size"]
    held = [np.frombuffer(frame, np.uint8) for frame in reader]
    return np.stack(held).reshape(-1, height, width, 3) if held else np.zeros((0, 1, 1, 3), np.uint8), about["fps"]


def _gif(path: Path) -> tuple[Frames, float]:
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        pictures = [
            (np.asarray(one.convert("RGB")), one.info.get("duration", 0)) for one in ImageSequence.Iterator(image)
        ]
    lasts = float(np.mean([duration for _, duration in pictures]))
    return np.stack([picture for picture, _ in pictures]), 1000 / lasts if lasts > 0 else 0.0


def middle(total: int, count: int) -> list[int]:
    """Return the places of ``count`` frames of ``total``: the middles of as many equal stretches.

    Of fewer frames all are taken, and the last one again and again.
    """
    edges = np.linspace(0, total, min(count, total) + 1).astype(int)
    places = [int(first + end - 1) // 2 for first, end in itertools.pairwise(edges)]
    return places + [places[-1]] * (count - len(places))


def eighths(video: Video) -> Frames:
    """Return about 8 frames a second: every n-th, n the rate over 8, rounded to even, at least 1."""
    return video.frames[:: max(1, round(video.fps / 8))]


def tensor(frames: Frames) -> Tensor:
    """Return frames as float [F, 3, height, width] in 0..255."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()


def short_side(frames: Frames, side: int) -> tuple[int, int]:
    """Return the height and width with a short side of ``side`` pixels, the long one cut off to a whole number."""
    height, width = frames.shape[1:3]
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def resized(frames: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Return frames [F, 3, height, width] in another size, without antialiasing; bicubic ones go beyond 0..255."""
    return F.interpolate(frames, size=list(size), mode=mode, align_corners=False)


def centre(frames: Tensor, side: int = SIDE, to_whole: Callable[[float], int] = round) -> Tensor:
    """Return the middle square of frames, its upper left corner rounded to even, or brought to whole pixels so."""
    top, left = (to_whole((length - side) / 2) for length in frames.shape[2:])
    return frames[:, :, top : top + side, left : left + side]


def scaled(frames: Tensor, by: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Return frames in 0..255 as a network takes them: over 255, less its mean, over its deviation."""
    mean, std = (frames.new_tensor(one)[:, None, None] for one in by)
    return (frames / 255 - mean) / std


def for_dino(frames: Frames) -> Tensor:
    """Return frames with a short side of 224 pixels, bilinear, whole: [F, 3, height, width]."""
    sized = resized(tensor(frames), short_side(frames, SIDE), "bilinear")
    return scaled(sized, IMAGENET)


def for_clip(frames: Frames, *, rounded: bool = False) -> Tensor:
    """Return the middle 224 x 224 pixels of frames, bicubic: [F, 3, 224, 224].

    They may be resized as 8-bit tensors are, rounded and cut off to 0..255.
    """
    sized = resized(tensor(frames), short_side(frames, SIDE), "bicubic")
    return scaled(centre(sized.clamp(0, 255).round() if rounded else sized), CLIP)


def for_clip_pictures(frames: Frames) -> Tensor:
    """Return the middle 224 x 224 pixels of frames as Pillow resizes them, bicubic with antialiasing."""
    return scaled(centre(_pictures(frames, short_side(frames, SIDE))), CLIP)


def for_musiq(frames: Frames) -> Tensor:
    """Return frames in [0, 1] whose long side is at most 512 pixels, bilinear: [F, 3, height, width]."""
    height, width = frames.shape[1:3]
    if max(height, width) <= 512:
        return tensor(frames) / 255
    scale = 512 / max(height, width)
    return resized(tensor(frames), (int(scale * height), int(scale * width)), "bilinear") / 255


def for_umt(frames: Frames) -> Tensor:
    """Return the middle 224 x 224 pixels of frames with a short side of 256, by OpenCV's bilinear filter."""
    import cv2

    height, width = short_side(frames, 256)
    sized = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR) for frame in frames])
    return scaled(centre(tensor(sized)), IMAGENET)


def for_dinov2(frames: Frames) -> Tensor:
    """Return the middle 224 x 224 pixels of frames with a short side of 256, as 8-bit tensors are resized, bicubic."""
    sized = resized(tensor(frames), short_side(frames, 256), "bicubic")
    return scaled(centre(sized.clamp(0, 255).round()), IMAGENET)


def for_pickscore(frames: Frames) -> Tensor:
    """Return the middle 224 x 224 pixels of frames as transformers' CLIP prepares pictures, bicubic with antialiasing.

    Its corner is cut off to a whole number, where VBench's is rounded.
    """
    return scaled(centre(_pictures(frames, short_side(frames, SIDE)), to_whole=int), CLIP)


def for_hps(frames: Frames) -> Tensor:
    """Return frames whose long side is 224 pixels on black squares, bicubic with antialiasing: [F, 3, 224, 224]."""
    scale = SIDE / max(frames.shape[1:3])
    height, width = (round(length * scale) for length in frames.shape[1:3])
    down, right = SIDE - height, SIDE - width
    sized = _pictures(frames, (height, width))
    return scaled(F.pad(sized, (right // 2, right - right // 2, down // 2, down - down // 2)), CLIP)


def for_tag2text(frames: Frames) -> Tensor:
    """Return whole frames squeezed to 384 x 384 pixels, bilinear with antialiasing: [F, 3, 384, 384].

    Pillow's filter stands for ffmpeg's, by which the official reader of .mp4 files sizes frames; of .gif files it is
    the official one.
    """
    return scaled(_pictures(frames, (CAPTIONED, CAPTIONED), "BILINEAR"), IMAGENET)


def for_grit(frames: Frames, *, rounded: bool = False) -> Tensor:
    """Return whole frames, those with a short side of more than 768 pixels with one of 720: [F, 3, height, width].

    Rounded ones are resized as OpenCV does, without antialiasing, others as torchvision does now.
    """
    given, short = tensor(frames), min(frames.shape[1:3])
    if short > 768:
        height, width = (int(720 / short * length) for length in frames.shape[1:3])
        given = F.interpolate(
            given, size=[height, width], mode="bilinear", align_corners=False, antialias=not rounded
        )  # fmt: skip
        given = given.round() if rounded else given
    return scaled(given, IMAGENET)


def _pictures(frames: Frames, size: Sequence[int], by: str = "BICUBIC") -> Tensor:
    """Return frames in 0..255 as Pillow resizes them, with antialiasing: [F, 3, height, width]."""
    from PIL import Image

    shape = (size[1], size[0])
    pictures = [Image.fromarray(frame).resize(shape, Image.Resampling[by]) for frame in frames]
    return tensor(np.stack([np.asarray(picture) for picture in pictures]))
