"""Measures clips in files by metrics, each against its reference where there is one: `dit-accel eval score`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dit_accel import ConfigError

from ..metrics.distances import ENOUGH, SETS, Distance
from ..metrics.metric import Sample
from ..metrics.registered import check_names, metric, scores
from ..runs.clip_files import clips_in, paired
from ..runs.results import Line
from ..vbench.prompts import prompts_by_name

CAP = (
    "which caps PSNR and the like (near 39 dB at the quality that diffusers exports) and hides small errors; compare "
    ".png or lossless .mkv"
)
"""What lossy files do to a comparison."""


def score_files(
    path: Path, references: Path | None, names: Sequence[str], *, fps: float, trained_frames: int | None = None,
    prompt: str = "", prompts: Path | None = None, warn: Callable[[str], None],
) -> Iterator[Line]:  # fmt: skip
    """Give a line for each clip, then one for all if distances between sets are requested."""
    single = check_names([name for name in names if name not in SETS])
    sets = [name for name in names if name in SETS]
    comparing = [*(name for name in single if metric(name).reference), *sets]
    if comparing and references is None:
        raise ConfigError(f"{', '.join(comparing)} compares with a reference; name clips with --reference")
    prompted = [name for name in single if metric(name).prompt]
    if prompted and prompts is None and not prompt.strip():
        raise ConfigError(f"{', '.join(prompted)} compares with the prompt; give --prompt, or --prompts FILE.json")
    distances = [Distance(name) for name in sets]
    clips = clips_in(path)
    pairs = list(paired(clips, path, references))
    said = prompts_by_name(prompts, [clip.path.name for clip in clips]) if prompts else {}
    lossy = [file.path.name for pair in pairs for file in pair if file is not None and not file.is_exact()]
    if lossy and comparing:
        warn(f"{len(lossy)} of the files are compressed with loss ({lossy[0]}), {CAP}")
    frames = 0
    for clip, reference in pairs:
        text, other = said.get(clip.path.name, prompt), reference.frames() if reference else None
        same = {"fps": fps, "trained_frames": trained_frames}
        try:
            sample = Sample(frames=clip.frames(), reference=other, prompt=text, **same)
        except ConfigError as error:
            raise ConfigError(f"{clip.path}: {error}") from None
        frames += len(sample.frames)
        for distance in distances:
            for frames_of_set, real in zip(sample.pair(), (False, True), strict=True):
                distance.add(frames_of_set, real=real)
        scored = scores(single, sample)
        line: Line = {"clip": clip.name, "reference": reference and reference.path.name, "metrics": scored.values()}
        line["by_frame"] = {name: item.by_frame for name, item in scored.measured.items() if item.by_frame is not None}
        line |= {key: text for key in ("skipped", "unavailable") if (text := getattr(scored, key))}
        yield line
    if distances:
        if frames < ENOUGH and "fid@inception" in sets:
            warn(f"fid@inception of {frames} frames is above that of many; hold it only against others of as many")
        yield {"clip": None, "frames": frames, "metrics": {distance.name: distance.value() for distance in distances}}
