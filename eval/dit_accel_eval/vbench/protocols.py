"""Published conventions by which accelerated clips were held against dense ones, as data: sizes, prompts, measures.

Figures by two of them can't be held against each other, nor against the project's own; what is wrong with each stands
with every result. Sources: Sparse-VideoGen (svg/utils/metric.py, scripts; arXiv 2502.01776), TeaCache (common metrics
shared with PAB and MagCache; arXiv 2411.19108), cache-dit (metrics, bench), FastVideo (fastvideo.eval).
"""

import tomllib
from collections.abc import Callable, Iterator, Sequence
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
    num_inference_steps: int
    num_frames: int | None = None


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
    file: str
    seed: Literal["0", "i"] | None = None
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


def _read() -> Iterator[Protocol]:
    """Give the protocols of the table beside this file, their measures and means by the names of functions."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    means = {one.__name__: one for one in (of_clips, of_batches, of_finite_frames)}
    for name, held in table.items():
        measures = {key: getattr(rules, held[key]) for key in ("psnr", "ssim", "lpips")}
        sizes, flaws = tuple(Size(**one) for one in held["sizes"]), tuple(held["flaws"])
        yield Protocol(
            **{**held, **measures, "name": name, "average": means[held["average"]], "sizes": sizes, "flaws": flaws}
        )


PROTOCOLS: dict[str, Protocol] = {one.name: one for one in _read()}


def protocol(name: str) -> Protocol:
    """Return a protocol by name; an unknown one is refused with the nearest."""
    if name not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {name!r}; {did_you_mean(name, PROTOCOLS)}")
    return PROTOCOLS[name]
