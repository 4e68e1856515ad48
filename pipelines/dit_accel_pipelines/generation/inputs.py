"""The files that a run starts from: which argument of the pipeline's call each is for, and what it is given there."""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.adapters import Family
from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import ConfigError
from dit_accel.estimate.sizes import pixel_multiples, rounded_frames

from .media import read_image, read_video
from .options import RunOptions
from .pipeline_call import PICTURES, CallSignature

SEVERAL = re.compile("Flux2(?!KleinI)|QwenImage(EditPlus|21)|GlmImage|BriaFibo|ZImageOmni|JoyImageEditPlus|WanVACE")
"""Pipeline classes that look at several pictures for one prompt."""

SIDE_BY_SIDE = re.compile("FluxKontextPipeline")
"""Pipeline classes that look at one picture, on which several are laid side by side."""

ONE_A_CALL = ("last_image", "mask_image", "mask", "control_image", "control_mask")
"""Arguments of one file, whatever the class."""

CONDITIONS = ("conditions", "reference_conditions")
"""Arguments of LTX that hold pictures with the frames for which they stand."""

FRAME_BY_FRAME = re.compile("WanVACE|LucyEdit|CogVideoXFunControl")
"""Pipeline classes whose output follows a video frame by frame."""

SHAPING = ("image", "images", "cond_image", "conditions", "video", "control_image", "control_video", "pose_video")
"""Arguments whose first file gives the output its shape, the first of them that there is."""

ALIKE = 0.03
"""By how much of themselves shapes may differ that look the same."""

LATENT_FRAMES = 8
"""Frames that LTX-2 makes of one frame of latents."""


@dataclass(frozen=True, slots=True)
class Input:
    """A file that a run starts from."""

    option: str  # image or video
    name: str | None  # what it is for; None: what the pipeline takes
    path: Path

    def __str__(self) -> str:
        return f"{self.name}={self.path}" if self.name else str(self.path)

    @property
    def frame(self) -> int | None:
        """Return the number of the frame that it stands for, from 0; None for what is named otherwise."""
        return int(self.name) if self.name is not None and self.name.isdecimal() else None

    def read(self) -> Any:
        """Return a picture, or a list of them."""
        return _read(self.option, self.path, self.path.stat().st_mtime_ns if self.path.is_file() else 0)


@functools.lru_cache(maxsize=4)
def _read(option: str, path: Path, changed: int) -> Any:
    """Read a file, unless it was among the last few, as before weights are loaded, and has not ``changed`` since."""
    return read_image(path) if option == "image" else read_video(path)


def inputs_of(options: RunOptions) -> list[Input]:
    """Return the files that a request starts from, in the order of its options."""
    return [_input(option, text) for option in PICTURES for text in _texts(getattr(options, option))]


def _texts(value: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(value)] if isinstance(value, (str, Path)) else [str(text) for text in value]


def _input(option: str, text: str) -> Input:
    name, sign, path = text.partition("=")
    if sign and re.fullmatch(r"\w+", name) and not Path(text).is_file():
        return Input(option, name, Path(path))
    return Input(option, None, Path(text))


def arguments_of(inputs: Sequence[Input], call: CallSignature) -> dict[str, list[Input]]:
    """Return the files for each argument of a pipeline's call; `ConfigError` for those that it does not take."""
    arguments: dict[str, list[Input]] = {}
    for file in inputs:
        argument = call.argument_of(file.option, file.name)
        if argument is None or (file.frame is not None and argument != "conditions"):
            taken = ", ".join(call.files().values())
            what = f"{file.option} {file.name!r}" if file.name else file.option
            instead = f"it takes {taken}" if taken else "leave it out"
            raise ConfigError(f"{call.name} takes no {what}, got {file}; {instead}")
        arguments.setdefault(argument, []).append(file)
    for argument, files in arguments.items():
        if len(files) > 1 and not _takes_several(call, argument, files):
            listed = ", ".join(map(str, files))
            raise ConfigError(f"{call.name} takes one {argument}, got {len(files)}: {listed}; leave all but one out")
    for later, first in (("last_image", "image"), ("mask", "video")):
        if later in arguments and call.takes(first) and first not in arguments:
            raise ConfigError(
                f"{arguments[later][0]} needs a picture or video besides, got no {first}; add {call.files()[first]}"
            )
    return arguments


def _takes_several(call: CallSignature, argument: str, files: Sequence[Input]) -> bool:
    if argument in CONDITIONS:
        return True
    classes = SEVERAL.search(call.name) or SIDE_BY_SIDE.search(call.name)
    return bool(classes) and argument not in ONE_A_CALL and all(file.option == "image" for file in files)


def read_pictures(options: RunOptions, call: CallSignature) -> dict[str, Any]:
    """Read the files that a request starts from, as the arguments of a pipeline's call."""
    read: dict[str, Any] = {}
    count = options.num_frames if FRAME_BY_FRAME.search(call.name) else None
    for argument, files in arguments_of(inputs_of(options), call).items():
        values = [file.read()[:count] if file.option == "video" else file.read() for file in files]
        several = _takes_several(call, argument, files)
        if argument in CONDITIONS:
            pairs = zip(files, values, strict=True)
            read[argument] = [_condition(call, argument, file, value, options) for file, value in pairs]
        elif several:
            read[argument] = side_by_side(values) if SIDE_BY_SIDE.search(call.name) else values
        else:
            read[argument] = _grey(values[0]) if "mask" in argument else values[0]
    if isinstance(read.get("video"), list) and not isinstance(read.get("mask", []), list):
        read["mask"] = [read["mask"]] * len(read["video"])  # one picture for all frames
    return read


