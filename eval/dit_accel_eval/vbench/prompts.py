"""VBench's prompts, which dimensions each serves, and the videos of a folder that belong to them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from .dimensions import DIMENSIONS, dimension, read_json

SAMPLES = 5  # videos of each prompt that a dimension scores
FLICKERING, STYLE = "temporal_flickering", "appearance_style"
FILTERED_SAMPLES = 25  # videos of each prompt of temporal flickering from which the static filter keeps up to five
SUFFIXES = (".mp4", ".gif")
FIXED = ("object_class", "multiple_objects", "color", "spatial_relationship", "scene", "appearance_style")
"""Dimensions that ask for more than the prompt, which VBench's own prompts alone tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: its text, which dimensions it serves, and the style that appearance_style asks for."""

    text: str
    dimensions: tuple[str, ...]
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Videos of one prompt that are to be scored."""

    prompt: Prompt
    paths: tuple[Path, ...]


def read_full_info(path: Path) -> list[Prompt]:
    """Return the prompts of an official full-info JSON; the entry at fault is named."""
    held = read_json(path, "prompts")
    if not isinstance(held, list) or not held:
        raise ConfigError(f"prompts {path} must be a JSON list of entries, got {type(held).__name__}")
    return [_prompt(entry, f"entry {number} of {path}") for number, entry in enumerate(held)]


def _prompt(entry: Any, where: str) -> Prompt:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt_en"), str):
        raise ConfigError(f"{where} must be an object with prompt_en and dimension, got {entry!r:.80}")
    names = entry.get("dimension")
    if not isinstance(names, list) or not names:
        raise ConfigError(f"{where} must have a list of dimensions, got {names!r:.80}")
    served = tuple(dimension(str(name)).name for name in names)
    try:
        style = entry["auxiliary_info"][STYLE][STYLE] if STYLE in served else ""
    except (KeyError, TypeError):
        raise ConfigError(f"{where} serves {STYLE}, but its auxiliary_info does not tell which") from None
    return Prompt(text=entry["prompt_en"], dimensions=served, style=style)


def videos_of(prompts: Sequence[Prompt], folder: Path, name: str, samples: int = SAMPLES) -> list[Wanted]:
    """Return the videos ``{prompt}-{i}`` of a dimension's prompts that are there, i from 0."""
    files, wanted = files_in(folder), []
    for prompt in served(prompts, name):
        paths = (files.get(f"{prompt.text}-{number}") for number in range(samples))
        wanted.append(Wanted(prompt=prompt, paths=tuple(path for path in paths if path is not None)))
    return wanted


def all_videos_of(prompts: Sequence[Prompt], folder: Path, name: str, samples: int = SAMPLES) -> list[Wanted]:
    """Return all videos of a dimension's prompts; those that are missing are named."""
    wanted = videos_of(prompts, folder, name, samples)
    there = {path.stem for videos in wanted for path in videos.paths}
    every = [f"{videos.prompt.text}-{number}" for videos in wanted for number in range(samples)]
    missing = [stem for stem in every if stem not in there]
    if missing:
        shown = ", ".join(f"'{stem}.mp4'" for stem in missing[:3])
        takes = f"{name} takes {samples} videos of each of {len(wanted)} prompts"
        lacks = f"{len(missing)} of {len(every)}: {shown}{' ...' if len(missing) > 3 else ''}"
        raise ConfigError(f"{takes}, and {folder} lacks {lacks}; generate those, or leave the dimension out")
    return wanted


def served(prompts: Sequence[Prompt], name: str) -> Iterable[Prompt]:
    """Return a dimension's prompts, each text once; a dimension that has none is refused."""
    by_text = {prompt.text: prompt for prompt in prompts if name in prompt.dimensions}
    if not by_text:
        raise ConfigError(f"no prompt of the file serves {name}; name another with --full-info")
    return by_text.values()


def first_of(prompts: Sequence[Prompt], names: Sequence[str], count: int | None) -> list[Prompt]:
    """Return the prompts of dimensions in the file's order: the first ``count`` of each, all for None."""
    wanted = {prompt.text for name in names for prompt in list(served(prompts, name))[:count]}
    return [prompt for prompt in prompts if prompt.text in wanted]


def known_names(requested: Sequence[str]) -> tuple[str, ...]:
    """Return dimensions by their official names; refuses unknown ones, and ones given twice."""
    names = [dimension(name).name for name in requested]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(f"dimension {double} is given twice; leave one out")
    return tuple(names)


def files_in(folder: Path) -> dict[str, Path]:
    """Return a folder's videos by their names; one that is not there or empty, and two of one name, are refused."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; name one that holds videos {{prompt}}-{{i}}.mp4")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            if path.stem in files:
                raise ConfigError(f"{folder} holds {path.stem!r} twice, as .mp4 and .gif; remove one")
            files[path.stem] = path
    if not files:
        raise ConfigError(f"the folder {folder} holds no videos: no file that ends in {' or '.join(SUFFIXES)}")
    return files


def check_custom(names: Sequence[str]) -> None:
    """Refuse dimensions that can't be measured of videos of one's own, since they ask for more than a prompt."""
    blocked = [name for name in names if name in FIXED]
    if blocked:
        free = [name for name in DIMENSIONS if name not in FIXED]
        why = "VBench's own prompts tell what they ask for"
        raise ConfigError(f"{', '.join(blocked)} can't be measured of one's own videos: {why}; use {', '.join(free)}")


def custom_videos(folder: Path, prompts_file: Path | None) -> list[Wanted]:
    """Return all videos of a folder, with prompts from a JSON {file name: prompt} of them all or from their names."""
    paths = files_in(folder).values()
    prompts = {path.name: re.sub(r"-\d+$", "", path.stem) for path in paths}
    if prompts_file is not None:
        prompts = prompts_by_name(prompts_file, prompts)
    return [Wanted(prompt=Prompt(text=prompts[path.name], dimensions=()), paths=(path,)) for path in paths]


def prompts_by_name(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the prompts of files by name, from a JSON {file name: prompt} that has them all."""
    prompts = read_json(path, "prompts")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError(f"prompts {path} must be a JSON object {{file name: prompt}}")
    missing = next((name for name in names if name not in prompts), None)
    if missing is not None:
        raise ConfigError(f"prompts {path} has no {missing!r}; {did_you_mean(missing, prompts)}")
    return prompts
