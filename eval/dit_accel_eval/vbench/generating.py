"""Generates VBench's videos: all prompts of the dimensions requested, several seeds each; goes on where it stopped."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.generate import opened
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import EMBEDDED, Request, check_words, read_prompts, resolve, side_car_path
from dit_accel_pipelines.generation.room import check_outputs_fit

from dit_accel import ConfigError
from dit_accel.files import held

from .dimensions import FILTERED_SAMPLES, FLICKERING, SAMPLES, Prompt

SIZES = ("num_frames", "height", "width", "num_inference_steps")
LONGEST_NAME = 249  # bytes that a video's name may have, so that its side-car and its lock have names, too
REQUESTED = (*SIZES, "guidance_scale", "solver")  # what an earlier video must have been made with, where requested


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One video to be made: its prompt, where it goes, and the seed of its noise, another for each video."""

    prompt: str
    path: Path
    seed: int


def video_pieces(
    every: Sequence[Prompt], wanted: Sequence[Prompt], names: Sequence[str], folder: Path, samples: int | None,
    seed: int, augmented: Sequence[str] = (),
) -> list[Piece]:  # fmt: skip
    """Return the videos of wanted prompts: so many samples, else 5 of each, and 25 for the static filter's dimension.

    Each has another seed, whichever are wanted, from ``seed`` on. Where there are augmented prompts, one for each of
    ``every``, video j of prompt i has seed 100000 i + j, as VBench's own row of Wan 2.1 14B (VBench's issue 163).
    """
    texts = [prompt.text for prompt in every]
    order = texts if augmented else list(dict.fromkeys(texts))
    stride = 100_000 if augmented else max(FILTERED_SAMPLES, samples or 0)
    pieces = []
    for item in wanted:
        count = FILTERED_SAMPLES if FLICKERING in item.dimensions and FLICKERING in names else SAMPLES
        place = order.index(item.text)
        prompt = augmented[place] if augmented else item.text
        pieces += _of_prompt(prompt, item.text, folder, samples or count, seed + stride * place)
    return pieces


def own_pieces(texts: Sequence[str], folder: Path, samples: int | None, seed: int) -> list[Piece]:
    """Return the videos ``{prompt}-{i}.mp4`` of prompts of one's own, 5 of each or so many, each of another seed."""
    count, every = samples or SAMPLES, enumerate(dict.fromkeys(texts))
    return [piece for number, text in every for piece in _of_prompt(text, text, folder, count, seed + number * count)]


def _of_prompt(prompt: str, name: str, folder: Path, count: int, first: int) -> list[Piece]:
    """Return the videos ``{name}-{i}.mp4`` of a prompt; one that can't be files' name is refused."""
    if "/" in name or len(f"{name}-{count}.mp4".encode()) > LONGEST_NAME:
        why = "it holds a slash" if "/" in name else f"it has more than {LONGEST_NAME} bytes"
        raise ConfigError(f"{name[:60]!r} can't be the name of a video, since {why}; put it in other words")
    return [Piece(prompt=prompt, path=folder / f"{name}-{i}.mp4", seed=first + i) for i in range(count)]


def read_augmented(path: Path, every: Sequence[Prompt]) -> tuple[str, ...]:
    """Return a file's prompts, a line for each of VBench's in their order; another number of lines is refused."""
    texts = read_prompts(path, "--augmented")
    if len(texts) != len(every):
        where = "such as VBench's repository has them in prompts/augmented_prompts"
        raise ConfigError(f"{path} has {len(texts)} prompts, and VBench {len(every)}; give all in order, {where}")
    return texts


def share_of_work(work: Sequence[Piece], shard: str | None) -> list[Piece]:
    """Return the i-th of n shares of the work, ``i/n`` with i from 0; one without work is refused."""
    if shard is None:
        return list(work)
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--shard must be i/n with i from 0 to n - 1, such as 0/8, got {shard!r}")
    share = list(work)[int(number) :: int(count)]
    if not share:
        raise ConfigError(f"--shard {shard} has nothing to do: there are {len(work)} videos; take fewer shares")
    return share


def remaining(work: Iterable[Piece], request: Request) -> list[Piece]:
    """Return the videos that are not there yet; refuses those that were made otherwise or without a side-car."""
    methods = {method.name: method.to_dict() for method in request.methods}
    common: dict[str, Any] = {"model": request.model or EMBEDDED, "methods": methods}
    common |= {name: value for name in REQUESTED if (value := getattr(request, name)) is not None}
    common, left = json.loads(json.dumps(common)), []
    for piece in work:
        if not piece.path.exists():
            left.append(piece)
            continue
        try:
            data = json.loads(side_car_path(piece.path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(f"{piece.path} has no side-car that tells how it was made; move it away") from None
        for name, value in (common | {"seed": piece.seed, "prompt": piece.prompt}).items():
            if data.get(name) != value:
                other = f"{name} {data.get(name)!r}, requested is {value!r}"
                raise ConfigError(f"{piece.path} was made with {other}; name another folder")
    return left


def make_videos(
    work: Sequence[Piece], request: Request, tell: Callable[[str], None], command: Sequence[str] = ()
) -> None:
    """Make videos, each with its side-car, whole or not at all; after each, tell how long the rest takes."""
    if request.embedded:
        for piece in work:
            check_words(piece.prompt, request.embedded)
    check_outputs_fit([resolve(request).request], len(work))
    with opened(request, stages=Stages(quiet=True), command=command) as make:
        for number, piece in enumerate(work, 1):
            with held(piece.path):
                record = make(piece.prompt, piece.path, piece.seed).record
            seconds = record["seconds"]["denoise"] + record["seconds"]["decode"]
            left = timedelta(seconds=round(seconds * (len(work) - number)))
            tell(f"{piece.path.name}, video {number} of {len(work)}, {seconds:.1f} s, about {left} to go")
