"""What a suite's runs leave on disk: a line a clip and arm, typed when it is read, and if requested frames, as PNG."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.media import Frames, to_uint8
from dit_accel_pipelines.generation.solvers import BEST

from dit_accel import ConfigError
from dit_accel.files import no_space, write_text, written_whole

from ..metrics.metric import Clip

Line = dict[str, Any]
TUNED = "dense"  # name of the best dense runs of a ladder of rivals, with their steps behind; see `ladder`
AGREE = 45.0  # PSNR in dB of N and 2 N steps at which the run of 2 N steps counts as converged
ITSELF = 120.0  # the agreement in dB of a reference for which nothing was searched: `psnr` of a clip with itself
WORKS = {"work": "own work", "work_real": "work at a = .72"}  # by which arms and dense runs are made equal
TIMED = {"steps_in_time": "time"}
NUMBERS = ("psnr", "ssim", "score", *WORKS, *TIMED, "seconds", "dense_seconds")  # fields that are figures
REFERENCE = "reference"  # what stands for the arm's name in the file of a converged run
KEPT = ("kept", "kept_reference")  # keys of a line that tell where its frames and its reference's were kept
_KEY = "dit-accel"
_SHAPING = ("model", "weights", "call", "clip", "num_inference_steps", "solver", "flow_shift", "methods")
_FURTHER = ("seed", "dtype", "scheduler", "guider", "arm_call")
"""What shapes frames besides, in lines that tell it; a prompt where it has a seed, for held-out ones go by number."""


def read_lines(path: Path) -> list[Line]:
    """Return the JSON lines of a file, [] if there is none; a last line without an end was cut off, and is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ConfigError(f"{path} has a line that is not JSON ({error}); delete that line") from None


def append_line(path: Path, line: Line) -> None:
    """Append one line, whole, so that several processes may write to one file."""
    data = (json.dumps(line) + "\n").encode()
    with explained_disk_errors(path):
        handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o666)
        written = 0
        try:
            while written < len(data):  # but once, if the disk takes it
                written += os.write(handle, data[written:])
        except OSError:
            _take_off(path, data[:written])
            raise
        finally:
            os.close(handle)


def _take_off(path: Path, part: bytes) -> None:
    """Cut off what was written of a line, if nobody has written behind it; else reading reports it."""
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.seek(size - len(part))
        if file.read() == part:
            file.truncate(size - len(part))


@contextlib.contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """Say in one line that a file can't be written."""
    try:
        yield
    except OSError as error:
        raise no_space(path, error.strerror or error) from None


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by these lines, atomically."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def markdown_table(heads: str, rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table of rows under heads, which stand with `` | `` between them."""
    lines = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([f"| {heads} |", "|---" * len(heads.split(" | ")) + "|", *lines])


@dataclass(frozen=True, kw_only=True)
class ResultLine:
    """One arm's run of one clip; a number that was not measured is None, or not a number for PSNR and work."""

    arm: str
    clip: int
    num_inference_steps: int
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)  # every key as the file holds it
    psnr: float = math.nan
    work: float = math.nan
    work_real: float | None = None
    steps_in_time: float | None = None
    ssim: float | None = None
    score: float | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    dynamics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, Any] = field(default_factory=dict)
    step_work: Sequence[float] = ()
    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    repeated: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    model: str = ""
    reference: str = ""
    reference_steps: int = 0
    reference_agreement: float = ITSELF
    reference_confirmed: Mapping[str, Any] = field(default_factory=dict)
    solver: str = ""
    flow_shift: float | None = None
    methods: Mapping[str, Any] = field(default_factory=dict)
    rival: Mapping[str, Any] = field(default_factory=dict)
    attended: float = 1.0
    forwards: float | None = None
    kept: str | None = None
    kept_reference: str | None = None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "ResultLine":
        """Return the line of a JSON object; `ConfigError` for one that names no run."""
        missing = [name for name in ("arm", "clip", "num_inference_steps") if name not in raw]
        if missing:
            raise ConfigError(f"{str(raw)[:60]} is no suite's result, it lacks {', '.join(missing)}; name another file")
        return cls(raw=raw, **{name: raw[name] for name in _FIELDS if name in raw})

    @property
    def key(self) -> tuple[str, int]:
        """The arm and the clip, of which a file's last line counts."""
        return self.arm, self.clip

    @cached_property
    def is_rival(self) -> bool:
        """Whether this is a dense run that others are compared with; a suite's are named by their steps."""
        if self.of_folder:
            return self.raw["role"] == "rival"
        return self.arm in (f"{kind} {self.num_inference_steps}" for kind in (BEST, TUNED))

    @property
    def of_folder(self) -> bool:
        """Whether `eval folders` measured this of clips in files, of which the cost in blocks is not known."""
        return "role" in self.raw

    @cached_property
    def is_converged(self) -> bool:
        """Whether the reference agrees with the run of half its steps, or of twice as many."""
        return max(self.reference_agreement, self.reference_confirmed.get("agreement", -math.inf)) >= AGREE

    @cached_property
    def rival_steps(self) -> set[int]:
        """The steps of the dense runs between which the line lies: below and above its work and time."""
        amounts = [amount for key in (*WORKS, *TIMED) if (amount := self.value(key)) is not None]
        return {max(1, round_(amount)) for amount in amounts for round_ in (math.floor, math.ceil)}

    def value(self, name: str) -> float | None:
        """Return a figure by its field's or its metric's name, None where it was not measured."""
        value = getattr(self, name) if name in NUMBERS else self.metrics.get(name)
        return None if value is None or math.isnan(value) else value


