"""Measures clips in files, whatever wrote them: `eval folders` by lines as `eval run` writes, and `eval score`.

Of folders, cost is time alone, in steps of the reference: its own number of steps times the share of its seconds.
Where clips are encoded with loss, the metric `FLOOR` tells how near the reference itself stays once it is encoded as
they are.
"""

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from dit_accel_pipelines.generation.progress import Stages

from dit_accel import ConfigError
from dit_accel.files import held

from ..metrics.metric import Sample
from ..metrics.perceptual import ENOUGH, SETS, Distance
from ..metrics.registered import check_names, metric, scores, unavailable
from ..protocol import PROTOCOL
from ..runs.clip_files import clips_in, encoder_like, paired
from ..runs.loaded import processor_name
from ..runs.pairing import Folder, Key, PairedClip
from ..runs.results import ITSELF, KEPT, Line, append_line, frames_hash, keep_beside, result_lines, write_lines
from ..vbench.dimensions import prompts_by_name
from .measuring import ALWAYS, encoding_alone, measured_line


def measure_folders(
    folders: Sequence[Folder], rivals: Sequence[str], out: Path, *, model: str, metrics: Sequence[str], fps: float,
    frames: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write a line for each clip of each folder but the first, the reference's, as it is measured.

    What a line of an earlier call says is taken where neither its clips nor what is known of them have changed.
    Others are held against the folders that ``rivals`` names; ``frames`` keeps clips beside the lines, for the page.
    """
    reference, *others = folders
    total = sum(len(folder.clips) for folder in folders)
    with held(out, "the results file"), Stages(quiet=quiet) as stages:
        known, lines, hashes = {line.key: line.raw for line in result_lines(out)}, list[Line](), dict[Key, str]()
        stages.stage("measuring clips", total)
        for key in sorted(reference.clips, key=str):
            shape = (levels := reference.clips[key].file.levels()).shape
            hashes[key] = frames_hash(levels)
            stages.advance()
        same = {"suite": out.stem, "model": model, **_about(hashes, shape)}
        for folder in others:
            clip = folder.clips[(first := next(iter(hashes)))]
            encoder = encoder_like(clip.file, clip.form, reference.clips[first].file.levels())
            role = "rival" if folder.name in rivals else "arm"
            for number, key in enumerate(hashes):
                clip, other = folder.clips[key], reference.clips[key]
                levels = clip.file.levels()
                line: Line = {"arm": folder.name, "clip": number, "role": role, **same, **_of_clip(clip, other)}
                line |= {"folder": str(folder.path), "frames_hash": frames_hash(levels), "reference_hash": hashes[key]}
                before = known.get((folder.name, number), {})
                seen = {*ALWAYS, *before.get("metrics", ()), *before.get("skipped", ()), *unavailable(metrics)}
                shown = (np.divide(levels, 255, dtype=np.float32), other.file.frames())
                if {*metrics} <= seen and all(before.get(name) == value for name, value in line.items()):
                    line = dict(before)
                else:
                    sample = Sample(frames=shown[0], reference=shown[1], prompt=key[0], fps=fps)
                    line |= measured_line(sample, metrics)
                    line |= encoding_alone(encoder, shown[1], line) if encoder else {}
                if frames and not all((out.parent / line.get(name, "")).is_file() for name in KEPT):
                    line |= keep_beside(out.with_suffix(".frames"), out.parent, line, *shown)
                if line != before:
                    append_line(out, line)
                lines.append(line)
                stages.advance()
        write_lines(out, lines)


def _about(hashes: Mapping[Key, str], shape: Sequence[int]) -> Line:
    """Return what all lines share: the reference's identity and size, versions, and where clips were measured."""
    together = hashlib.sha256("".join(f"{key}{value}" for key, value in hashes.items()).encode()).hexdigest()
    return {
        "weights": "unknown", "solver": "unknown", "flow_shift": None, "methods": {},
        "call": dict(zip(("num_frames", "height", "width"), shape, strict=False)),
        "reference": f"clips {together[:12]}", "reference_agreement": ITSELF, "protocol": PROTOCOL,
        "python": platform.python_version(), "dit_accel": version("dit-accel"), "measured_on": processor_name(),
    }  # fmt: skip


def _of_clip(clip: PairedClip, reference: PairedClip) -> Line:
    """Return what a clip shows, its steps, and where seconds are known how many of the reference's take as long."""
    whole = reference.steps or 1
    line: Line = {"prompt": clip.key[0], **({} if clip.key[1] is None else {"seed": clip.key[1]}), "file": clip.label}
    line |= {"encoding": clip.form.encoding, "num_inference_steps": clip.steps or 0, "reference_steps": whole}
    if clip.seconds and reference.seconds:
        line |= {"seconds": clip.seconds, "dense_seconds": reference.seconds}
        line |= {"steps_in_time": whole * clip.seconds / reference.seconds}
    return line


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
        caps = "which caps PSNR and the like (near 39 dB at the quality that diffusers exports) and hides small errors"
        warn(f"{len(lossy)} of the files are compressed with loss ({lossy[0]}), {caps}; compare .png or lossless .mkv")
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
