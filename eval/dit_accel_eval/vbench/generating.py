"""Generates VBench's videos: all prompts of the dimensions asked for, several seeds each; goes on where it stopped.

The cost is printed first. Several processes, on as many devices, share the work by ``--shard``.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.generate import opened
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import (
    EMBEDDED,
    Request,
    check_words,
    embedded_name,
    read_prompts,
    settle,
    side_car_path,
)

from dit_accel import ConfigError
from dit_accel.adapters import installed
from dit_accel.estimate.estimate import estimate
from dit_accel.files import held

from .prompts import FILTERED_SAMPLES, FLICKERING, SAMPLES, Prompt
from .protocols import Protocol

SIZES = ("num_frames", "height", "width", "num_inference_steps")

AUGMENTED_APART = 100_000
"""Between the seeds of two augmented prompts' first videos."""

LONGEST_NAME = 249
"""Bytes that a video's name may have, so that its side-car and its lock have names, too."""

ASKED = (*SIZES, "guidance_scale", "solver")
"""What of a request an earlier video must have been made with, where it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One video to be made: its prompt, where it goes, and the seed of its noise, another for each video."""

    prompt: str
    path: Path
    seed: int


def pieces(
    every: Sequence[Prompt], wanted: Sequence[Prompt], names: Sequence[str], folder: Path, samples: int | None,
    seed: int, augmented: Sequence[str] = (),
) -> list[Piece]:  # fmt: skip
    """Return the videos of wanted prompts: so many samples, else 5 of each, and 25 for the static filter's dimension.

    A video's seed does not depend on which of all prompts are wanted; the first prompt's first one has ``seed``. Where
    there are augmented prompts, one for each of ``every``, the model is given those, and video j of prompt i has seed
    100000 i + j: so VBench's leaderboard made its row of Wan 2.1 14B (github.com/Vchitect/VBench/issues/163).
    """
    texts = [one.text for one in every]
    order = texts if augmented else list(dict.fromkeys(texts))
    apart = AUGMENTED_APART if augmented else max(FILTERED_SAMPLES, samples or 0)
    found = []
    for one in wanted:
        count = FILTERED_SAMPLES if FLICKERING in one.dimensions and FLICKERING in names else SAMPLES
        paths = [clip_path(folder, one.text, number) for number in range(samples or count)]
        place = order.index(one.text)
        found += _seeded(augmented[place] if augmented else one.text, paths, seed + apart * place)
    return found


def read_augmented(path: Path, every: Sequence[Prompt]) -> tuple[str, ...]:
    """Return a file's prompts, a line for each of VBench's in their order; another number of lines is refused."""
    found = read_texts(path, "--augmented")
    if len(found) != len(every):
        raise ConfigError(
            f"{path} has {len(found)} augmented prompts, and VBench {len(every)}; give a line for each, in order, "
            "such as VBench's repository has them in prompts/augmented_prompts"
        )
    return found


def read_texts(path: Path, option: str) -> tuple[str, ...]:
    """Return a text file's prompts, a line each; errors call the file by the option that named it."""
    try:
        return read_prompts(path)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--prompt-file", option)) from None


def own_pieces(texts: Sequence[str], folder: Path, samples: int | None, seed: int) -> list[Piece]:
    """Return the videos ``{prompt}-{i}.mp4`` of prompts of one's own, 5 of each or so many, each of another seed."""
    count, found = samples or SAMPLES, []
    for number, text in enumerate(dict.fromkeys(texts)):
        paths = [clip_path(folder, text, place) for place in range(count)]
        found += _seeded(text, paths, seed + number * count)
    return found


def clip_path(folder: Path, prompt: str, number: int) -> Path:
    """Return where a prompt's video lies; a prompt that can't be a file's name is refused."""
    name = f"{prompt}-{number}.mp4"
    if "/" in prompt or len(name.encode()) > LONGEST_NAME:
        why = "it holds a slash" if "/" in prompt else f"it has more than {LONGEST_NAME} bytes"
        raise ConfigError(f"{prompt[:60]!r} can't be the name of a video, since {why}; put it in other words")
    return folder / name


def _seeded(prompt: str, paths: Sequence[Path], first: int) -> list[Piece]:
    return [Piece(prompt=prompt, path=path, seed=first + number) for number, path in enumerate(paths)]


