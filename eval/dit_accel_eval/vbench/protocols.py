"""How published code bases hold accelerated clips against dense ones: PSNR, SSIM, LPIPS and their means, by name.

Figures by two of them can't be held against each other, nor against the project's own in `metrics`; what is wrong with
each stands with every result. Sources: Sparse-VideoGen (svg/utils/metric.py; arXiv 2502.01776), TeaCache (common
metrics shared with PAB and MagCache; arXiv 2411.19108), cache-dit (metrics), FastVideo (fastvideo.eval).
"""

import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dit_accel_pipelines.generation.media import Frames, to_uint8
from torch import Tensor
from torch.nn import functional as F

from dit_accel import ConfigError

from ..metrics.perceptual import TOGETHER, lpips_maps
from ..metrics.weights import missing, tensors
from ..runs.clip_files import PICTURES, ClipFile, clips_in, paired
from .job import Job

Values = npt.NDArray[np.float64]
Measure = Callable[[Frames, Frames], Values]
"""(a clip's frames, its reference's), uint8 [F, height, width, 3] -> a number a frame."""


def _psnr(clip: Frames, reference: Frames, *, least: float = 0.0) -> Values:
    """Return 10 log10(1 / MSE) in dB, of an MSE of at least so much; infinite for equal frames where that is 0."""
    errors = np.square((clip.astype(np.float64) - reference) / 255).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.maximum(errors, least))


def _psnr_wrapped(clip: Frames, reference: Frames) -> Values:
    """Return 20 log10(255 / RMSE) in dB of 8-bit differences and squares that wrap at 256, as cache-dit has it.

    Infinite where all wrapped squares are 0, as of equal frames, but of frames that differ by 16 everywhere, too.
    """
    away = clip - reference  # uint8: wraps
    with np.errstate(divide="ignore"):
        return 20 * np.log10(255 / np.sqrt((away * away).astype(np.float64).mean(axis=(1, 2, 3))))


def _ssim(clip: Frames, reference: Frames, window: Tensor, *, padding: int = 0, sample: bool = False) -> Values:
    """Return the mean over a frame's places and colours of its structural similarity under a window of sum 1.

    ``padding`` is of zeros around, 0: only places where the window fits. Variances may be those of a sample.
    """
    kernel, found = window.expand(3, 1, *window.shape), []
    more = window.numel() / (window.numel() - 1) if sample else 1.0
    for frames in zip(clip, reference, strict=True):
        x, y = (torch.from_numpy(one.astype(np.float64) / 255).permute(2, 0, 1)[None] for one in frames)
        parts = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), kernel, padding=padding, groups=3)
        mean_x, mean_y, xx, yy, xy = parts
        var_x, var_y, both = more * (xx - mean_x**2), more * (yy - mean_y**2), more * (xy - mean_x * mean_y)
        light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        found.append(float((light * (2 * both + 0.03**2) / (var_x + var_y + 0.03**2)).mean()))
    return np.array(found)


def _box(side: int) -> Tensor:
    return torch.full((side, side), 1 / side**2, dtype=torch.float64)