def follow_inputs(options: Any, call: CallSignature, files: ModelFiles, family: Family | None) -> tuple[Any, list[str]]:
    """Check the files that a `Request` starts from, and take sizes and a length from them; also return notes.

    Raises:
        ConfigError: for a file that can't be read, or that does not fit the model or the others.
    """
    arguments = arguments_of(inputs_of(options), call)
    if "last_image" in arguments and files.index.get("expand_timesteps"):
        raise ConfigError(
            f"{files.name} starts from a first image alone, got {arguments['last_image'][0]}; leave the last out"
        )
    notes = [
        f"{call.name} looks at one picture, so {len(pictures)} are laid side by side"
        for pictures in arguments.values()
        if SIDE_BY_SIDE.search(call.name) and len(pictures) > 1
    ]
    read = {argument: [(file, file.read()) for file in inputs] for argument, inputs in arguments.items()}
    read_pictures(options, call)  # which refuses what can't go together
    if family is None:
        return options, notes
    options, length = _follow_length(options, call, family, read)
    options, shape = _follow_shape(options, call, family, read)
    return options, [*notes, *length, *shape]


Read = Mapping[str, Sequence[tuple[Input, Any]]]
"""Argument -> its files, and what they hold."""


def _follow_length(options: Any, call: CallSignature, family: Family, read: Read) -> tuple[Any, list[str]]:
    """Make as many frames as a video has that is followed frame by frame, or as the model can make of it."""
    videos = [(file, len(value)) for files in read.values() for file, value in files if isinstance(value, list)]
    if not videos or not FRAME_BY_FRAME.search(call.name) or not call.takes("num_frames"):
        return options, []
    if len({count for _, count in videos}) > 1:
        listed = ", ".join(f"{file} {count}" for file, count in videos)
        raise ConfigError(f"videos that go together need as many frames each, got {listed}; cut them alike")
    file, count = videos[0]
    made = rounded_frames(family, count if options.num_frames is None else options.num_frames)
    if options.num_frames is None:
        made -= family.vae[0] * (made > count)
        note = f"the first {made} of the {count} frames of {file.path} are taken, which the model can make"
        return dataclasses.replace(options, num_frames=made), [note] * (made != count)
    if made > count:
        raise ConfigError(f"num_frames {made} is more than {file.path} has, {count}; leave it out")
    return options, []


def _follow_shape(options: Any, call: CallSignature, family: Family, read: Read) -> tuple[Any, list[str]]:
    """Take height and width of the first picture's shape and the model's area, where neither is set."""
    shown = next((read[name][0] for name in SHAPING if name in read), None)
    if shown is None or not (call.takes("height") and call.takes("width")):
        return options, []
    file, value = shown
    across, down = (value[0] if isinstance(value, list) else value).size
    if options.height is None and options.width is None:
        height, width = _sizes(family, down / across)
        if (height, width) == (family.height, family.width):
            return options, []
        note = f"the output is {width} x {height} pixels, in the shape of {file.path}; --width and --height set others"
        return dataclasses.replace(options, height=height, width=width), [note]
    height, width = options.height or family.height, options.width or family.width
    if abs(height * across / (width * down) - 1) < ALIKE:
        return options, []
    return options, [f"{file.path} has {across} x {down} pixels, the output {width} x {height}: its shape changes"]


def _sizes(family: Family, shape: float) -> tuple[int, int]:
    """Return the height and width, in the family's multiples, of about its area; ``shape``: height over width."""
    area = family.height * family.width
    sides = math.sqrt(area * shape), math.sqrt(area / shape)
    height, width = (
        max(1, round(side / multiple)) * multiple for side, multiple in zip(sides, pixel_multiples(family), strict=True)
    )
    return height, width


def other_sizes(options: RunOptions, made: Sequence[int]) -> str:
    """Say where a pipeline made other sizes or another length, ``made`` [F, height, width, 3], than were requested."""
    requested = {"num_frames": options.num_frames, "height": options.height, "width": options.width}
    other = [
        f"{name} {count} in place of {requested[name]}"
        for name, count in zip(requested, made, strict=False)
        if requested[name] not in (None, count)
    ]
    return f"the pipeline made {', '.join(other)}" if other else ""


def _condition(call: CallSignature, argument: str, file: Input, value: Any, options: RunOptions) -> Any:
    """Return a condition of LTX: a picture or a video, and the frame from which it stands."""
    annotation = call.parameters[argument].annotation
    kind = next(part for part in typing.get_args(annotation) if dataclasses.is_dataclass(part))
    names = {field.name for field in dataclasses.fields(kind)}
    count = options.num_frames or call.default("num_frames")
    if count and (file.frame or 0) >= count:
        raise ConfigError(f"{file} is for a frame beyond the {count} of the output; count from 0 to {count - 1}")
    fields: dict[str, Any] = {"frames" if "frames" in names else file.option: value}
    if "frame_index" in names:
        fields["frame_index"] = count - 1 if file.name == "last" else file.frame or 0
    elif "index" in names:
        fields["index"] = -1 if file.name == "last" else -(-(file.frame or 0) // LATENT_FRAMES)  # counted in latents
    if options.strength is not None:
        fields["strength"] = options.strength
    return typing.cast("Any", kind)(**fields)


def _grey(value: Any) -> Any:
    return [frame.convert("L") for frame in value] if isinstance(value, list) else value.convert("L")


def side_by_side(pictures: Sequence[Any]) -> Any:
    """Return pictures side by side in one, each as high as the first."""
    from PIL import Image

    height = pictures[0].height
    scaled = [picture.resize((round(picture.width * height / picture.height), height)) for picture in pictures]
    return Image.fromarray(np.hstack([np.asarray(picture) for picture in scaled]))
