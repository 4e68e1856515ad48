"""Which clip of several folders shows which prompt with which seed: by a table, by side-cars, or by names.

A clip takes what the first of these says of it. One of which neither a table nor a side-car tells the prompt is paired
with the reference's clip of its name; else its name is read as ``PROMPT-SEED``.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean
from dit_accel.files import read_text

from .clip_files import LOSSLESS, ClipFile, Form, clips_in, form_of

REFERENCE = "reference"  # what the reference's folder is called, in tables too
COLUMNS = ("folder", "file", "prompt", "seed", "seconds", "num_inference_steps")
"""Columns that a table may have; a row without a file is of all clips of its folder, one without a folder of all."""

NUMBERED = re.compile(r"(?P<prompt>.*?)[-_ ]*(?:seed)?[-_=]*(?P<seed>\d+)$")
Key = tuple[str, int | None]  # prompt and seed, None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedClip:
    """A clip of a folder, what its file holds, and what is known of its run."""

    file: ClipFile
    form: Form
    key: Key
    seconds: float | None = None
    steps: int | None = None

    @property
    def label(self) -> str:
        """Its file's path within the folder."""
        return f"{self.file.name}{self.file.path.suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder of clips by prompt and seed: the reference, a rival or an arm."""

    name: str
    path: Path
    clips: Mapping[Key, PairedClip] = field(default_factory=dict)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a table: CSV with names of `COLUMNS` in its first line."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(path, "utf-8-sig")))
        rows = [{key: value for key, value in row.items() if value not in (None, "")} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"the table {path} can't be read ({getattr(error, 'strerror', None) or error})") from None
    for name in reader.fieldnames or ():
        if name not in COLUMNS:
            raise ConfigError(f"the table {path} has a column {name!r}; {did_you_mean(name, COLUMNS)}")
    for number, row in enumerate(rows, 2):
        for key, kind in (("seed", int), ("num_inference_steps", int), ("seconds", float)):
            try:
                row |= {key: kind(row[key])} if key in row else {}
                if key == "seconds" and kind(row.get(key, 1)) <= 0:
                    raise ValueError
            except ValueError:
                raise ConfigError(f"line {number} of {path} has {key} {row[key]!r}; write a number") from None
    if not rows:
        raise ConfigError(f"the table {path} has no rows; its first line names columns: {', '.join(COLUMNS)}")
    return rows


def pair(paths: Mapping[str, Path], rows: Sequence[dict[str, Any]]) -> tuple[list[Folder], list[str]]:
    """Return the folders, of which `REFERENCE` is the first, and all that keeps clips from being compared, by line."""
    folders, problems, used = list[Folder](), list[str](), set[int]()
    names: dict[str, Key] = {}
    for name, path in paths.items():
        clips: dict[Key, list[PairedClip]] = {}
        try:
            files = clips_in(path)
        except ConfigError as error:
            problems.append(f"{name}: {error}")
            continue
        for file in files:
            try:
                clip = _paired(file, name, rows, used, names if name != REFERENCE else {})
                clips.setdefault(clip.key, []).append(clip)
            except ConfigError as error:
                problems.append(f"{name}: {error}")
        names = names or {clip.file.name: key for key, same in clips.items() for clip in same}
        for key, same in clips.items():
            if len(same) > 1:
                listed = ", ".join(clip.label for clip in same)
                problems.append(f"{name} has several clips of {words(key)}: {listed}")
        folders.append(Folder(name=name, path=path, clips={key: same[0] for key, same in clips.items()}))
    idle = [str(row) for number, row in enumerate(rows) if number not in used]
    problems += [f"rows of a table are of no clip here: {', '.join(idle)}"] if idle else []
    return folders, problems + (_differences(folders) if len(folders) == len(paths) else [])