def sized(protocol: Protocol, making: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the arguments of a request, sizes and steps that were not asked for as a protocol's tables have them.

    Raises:
        ConfigError: for a model that the protocol's tables don't have, unless all its sizes are asked for.
    """
    if embedded_name(making["model"]) is not None:
        tell(f"an embedded model is in no table of {protocol.name}; it keeps its own sizes")
        return making
    if all(making[name] is not None for name in SIZES):
        return making
    size = protocol.size_of(making["model"])
    if size is None:
        return making
    return making | {name: getattr(size, name) for name in SIZES if making[name] is None}


def protocol_pieces(
    protocol: Protocol, texts: Sequence[str], folder: Path, samples: int | None, seed: int
) -> list[Piece]:
    """Return the videos to be made as a protocol's are called and seeded; refuses several of one prompt and seed.

    There are as many samples of each text as the protocol's, unless given; ``seed`` is added to the protocol's.
    """
    count = samples or protocol.samples
    if protocol.seed == "0" and count > 1:
        raise ConfigError(
            f"protocol {protocol.name} has one seed for all its clips, got --samples {count}; leave it out"
        )
    found = []
    for number, text in enumerate(dict.fromkeys(texts)):
        paths = [protocol.path(folder, number, text, place) for place in range(count)]
        found += _seeded(text, paths, seed + number * count if protocol.seed is None else seed)
    return found


def share(work: Sequence[Piece], shard: str | None) -> list[Piece]:
    """Return the i-th of n shares of the work, ``i/n`` with i from 0; one without work is refused."""
    if shard is None:
        return list(work)
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--shard must be i/n with i from 0 to n - 1, such as 0/8, got {shard!r}")
    found = list(work)[int(number) :: int(count)]
    if not found:
        raise ConfigError(f"--shard {shard} has nothing to do: there are {len(work)} videos; take fewer shares")
    return found


def remaining(work: Iterable[Piece], request: Request) -> list[Piece]:
    """Return the videos that are not there yet; refuses those that were made otherwise or without a side-car."""
    return [piece for piece in work if not _is_made(piece, request)]


def _is_made(piece: Piece, request: Request) -> bool:
    if not piece.path.exists():
        return False
    try:
        message = json.loads(side_car_path(piece.path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{piece.path} has no side-car that tells how it was made; move it away") from None
    methods = {method.name: method.to_dict() for method in request.methods}
    requested: dict[str, Any] = {"model": request.model or EMBEDDED, "seed": piece.seed, "methods": methods}
    requested["prompt"] = piece.prompt
    requested |= {name: value for name in ASKED if (value := getattr(request, name)) is not None}
    for name, value in json.loads(json.dumps(requested)).items():
        if message.get(name) != value:
            raise ConfigError(
                f"{piece.path} was made with {name} {message.get(name)!r}, asked is {value!r}; name another folder"
            )
    return True


def cost(request: Request, made: int, total: int) -> str:
    """Return what making the videos takes, of which some are made, as far as it is known before a model is loaded."""
    settled, family, *_ = settle(request)
    sizes = {name: getattr(settled, name) for name in SIZES}
    message = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None) or "the model's sizes"
    text = f"{total - made} of {total} videos to make, {made} are there; {message}"
    sizes["num_frames"] = sizes["num_frames"] or 1
    adapter = next((one for one in installed.adapters().values() if family in one.families), None)
    if family is None or adapter is None or None in sizes.values():
        return text
    planned = estimate(adapter, family, methods=settled.methods, **sizes)
    flops = planned.total_flops * (total - made)
    return f"{text}; {flops:.3g} FLOPs dense, of which methods save what dit-accel plan tells"


def generate(work: Sequence[Piece], request: Request, tell: Callable[[str], None], command: Sequence[str] = ()) -> None:
    """Make videos, each with its side-car, whole or not at all; after the first one, tell how long the rest takes.

    The prompts are checked before anything is loaded; the side-cars hold the command line.
    """
    if request.embedded:
        for piece in work:
            check_words(piece.prompt, request.embedded)
    with opened(request, stages=Stages(quiet=True), command=command) as make:
        for number, piece in enumerate(work, 1):
            with held(piece.path):
                record = make(piece.prompt, piece.path, piece.seed).record
            seconds = record["seconds"]["denoise"] + record["seconds"]["decode"]
            rest = f", about {_time(seconds * (len(work) - number))} to go" if number < len(work) else ""
            tell(f"{piece.path.name}, video {number} of {len(work)}, {seconds:.1f} s{rest}")


def _time(seconds: float) -> str:
    """Return a time in words, in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
