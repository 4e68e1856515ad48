"""Published conventions by which accelerated clips were held against dense ones, as data: sizes, prompts, measures.

Figures by two of them can't be held against each other, nor against the project's own; what is wrong with each stands
with every result. Sources: Sparse-VideoGen (svg/utils/metric.py, scripts; arXiv 2502.01776), TeaCache (common metrics
shared with PAB and MagCache; arXiv 2411.19108), cache-dit (metrics, bench), FastVideo (fastvideo.eval).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from . import fidelity_rules as rules
from .fidelity_rules import Measure, Values

Average = Callable[[Sequence[Values]], float | None]
"""(each clip's values by frame, in the order of names) -> the figure; None where nothing is left to take a mean of."""

BATCH = 16
"""Clips of TeaCache's batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What tables were generated with: a word in the model's name, pixels, frames (None: a picture) and steps."""

    model: str
    height: int
    width: int
    num_frames: int | None
    num_inference_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A code base's convention.

    Attributes:
        name: what ``--protocol`` calls it.
        psnr: of frames, dB.
        ssim: of frames.
        lpips: of frames.
        lpips_net: whose weights that takes.
        average: of psnr, ssim and lpips over frames and clips.
        cut: whether the longer of two clips is cut to the shorter; else they must be as long.
        flaws: what is wrong with its figures, or only odd.
        sizes: what its tables were generated with; none: any.
        prompts: whose prompts.
        own_prompts: whether those are VBench's, which the full-info file has.
        samples: clips of each prompt.
        seed: the seed of a prompt's i-th clip: ``0`` for all, or ``i``; None: it fixes none.
        file: what the clip of prompt number ``number`` with text ``prompt`` and index ``i`` is called.
        pictures_only: whether its LPIPS works for pictures alone.
        sets: distance between the two folders that it has besides, ``fid@inception`` or ``fvd@i3d``.
    """

    name: str
    psnr: Measure
    ssim: Measure
    lpips: Measure
    lpips_net: Literal["alex", "vgg"]
    average: Average
    cut: bool
    flaws: tuple[str, ...]
    sizes: tuple[Size, ...]
    prompts: str
    own_prompts: bool
    samples: int
    seed: Literal["0", "i"] | None
    file: str
    pictures_only: bool = False
    sets: str | None = None

    def size_of(self, model: str) -> Size | None:
        """Return the size for a model of its tables, by its name; None where the protocol fixes none at all."""
        if not self.sizes:
            return None
        found = next((one for one in self.sizes if one.model in model.lower()), None)
        if found is None:
            known = ", ".join(dict.fromkeys(one.model for one in self.sizes))
            raise ConfigError(
                f"the tables of protocol {self.name} have no {model!r}, only {known}; give --height, --width, "
                "--num-inference-steps and, for videos, --num-frames"
            )
        return found

    def path(self, folder: Path, number: int, prompt: str, index: int) -> Path:
        """Return where a clip lies."""
        return folder / self.file.format(number=number, prompt=prompt, i=index)


def of_clips(values: Sequence[Values]) -> float | None:
    """Return the mean over clips of their means over frames; infinite if one is."""
    return float(np.mean([one.mean() for one in values]))


def of_batches(values: Sequence[Values], size: int = BATCH) -> float | None:
    """Return the mean over batches of their clips' means: a last batch that is short weighs as much as the others."""
    means = [of_clips(values[at : at + size]) for at in range(0, len(values), size)]
    return float(np.mean([one for one in means if one is not None]))


def of_finite_frames(values: Sequence[Values]) -> float | None:
    """Return the mean over all frames of all clips, those of infinite value left out; None where all are."""
    frames = np.concatenate(list(values))
    finite = frames[np.isfinite(frames)]
    return float(finite.mean()) if len(finite) else None


_MP4 = "clips are read from decoded mp4 files, whose coding caps PSNR (near 38.5 dB at diffusers' default quality)"

_ALL = (
    Protocol(
        name="svg", psnr=rules.psnr, ssim=rules.ssim_box, lpips=rules.lpips_vgg_unscaled, lpips_net="vgg",
        average=of_clips, cut=False,
        flaws=(
            "LPIPS gets frames in [0, 1], where its network wants [-1, 1]: it comes out lower",
            "SSIM takes a box window and zeros around the frame, not the Gaussian window of its definition",
            "one frame that equals the reference's makes the mean PSNR infinite",
            _MP4,
        ),
        sizes=(
            Size(model="wan", height=720, width=1280, num_frames=81, num_inference_steps=50),
            Size(model="hunyuan", height=720, width=1280, num_frames=129, num_inference_steps=50),
        ),
        prompts="of its own: Penguin Video Benchmark's, rewritten by VBench's rules", own_prompts=False, samples=1,
        seed="0", file="{number}-0.mp4",
    ),
    Protocol(
        name="teacache", psnr=rules.psnr_capped, ssim=rules.ssim_gauss, lpips=rules.lpips_alex_spread,
        lpips_net="alex", average=of_batches, cut=False,
        flaws=(
            f"means are taken over batches of {BATCH} clips, so that each clip of a short last batch weighs more",
            "which clips are in that batch hangs on the order in which a file system lists them; here it is by name",
            "LPIPS is the mean of maps drawn to the frames' size, not of the maps themselves",
            "its batch script resizes and crops a reference of another size; other sizes are refused here",
            _MP4,
        ),
        sizes=(
            Size(model="latte", height=512, width=512, num_frames=16, num_inference_steps=50),
            Size(model="open-sora-plan", height=512, width=512, num_frames=65, num_inference_steps=150),
        ),
        prompts="VBench's", own_prompts=True, samples=5, seed="i", file="{prompt}-{i}.mp4",
    ),
    Protocol(
        name="cache-dit", psnr=rules.psnr_wrapped, ssim=rules.ssim_skimage, lpips=rules.lpips_alex,
        lpips_net="alex", average=of_finite_frames, cut=True, pictures_only=True, sets="fid@inception",
        flaws=(
            "PSNR's 8-bit differences and squares wrap at 256: it does not fall below about 28 dB however bad a "
            "picture is; psnr@skimage is its other, right one",
            "frames that equal the reference's are left out of the mean PSNR",
            "SSIM takes scikit-image's box of 7 pixels, not the Gaussian window of its definition",
            "its LPIPS of videos fails on the frames it is given; it has one of pictures alone",
            "files whose names differ are left out without a word there; they are refused here",
            "a longer clip is cut to the shorter",
            "FID takes a video's frames for pictures, and so few of them that it comes out high",
        ),
        sizes=(Size(model="flux", height=1024, width=1024, num_frames=None, num_inference_steps=50),),
        prompts="of its own: DrawBench's 200", own_prompts=False, samples=1, seed="0", file="img_{number}.png",
    ),
    Protocol(
        name="fastvideo", psnr=rules.psnr_capped, ssim=rules.ssim_gauss_padded, lpips=rules.lpips_alex,
        lpips_net="alex", average=of_clips, cut=True, sets="fvd@i3d",
        flaws=(
            "SSIM takes zeros around the frame",
            "a longer clip is cut to the shorter",
            "clips are paired by their place where folders hold as many; here they are by name",
            _MP4,
        ),
        sizes=(), prompts="VBench's", own_prompts=True, samples=5, seed=None, file="{prompt}-{i}.mp4",
    ),
)  # fmt: skip

PROTOCOLS: dict[str, Protocol] = {one.name: one for one in _ALL}


def protocol(name: str) -> Protocol:
    """Return a protocol by name; an unknown one is refused with the nearest."""
    if name not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {name!r}; {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]
