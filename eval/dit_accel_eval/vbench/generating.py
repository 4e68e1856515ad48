"""Generates VBench's videos: all prompts of the dimensions asked for, several seeds each; goes on where it stopped.

The cost is told first. Several processes, on as many devices, share the work by ``--shard``.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.generate import opened
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import EMBEDDED, Request, check_words, embedded_name, settle, side_car_path

from dit_accel import ConfigError
from dit_accel.adapters import registry
from dit_accel.estimate.estimate import estimate
from dit_accel.files import held

from .prompts import FILTERED_SAMPLES, FLICKERING, SAMPLES, Prompt
from .protocols import Protocol

ASKED = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "solver")
"""What of a request an earlier video must have been made with, where it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One video to be made.

    Attributes:
        prompt: its prompt.
        path: where it goes, ``{prompt}-{i}.mp4``.
        seed: of its noise, another for each video.
    """

    prompt: str
    path: Path
    seed: int


def pieces(
    every: Sequence[Prompt],
    wanted: Sequence[Prompt],
    names: Sequence[str],
    folder: Path,
    samples: int | None,
    seed: int,
) -> list[Piece]:
    """Return the videos to be made.

    Args:
        every: all prompts of the file: a video's seed does not depend on which of them are wanted.
        wanted: those to be made.
        names: the dimensions.
        folder: of the videos.
        samples: videos of each prompt; None: 5, and 25 for the static filter of temporal flickering.
        seed: of the first prompt's first video.
    """
    places = {text: place for place, text in enumerate(dict.fromkeys(one.text for one in every))}
    found = []
    for one in wanted:
        filtered = FLICKERING in one.dimensions and FLICKERING in names
        count = samples or (FILTERED_SAMPLES if filtered else SAMPLES)
        step = max(FILTERED_SAMPLES, samples or 0)
        first = seed + step * places[one.text]
        found += [
            Piece(prompt=one.text, path=folder / f"{one.text}-{number}.mp4", seed=first + number)
            for number in range(count)
        ]
    return found


def sized(protocol: Protocol, making: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Return what videos are made with, sizes and steps that were not asked for as a protocol's tables have them.

    Args:
        protocol: whose.
        making: arguments of the request.
        tell: is given a line where a model keeps its own.

    Raises:
        ConfigError: for a model that the protocol's tables don't have, unless all its sizes are asked for.
    """
    names = ("height", "width", "num_frames", "num_inference_steps")
    if embedded_name(making["model"]) is not None:
        tell(f"an embedded model is in no table of {protocol.name}; it keeps its own sizes")
        return making
    if all(making[name] is not None for name in names):
        return making
    size = protocol.size_of(making["model"])
    if size is None:
        return making
    return making | {name: getattr(size, name) for name in names if making[name] is None}


def protocol_pieces(
    protocol: Protocol, texts: Sequence[str], folder: Path, samples: int | None, seed: int
) -> list[Piece]:
    """Return the videos to be made as a protocol's are called and seeded.

    Args:
        protocol: whose.
        texts: its prompts, each once.
        folder: of the videos.
        samples: videos of each prompt; None: the protocol's.
        seed: what is added to the protocol's seeds.

    Raises:
        ConfigError: for several videos of one prompt and one seed.
    """
    count = samples or protocol.samples
    if protocol.seed == "0" and count > 1:
        raise ConfigError(
            f"protocol {protocol.name} has one seed for all its clips, got --samples {count}; leave it out"
        )
    found = []
    for number, text in enumerate(dict.fromkeys(texts)):
        first = {"0": seed, "i": seed, None: seed + number * count}[protocol.seed]
        found += [
            Piece(prompt=text, path=protocol.path(folder, number, text, place), seed=first + place)
            for place in range(count)
        ]
    return found


def share(work: Sequence[Piece], shard: str | None) -> list[Piece]:
    """Return the i-th of n shares of the work, ``i/n`` with i from 0.

    Raises:
        ConfigError: for another form, or a share without work.
    """
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
    """Return the videos that are not there yet.

    Raises:
        ConfigError: for a video that was made otherwise, or about which nothing is told.
    """
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
    requested |= {name: value for name in ASKED if (value := getattr(request, name)) is not None}
    for name, value in json.loads(json.dumps(requested)).items():
        if message.get(name) != value:
            raise ConfigError(
                f"{piece.path} was made with {name} {message.get(name)!r}, asked is {value!r}; name another folder"
            )
    return True


def cost(request: Request, made: int, total: int) -> str:
    """Return what making the videos takes, as far as it is known before a model is loaded.

    Args:
        request: what to generate.
        made: videos that are there.
        total: videos in all.

    Raises:
        DitAccelError: for a request that can't be met.
    """
    settled, family, *_ = settle(request)
    known = [f"{name} {getattr(settled, name)}" for name in ("num_frames", "height", "width", "num_inference_steps")
             if getattr(settled, name) is not None]  # fmt: skip
    message = ", ".join(known) or "the model's sizes"
    text = f"{total - made} of {total} videos to make, {made} are there; {message}"
    sizes = (settled.height, settled.width, settled.num_inference_steps)
    if family is None or None in sizes:
        return text
    adapter = next((one for one in registry.adapters().values() if family in one.families), None)
    if adapter is None:
        return text
    planned = estimate(
        adapter, family, methods=settled.methods, height=settled.height, width=settled.width,
        num_frames=settled.num_frames or 1, num_inference_steps=settled.num_inference_steps,
    )  # fmt: skip
    flops = planned.total_flops * (total - made)
    return f"{text}; {flops:.3g} FLOPs dense, of which methods save what dit-accel plan tells"


def generate(work: Sequence[Piece], request: Request, tell: Callable[[str], None], command: Sequence[str] = ()) -> None:
    """Make videos, each with its side-car, whole or not at all; after the first one, tell how long the rest takes.

    Args:
        work: those to be made.
        request: model, sizes and methods; its prompts are checked before anything is loaded.
        tell: is given lines of progress.
        command: the command line, for the side-cars.

    Raises:
        DitAccelError: for a request that can't be met.
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
