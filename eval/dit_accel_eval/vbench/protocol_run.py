"""Holds a folder of clips against a reference folder by a published protocol: `dit-accel eval vbench --protocol`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel import ConfigError
from dit_accel.files import json_text, written_whole

from ..metrics.weights import missing
from ..runs.clip_files import PICTURES, ClipFile, clips_in, paired
from . import fidelity_rules as rules
from .fidelity_rules import Measure
from .networks.loading import I3D_LEAST, Networks
from .protocols import Protocol, of_clips, of_finite_frames
from .run import check_results
from .sampling import Frames

FEW = {"fid@inception": (2048, "frames"), "fvd@i3d": (256, "clips")}
"""Distance -> how many of what it takes to mean something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A clip or a folder of clips and what they should be, by the same names, and where the result goes.

    The networks are for distances between the two folders.
    """

    protocol: Protocol
    videos: Path
    reference: Path
    output: Path
    name: str
    networks: Networks
    warn: Callable[[str], None]
    tell: Callable[[str], None]

    @property
    def result(self) -> Path:
        """The file of the result."""
        return self.output / f"{self.name}_{self.protocol.name}.json"


def frechet(one: Tensor, two: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features [n, d] and [m, d], two or more each."""
    means = (one.double().mean(0) - two.double().mean(0)).square().sum()
    first, second = ((x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (one, two))
    root = torch.linalg.svdvals(first @ second.T).sum()
    return float((means + first.square().sum() + second.square().sum() - 2 * root).clamp(min=0))


@dataclass(slots=True)
class _Sets:
    """The features of the two folders' frames or clips; with a reason why there are none."""

    reason: str | None
    own: list[Tensor] = field(default_factory=list)
    others: list[Tensor] = field(default_factory=list)

    def distance(self) -> float | None:
        """Return Frechet's distance; None, and a reason, where there is none."""
        count = sum(map(len, self.own))
        if self.reason is None and count < 2:
            self.reason = f"it takes 2 of each folder, and there is {count}"
        return frechet(torch.cat(self.own), torch.cat(self.others)) if self.reason is None else None


def compare(job: Comparison) -> dict[str, Any]:
    """Compare clips, write the result and return it.

    Returns:
        ``scores``: psnr, ssim, lpips and a distance of sets, by the protocol; ``beside``: right figures beside wrong
        ones; ``left_out``: what is not there, with the reason; ``flaws``: what is wrong with the protocol's figures;
        ``by_clip``: each clip's values by frame.

    Raises:
        ConfigError: for folders without clips, a clip without its reference, or clips that can't be compared.
    """
    check_results(job.output, job.result)
    pairs = _pairs(job)
    measures, left_out = _measures(job.protocol, pairs)
    kind = job.protocol.sets
    sets = _Sets(reason=None if kind is None else job.networks.missing((kind.partition("@")[2],)))
    by_clip, cut = [], 0
    for clip, reference in pairs:
        one, two, fewer = _frames(job.protocol, clip, reference)
        cut += fewer > 0
        values = {name: measure(one, two).tolist() for name, measure in measures.items()}
        by_clip.append({"clip": clip.name, "frames": len(one), **values})
        _see(job, sets, one, two)
        job.tell(f"{clip.name}, clip {len(by_clip)} of {len(pairs)}")
    if cut:
        job.warn(f"{cut} of {len(pairs)} clips were compared up to the shorter one's end, as {job.protocol.name} does")
    found = _result(job, by_clip, left_out, sets)
    with written_whole(job.result) as temporary:
        temporary.write_text(json_text(found) + "\n", encoding="utf-8")
    return found


def _pairs(job: Comparison) -> list[tuple[ClipFile, ClipFile]]:
    """Return clips with their references, by name; tell of references that have no clip."""
    clips = clips_in(job.videos)
    pairs = [(one, two) for one, two in paired(clips, job.videos, job.reference) if two is not None]
    spare = sorted({one.name for one in clips_in(job.reference)} - {two.name for _, two in pairs})
    if spare:
        job.warn(f"{len(spare)} references have no clip and are not looked at, such as {spare[0]!r}")
    return pairs


def _measures(
    protocol: Protocol, pairs: Sequence[tuple[ClipFile, ClipFile]]
) -> tuple[dict[str, Measure], dict[str, str]]:
    """Return the measures that can be taken, and why others can't."""
    measures: dict[str, Measure] = {"psnr": protocol.psnr, "ssim": protocol.ssim, "lpips": protocol.lpips}
    reason = missing(f"lpips-{protocol.lpips_net}")
    videos = [clip for pair in pairs for clip in pair if clip.path.suffix.lower() not in PICTURES]
    if protocol.pictures_only and videos:
        reason = f"{protocol.name} has LPIPS of pictures alone, and {videos[0].path.name} is a video"
    if reason is not None:
        del measures["lpips"]
    measures |= {"psnr-frames": rules.psnr_capped}
    if protocol.psnr is rules.psnr_wrapped:
        measures |= {"psnr@skimage": rules.psnr}
    return measures, {} if reason is None else {"lpips": reason}


def _frames(protocol: Protocol, clip: ClipFile, reference: ClipFile) -> tuple[Frames, Frames, int]:
    """Return a clip's frames and its reference's, as long as each other, and how many were cut off."""
    one, two = (np.rint(file.frames() * 255).astype(np.uint8) for file in (clip, reference))
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


def _see(job: Comparison, sets: _Sets, one: Frames, two: Frames) -> None:
    """Keep the features of a pair of clips for the distance of sets."""
    if job.protocol.sets is None or sets.reason is not None:
        return
    if job.protocol.sets == "fvd@i3d" and len(one) < I3D_LEAST:
        sets.reason = f"I3D takes clips of {I3D_LEAST} frames and more, and one has {len(one)}"
        return
    ask = job.networks.i3d if job.protocol.sets == "fvd@i3d" else job.networks.inception
    sets.own.append(ask(one))
    sets.others.append(ask(two))


def _result(job: Comparison, by_clip: list[dict[str, Any]], left_out: dict[str, str], sets: _Sets) -> dict[str, Any]:
    protocol = job.protocol
    scores: dict[str, float | str | None] = {
        name: _mean(protocol, by_clip, name) for name in ("psnr", "ssim", "lpips") if name in by_clip[0]
    }
    beside: dict[str, float | None] = {"psnr-frames": of_clips([np.array(one["psnr-frames"]) for one in by_clip])}
    if "psnr@skimage" in by_clip[0]:
        beside["psnr@skimage"] = of_finite_frames([np.array(one["psnr@skimage"]) for one in by_clip])
    if protocol.sets is not None:
        distance, count, (least, what) = sets.distance(), sum(map(len, sets.own)), FEW[protocol.sets]
        if distance is None:
            left_out = left_out | {protocol.sets: str(sets.reason)}
        else:
            scores[protocol.sets] = distance
            if count < least:
                job.warn(f"{protocol.sets} of {count} {what} is far above that of many; it takes {least} and more")
    for name, reason in left_out.items():
        job.warn(f"{name} is left out: {reason}")
    return {
        "protocol": protocol.name, "videos": str(job.videos), "reference": str(job.reference), "clips": len(by_clip),
        "scores": scores, "beside": beside, "left_out": left_out, "flaws": list(protocol.flaws), "by_clip": by_clip,
    }  # fmt: skip


def _mean(protocol: Protocol, by_clip: Sequence[dict[str, Any]], name: str) -> float | str | None:
    """Return a figure; as a word where it is infinite, for which JSON has no number."""
    found = protocol.average([np.array(one[name]) for one in by_clip])
    return "infinite" if found is not None and np.isinf(found) else found


def rows(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Give a result's rows: what, the figure by the protocol, and the right one beside it."""
    beside = found["beside"]
    for name, value in found["scores"].items():
        right = "psnr@skimage" if "psnr@skimage" in beside else "psnr-frames"
        yield name, _cell_text(value), f"{right} {_cell_text(beside[right])}" if name == "psnr" else ""
    for name in found["left_out"]:
        yield name, "left out", ""


def _cell_text(value: float | str | None) -> str:
    if value is None:
        return "none: all frames are equal"
    return value if isinstance(value, str) else f"{value:.4f}"