_FIELDS = tuple(name for name in ResultLine.__dataclass_fields__ if name != "raw")


def result_lines(path: Path) -> list[ResultLine]:
    """Return the lines of a results file, see `read_lines`."""
    return [ResultLine.of(raw) for raw in read_lines(path)]


def last_lines(lines: Iterable[ResultLine]) -> dict[tuple[str, int], ResultLine]:
    """Return (arm, clip) -> its last line."""
    return {line.key: line for line in lines}


def frames_hash(clip: Clip | Frames) -> str:
    """Return a hash of frames as 8 bits, [F, height, width, 3], and of their shape."""
    frames = clip if clip.dtype == np.uint8 else to_uint8(clip)
    return hashlib.sha256(f"{frames.shape}".encode() + frames.tobytes()).hexdigest()[:16]


def kept_path(folder: Path, arm: str, clip: int) -> Path:
    """Return where the frames of a clip of an arm lie; names that differ in signs alone have files of their own."""
    plain = re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")[:60]
    return folder / f"clip-{clip:03d}" / f"{plain}-{hashlib.sha256(arm.encode()).hexdigest()[:6]}.png"


def run_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what shapes the frames of a result line."""
    return {"arm": line["arm"], **{key: line[key] for key in _SHAPING}, **_further(line)}


def reference_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what shapes the frames of the converged run that a result line is held against."""
    plain = {key: line[key] for key in ("model", "weights", "call", "clip", "reference")}
    plain |= {key: value for key, value in _further(line).items() if key in ("seed", "dtype", "prompt")}
    return {"arm": REFERENCE, "num_inference_steps": line["reference_steps"], **plain}


def _further(line: Mapping[str, Any]) -> dict[str, Any]:
    keys = (*_FURTHER, "prompt") if "seed" in line else _FURTHER
    return {key: line[key] for key in keys if key in line}


def keep(path: Path, clip: Clip, made_by: Mapping[str, Any]) -> None:
    """Write frames [F, height, width, 3] in [0, 1] as 8-bit PNG, whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    frames, info = to_uint8(clip), PngInfo()
    info.add_itxt(_KEY, json.dumps({"frames": len(frames), "made_by": dict(made_by)}, sort_keys=True))
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        strip = frames.reshape(-1, *frames.shape[2:])
        Image.fromarray(strip).save(temporary, format="png", pnginfo=info, optimize=True)


def keep_beside(folder: Path, beside: Path, line: Line, clip: Clip, reference: Clip) -> Line:
    """Keep the frames of a line's run, and the reference's once; returns their paths, from the result lines' folder."""
    ours, other = (kept_path(folder, name, line["clip"]) for name in (line["arm"], REFERENCE))
    keep(ours, clip, run_of(line))
    try:
        read_kept(other, reference_of(line))
    except ConfigError:  # there is none, or one of earlier weights
        keep(other, reference, reference_of(line))
    paths = {"kept": ours, "kept_reference": other}
    return {key: Path(os.path.relpath(path, beside)).as_posix() for key, path in paths.items()}


def strip_frames(strip: Frames, count: int) -> Frames:
    """Return the frames [F, height, width, 3] of a picture in which so many lie one below the other."""
    return strip.reshape(count, -1, *strip.shape[1:])


@contextlib.contextmanager
def _opened(path: Path, made_by: Mapping[str, Any]) -> Iterator[tuple[Any, int]]:
    """Give the picture of kept frames, which of a long video is large, and their number; raises as `read_kept`."""
    from PIL import Image

    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            about = json.loads(image.info[_KEY])
            origin, count = about["made_by"], about["frames"]
            for name, value in json.loads(json.dumps(dict(made_by))).items():
                if origin.get(name) != value:
                    raise ConfigError(f"{path} holds frames of {name} {origin.get(name)!r}, not {value!r}")
            yield image, count
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} holds no frames that can be read ({type(error).__name__}: {error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = most


def kept_shape(path: Path, made_by: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the number, height and width of kept frames, without reading them; raises as `read_kept`."""
    with _opened(path, made_by) as (image, count):
        return count, image.height // count, image.width


def read_kept(path: Path, made_by: Mapping[str, Any]) -> Frames:
    """Return kept frames, uint8 [F, height, width, 3]."""
    with _opened(path, made_by) as (image, count):
        return strip_frames(np.asarray(image.convert("RGB")), count)