def _side_car(path: Path) -> dict[str, Any]:
    """Return what a JSON side-car says of a clip: ``NAME.mp4.json`` or ``NAME.json``, ours or one of a plain form.

    Keys are looked for at its top, then one table further in. Seconds are those of the denoising, where ours tells.
    """
    place = next(filter(Path.is_file, (path.with_name(f"{path.name}.json"), path.with_suffix(".json"))), None)
    if place is None:
        return {}
    try:
        record = json.loads(read_text(place))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the side-car {place} can't be read ({error}); delete or mend it") from None
    tables = [table for table in (record, *getattr(record, "values", list)()) if isinstance(table, dict)]
    known = {key: table[key] for table in reversed(tables) for key in COLUMNS if table.get(key) is not None}
    if isinstance(known.get("seconds"), dict):
        known["seconds"] = known["seconds"].get("denoise")
    kinds = {"prompt": str, "seed": int, "num_inference_steps": int, "seconds": (int, float)}
    return {key: known[key] for key, kind in kinds.items() if isinstance(known.get(key), kind)}


def _paired(
    file: ClipFile, folder: str, rows: Sequence[dict[str, Any]], used: set[int], names: Mapping[str, Key]
) -> PairedClip:
    """Return a clip with what a side-car and, before that, a table's rows say of it.

    ``used`` takes the places of its rows; ``names``: name -> key of the reference's clips.
    """
    known = _side_car(file.path)
    for number, row in enumerate(rows):
        name = row.get("file", file.name)
        if row.get("folder", folder) == folder and name in (file.name, file.path.name, file.path.as_posix()):
            used.add(number)
            known |= row
    parts = NUMBERED.fullmatch(file.path.stem)
    read = (parts["prompt"] or file.path.stem, int(parts["seed"])) if parts else (file.path.stem, None)
    key = (known["prompt"], known.get("seed")) if "prompt" in known else names.get(file.name, read)
    seconds, steps = (known.get(name) for name in ("seconds", "num_inference_steps"))
    return PairedClip(file=file, form=form_of(file), key=key, seconds=seconds, steps=steps)


def words(key: Key) -> str:
    """Return a prompt and seed in words."""
    return f"{key[0]!r}" if key[1] is None else f"{key[0]!r} seed {key[1]}"


def _differences(folders: Sequence[Folder]) -> list[str]:
    """Return in what folders differ from the reference, and encodings among each other, a line each."""
    (reference, *others), problems = folders, list[str]()
    usual = next((clip.form.encoding for folder in others for clip in folder.clips.values()), LOSSLESS)
    sizes = {key: clip.form.size for key, clip in reference.clips.items()}

    def add(what: str, clips: Iterable[str]) -> None:
        listed = ", ".join(clips)
        problems.extend([f"{what}: {listed}"] if listed else [])

    def encoded(clips: Iterable[PairedClip], usual: str) -> Iterable[str]:
        return (f"{clip.label} ({clip.form.encoding})" for clip in clips if clip.form.encoding != usual)

    for folder in others:
        name, clips = folder.name, folder.clips.values()
        resized = [clip for clip in clips if sizes.get(clip.key, clip.form.size) != clip.form.size]
        sized = (f"{clip.label} ({clip.form.size}, the reference's {sizes[clip.key]})" for clip in resized)
        extra = (f"{words(clip.key)} ({clip.label})" for clip in clips if clip.key not in sizes)
        add(f"{name} lacks clips of the reference", (words(key) for key in sizes if key not in folder.clips))
        add(f"{name} has clips that the reference lacks", extra)
        add(f"{name} has clips of other sizes than the reference's (frames of height x width)", sized)
        add(f"{name} has clips that are not encoded as {others[0].name}'s first, {usual}", encoded(clips, usual))
    if {clip.form.encoding for clip in reference.clips.values()} not in ({LOSSLESS}, {usual}):
        named = encoded(reference.clips.values(), LOSSLESS)
        add(f"{REFERENCE} has clips neither {LOSSLESS} nor all encoded as {usual}", named)
    untimed = [folder.name for folder in folders if not all(clip.seconds for clip in folder.clips.values())]
    if any(clip.seconds for folder in folders for clip in folder.clips.values()):
        add("seconds are known of some clips, not of all; add --times FILE for", untimed)
    return problems