def _gauss(side: int = 11, sigma: float = 1.5) -> Tensor:
    line = torch.softmax(-(torch.arange(side, dtype=torch.float64) - side // 2).square() / (2 * sigma**2), 0)
    return line[:, None] * line


@torch.inference_mode()
def _lpips(net: str, clip: Frames, reference: Frames, *, scaled: bool = True, spread: bool = False) -> Values:
    """Return LPIPS by ``alex`` or ``vgg``.

    Unless ``scaled``, values stay in [0, 1], where the network has them in [-1, 1]; with ``spread`` layers' maps are
    drawn to the frames' size before their mean is taken.
    """
    weights, found = tensors(f"lpips-{net}"), []
    for start in range(0, len(clip), TOGETHER):
        own, other = (torch.from_numpy(one[start : start + TOGETHER]) / 255 for one in (clip, reference))
        own, other = ((2 * one - 1 if scaled else one).permute(0, 3, 1, 2) for one in (own, other))
        maps = lpips_maps(own, other, weights, net)
        if spread:
            maps = [F.interpolate(one, size=clip.shape[1:3], mode="bilinear", align_corners=False) for one in maps]
        found.append(torch.stack([one.mean((1, 2, 3)) for one in maps]).sum(0))
    return torch.cat(found).double().numpy()


MEASURES: dict[str, Measure] = {
    "psnr": _psnr, "psnr_capped": partial(_psnr, least=1e-10), "psnr_wrapped": _psnr_wrapped,
    "ssim_box": partial(_ssim, window=_box(11), padding=5), "ssim_gauss": partial(_ssim, window=_gauss()),
    "ssim_gauss_padded": partial(_ssim, window=_gauss(), padding=5),
    "ssim_skimage": partial(_ssim, window=_box(7), sample=True),
    "lpips_alex": partial(_lpips, "alex"), "lpips_alex_spread": partial(_lpips, "alex", spread=True),
    "lpips_vgg_unscaled": partial(_lpips, "vgg", scaled=False),
}  # fmt: skip
"""Measures by the names of `protocols.toml`."""


def of_clips(values: Sequence[Values]) -> float:
    """Return the mean over clips of their means over frames; infinite if one is."""
    return float(np.mean([one.mean() for one in values]))


def of_batches(values: Sequence[Values], size: int = 16) -> float:
    """Return the mean over batches of their clips' means: a last batch that is short weighs as much as the others."""
    return float(np.mean([of_clips(values[at : at + size]) for at in range(0, len(values), size)]))


def of_finite_frames(values: Sequence[Values]) -> float | None:
    """Return the mean over all frames of all clips, those of infinite value left out; None where all are."""
    frames = np.concatenate(list(values))
    finite = frames[np.isfinite(frames)]
    return float(finite.mean()) if len(finite) else None


MEANS = {one.__name__: one for one in (of_clips, of_batches, of_finite_frames)}
"""Means of each clip's values by frame, clips in the order of names; None where nothing is left to take a mean of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A code base's convention.

    Attributes:
        name: what ``--protocol`` calls it.
        psnr: of `MEASURES`, as are ssim and lpips.
        average: of `MEANS`, over frames and clips.
        cut: whether the longer of two clips is cut to the shorter; else they must be as long.
        pictures_only: whether its LPIPS works for pictures alone.
        flaws: what is wrong with its figures, or only odd.
    """

    name: str
    psnr: str
    ssim: str
    lpips: str
    average: str
    cut: bool
    flaws: tuple[str, ...]
    pictures_only: bool = False


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PROTOCOLS: dict[str, Protocol] = {name: Protocol(name=name, **held) for name, held in _TABLE.items()}


def compare(job: Job, protocol: Protocol, reference: Path) -> dict[str, Any]:
    """Compare a clip or a folder of clips with what they should be, by name; writes the result and returns it.

    It has ``scores`` by the protocol, right ones ``beside`` them, what is ``left_out`` with the reason, the protocol's
    ``flaws``, and ``by_clip`` each clip's values by frame. Clips without a reference, or of another size, are refused.
    """
    job.check(f"{protocol.name}.json")
    pairs = [(one, two) for one, two in paired(clips_in(job.videos), job.videos, reference) if two is not None]
    spare = sorted({one.name for one in clips_in(reference)} - {two.name for _, two in pairs})
    if spare:
        job.warn(f"{len(spare)} references have no clip and are not looked at, such as {spare[0]!r}")
    left_out = _left_out(protocol, [one for pair in pairs for one in pair])
    scored = {name: MEASURES[getattr(protocol, name)] for name in ("psnr", "ssim", "lpips") if name not in left_out}
    beside = {"psnr-frames": MEASURES["psnr_capped"]}
    if protocol.psnr == "psnr_wrapped":
        beside["psnr@skimage"] = MEASURES["psnr"]  # cache-dit's own other one
    by_clip: list[dict[str, Any]] = []
    cut = 0
    for clip, held_against in pairs:
        one, two, fewer = _frames(protocol, clip, held_against)
        cut += fewer > 0
        values = {name: measure(one, two).tolist() for name, measure in (scored | beside).items()}
        by_clip.append({"clip": clip.name, "frames": len(one), **values})
        job.tell(f"{clip.name}, clip {len(by_clip)} of {len(pairs)}")
    if cut:
        job.warn(f"{cut} of {len(pairs)} clips were compared up to the shorter one's end, as {protocol.name} does")
    for name, reason in left_out.items():
        job.warn(f"{name} is left out: {reason}")
    means = {name: MEANS[protocol.average] for name in scored}
    means |= {"psnr-frames": of_clips, "psnr@skimage": of_finite_frames}
    figures: dict[str, float | str | None] = {}
    for name in scored | beside:
        value = means[name]([np.array(one[name]) for one in by_clip])
        figures[name] = "infinite" if value is not None and np.isinf(value) else value  # JSON has no number for it
    found = {
        "protocol": protocol.name, "videos": str(job.videos), "reference": str(reference), "clips": len(by_clip),
        "scores": {name: figures[name] for name in scored}, "beside": {name: figures[name] for name in beside},
        "left_out": left_out, "flaws": list(protocol.flaws), "by_clip": by_clip,
    }  # fmt: skip
    job.write(f"{protocol.name}.json", found)
    return found


def _left_out(protocol: Protocol, clips: list[ClipFile]) -> dict[str, str]:
    """Return why measures can't be taken, by name."""
    videos = [one.path.name for one in clips if one.path.suffix.lower() not in PICTURES]
    if protocol.pictures_only and videos:
        return {"lpips": f"{protocol.name} has LPIPS of pictures alone, and {videos[0]} is a video"}
    reason = missing(f"lpips-{protocol.lpips.split('_')[1]}")
    return {} if reason is None else {"lpips": reason}


def _frames(protocol: Protocol, clip: ClipFile, reference: ClipFile) -> tuple[Frames, Frames, int]:
    """Return a clip's frames and its reference's, as long as each other, and how many were cut off."""
    one, two = (to_uint8(file.frames()) for file in (clip, reference))
    if one.shape[1:] != two.shape[1:]:
        raise ConfigError(
            f"{clip.path} has frames of {one.shape[2]} x {one.shape[1]} pixels, its reference of {two.shape[2]} x "
            f"{two.shape[1]}; generate both at one size"
        )
    count, longest = sorted((len(one), len(two)))
    if count < longest and not protocol.cut:
        raise ConfigError(
            f"{clip.path} has {len(one)} frames, its reference {len(two)}, and {protocol.name} compares clips of one "
            "length; generate both at one length"
        )
    return one[:count], two[:count], longest - count


def rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Give a result's rows: what, the figure by the protocol, and the right one beside it."""

    def cell(value: float | str | None) -> str:
        return value if isinstance(value, str) else "none: all frames are equal" if value is None else f"{value:.4f}"

    right = list(found["beside"])[-1]
    for name, value in found["scores"].items():
        yield name, cell(value), f"{right} {cell(found['beside'][right])}" if name == "psnr" else ""
    yield from ((name, "left out", "") for name in found["left_out"])
