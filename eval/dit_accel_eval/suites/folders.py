"""Measures clips that any engine wrote against their reference: lines of the form that `eval run` writes.

Cost is time alone, in steps of the reference: its own number of steps times the share of its seconds. Where clips are
encoded with loss, the metric `FLOOR` tells how near the reference itself stays once it is encoded as they are.
"""

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.progress import Stages

from dit_accel.files import held

from ..metrics.metric import Sample
from ..protocol import PROTOCOL
from ..runs.conditions import processor_name
from ..runs.encodings import Encoder, encoder_like
from ..runs.pairing import Folder, Key, PairedClip
from ..runs.results import ITSELF, KEPT, Line, append_line, keep_beside, result_lines, write_lines
from ..runs.results import frames_hash as hash_of
from .measuring import ALWAYS, encoding_alone, measured

UNKNOWN = "unknown"


def measure_folders(
    folders: Sequence[Folder], rivals: Sequence[str], out: Path, *, frames: bool, quiet: bool, **same: Any
) -> None:
    """Write the lines of `folder_lines`, each as it is measured, and beside them where requested their frames."""
    with held(out, "the results file"), Stages(quiet=quiet) as stages:
        known, lines = {line.key: line.raw for line in result_lines(out)}, list[Line]()
        stages.stage("measuring clips", sum(len(folder.clips) for folder in folders[1:]))
        for line, clip, reference in folder_lines(folders, rivals, known, **same):
            if frames and not all((out.parent / line.get(key, "")).is_file() for key in KEPT):
                shown = clip.file.frames(), reference.file.frames()
                line |= keep_beside(out.with_suffix(".frames"), out.parent, line, *shown)
            if line != known.get((line["arm"], line["clip"])):
                append_line(out, line)
            lines.append(line)
            stages.advance()
        write_lines(out, lines)


def folder_lines(
    folders: Sequence[Folder], rivals: Sequence[str], known: Mapping[tuple[str, int], Line], *, suite: str, model: str,
    metrics: Sequence[str], fps: float,
) -> Iterator[tuple[Line, PairedClip, PairedClip]]:  # fmt: skip
    """Give a line for each clip of each folder but the first, the reference's, with both clips.

    Args:
        rivals: names of the folders that others are held against.
        known: lines of an earlier call, which are given again where nothing of theirs has changed.
    """
    reference, *others = folders
    hashes = {key: hash_of(clip.file.levels()) for key, clip in reference.clips.items()}
    together = hashlib.sha256("".join(f"{key}{hashes[key]}" for key in sorted(hashes, key=str)).encode()).hexdigest()
    first = next(iter(reference.clips.values())).form
    same = {
        "suite": suite, "model": model, "weights": UNKNOWN, "solver": UNKNOWN, "flow_shift": None, "methods": {},
        "call": {"num_frames": first.frames, "height": first.height, "width": first.width},
        "reference": f"clips {together[:12]}", "reference_agreement": ITSELF, "protocol": PROTOCOL,
        "python": platform.python_version(), "dit_accel": version("dit-accel"), "measured_on": processor_name(),
    }  # fmt: skip
    encoders = {folder.name: _encoder(folder, reference) for folder in others}
    for folder in others:
        for number, key in enumerate(sorted(reference.clips, key=str)):
            clip, other = folder.clips[key], reference.clips[key]
            line: Line = {"arm": folder.name, "clip": number, "role": "rival" if folder.name in rivals else "arm",
                          "prompt": key[0], **same, **_times(clip, other)}  # fmt: skip
            line |= {"seed": key[1]} if key[1] is not None else {}
            line |= {"folder": str(folder.path), "file": clip.file.path.name, "encoding": clip.form.encoding,
                     "lossy": not clip.form.exact}  # fmt: skip
            line |= {"frames_hash": hash_of(clip.file.levels()), "reference_hash": hashes[key]}
            before = known.get((folder.name, number), {})
            wanted = {*metrics} - {*ALWAYS, *before.get("skipped", ()), *before.get("unavailable", ())}
            if all(before.get(name) == value for name, value in line.items()) and wanted <= {
                *before.get("metrics", ())
            }:
                line = dict(before)
            else:
                line |= _measured(clip, other, encoders[folder.name], metrics, fps)
            yield line, clip, other


def _times(clip: PairedClip, reference: PairedClip) -> Line:
    """Return steps, and where they are known seconds and how many of the reference's steps take as long."""
    whole = reference.steps or 1
    line: Line = {"num_inference_steps": clip.steps or 0, "reference_steps": whole}
    if clip.seconds is not None and reference.seconds is not None:
        line |= {"seconds": clip.seconds, "dense_seconds": reference.seconds}
        line |= {"steps_in_time": whole * clip.seconds / reference.seconds}
    return line


def _encoder(folder: Folder, reference: Folder) -> Encoder | None:
    """Return what encodes as a folder's clips are, None where they are lossless or it can't be had."""
    key: Key = min(folder.clips, key=str)
    clip = folder.clips[key]
    return None if clip.form.exact else encoder_like(clip.file, clip.form, reference.clips[key].file.levels())


def _measured(
    clip: PairedClip, reference: PairedClip, encoder: Encoder | None, metrics: Sequence[str], fps: float
) -> Line:
    """Return the metrics of a clip, and how near its reference stays to itself once it is encoded as the clip is."""
    sample = Sample(frames=clip.file.frames(), reference=reference.file.frames(), prompt=clip.key[0], fps=fps)
    line = measured(sample, metrics)
    if encoder:
        _, frames = sample.pair()
        line |= encoding_alone(encoder, frames, line)
    return line
