"""VBench's prompts, which dimensions each serves, and the videos of a folder that belong to them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from .dimensions import DIMENSIONS, dimension

SAMPLES = 5
"""Videos of each prompt that a dimension scores."""

FLICKERING = "temporal_flickering"

FILTERED_SAMPLES = 25
"""Videos of each prompt of temporal flickering from which the static filter keeps up to five."""

SUFFIXES = (".mp4", ".gif")

ASKED = {"object_class": "object", "multiple_objects": "object", "color": "color", "scene": "scene",
         "spatial_relationship": "spatial_relationship", "appearance_style": "appearance_style"}  # fmt: skip
"""Dimensions that need more than the prompt -> what the prompts' file calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: its text, which dimensions it serves, and what those ask for besides, as the prompts' file has it."""

    text: str
    dimensions: tuple[str, ...]
    targets: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Videos of one prompt that are to be scored."""

    prompt: Prompt
    paths: tuple[Path, ...]


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of an official full-info JSON; the entry at fault is named."""
    held = _json(path)
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
    requested = {}
    for name in (name for name in served if name in ASKED):
        try:
            found = entry["auxiliary_info"][name][ASKED[name]]
            if name == "spatial_relationship":
                found = {key: found[key] for key in ("object_a", "object_b", "relationship")}
            requested[name] = found["scene"] if name == "scene" else found
        except (KeyError, TypeError):
            raise ConfigError(f"{where} serves {name}, but its auxiliary_info does not tell what is asked") from None
    return Prompt(text=entry["prompt_en"], dimensions=served, targets=requested)


def prompt_of(path: Path) -> str:
    """Return the prompt in a file's name: what stands before ``-digits``."""
    return re.sub(r"-\d+$", "", path.stem)


def videos_of(prompts: Sequence[Prompt], folder: Path, name: str, samples: int = SAMPLES) -> list[Wanted]:
    """Return the videos ``{prompt}-{i}.mp4`` of a dimension's prompts, i from 0; those that are missing are named."""
    files = _files(folder)
    wanted, missing = [], []
    for prompt in served(prompts, name):
        own = [files.get(f"{prompt.text}-{number}") for number in range(samples)]
        missing += [f"{prompt.text}-{number}" for number, path in enumerate(own) if path is None]
        wanted.append(Wanted(prompt=prompt, paths=tuple(path for path in own if path is not None)))
    if missing:
        total = samples * len(wanted)
        shown = ", ".join(f"'{one}.mp4'" for one in missing[:3])
        raise ConfigError(
            f"{name} takes {samples} videos of each of {len(wanted)} prompts, and {folder} lacks {len(missing)} of "
            f"{total}: {shown}{' ...' if len(missing) > 3 else ''}; {_hint(missing[0], files)}"
        )
    return wanted


def for_filter(prompts: Sequence[Prompt], folder: Path) -> list[Wanted]:
    """Return the videos of temporal flickering's prompts among which the static filter chooses, up to 25 of each.

    They are in the order of the official filter, which is that of their names as text: -0, -1, -10, -11 and so on, -2.
    Fewer than 5 of a prompt are refused.
    """
    files = _files(folder)
    wanted = []
    for prompt in served(prompts, FLICKERING):
        own = (files.get(f"{prompt.text}-{number}") for number in range(FILTERED_SAMPLES))
        wanted.append(Wanted(prompt=prompt, paths=tuple(sorted((path for path in own if path is not None), key=str))))
    few = [one.prompt.text for one in wanted if len(one.paths) < SAMPLES]
    if few:
        raise ConfigError(
            f"the static filter chooses {SAMPLES} of {FILTERED_SAMPLES} videos of each prompt, and {folder} has fewer "
            f"than {SAMPLES} of {len(few)} prompts, such as {few[0]!r}; generate '{few[0]}-0.mp4' and further"
        )
    return wanted


def unused(prompts: Sequence[Prompt], folder: Path, samples: int = SAMPLES) -> list[str]:
    """Return the names of videos that no dimension scores: of other prompts, or beyond the samples."""
    most = ((one, FILTERED_SAMPLES if FLICKERING in one.dimensions else samples) for one in prompts)
    known = {f"{one.text}-{number}" for one, count in most for number in range(count)}
    return sorted(path.name for stem, path in _files(folder).items() if stem not in known)


def served(prompts: Sequence[Prompt], name: str) -> Iterable[Prompt]:
    """Return a dimension's prompts, each text once; a dimension that has none is refused."""
    found = {one.text: one for one in prompts if name in one.dimensions}
    if not found:
        raise ConfigError(f"no prompt of the file serves {name}; name another with --full-info")
    return found.values()


def first_of(prompts: Sequence[Prompt], names: Sequence[str], count: int | None) -> list[Prompt]:
    """Return the prompts of dimensions in the file's order: the first ``count`` of each, all for None."""
    wanted = {one.text for name in names for one in list(served(prompts, name))[:count]}
    return [one for one in prompts if one.text in wanted]


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not there."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; name one that holds videos {{prompt}}-{{i}}.mp4")


def _files(folder: Path) -> dict[str, Path]:
    check_folder(folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            if path.stem in found:
                raise ConfigError(f"{folder} holds {path.stem!r} twice, as .mp4 and .gif; remove one")
            found[path.stem] = path
    if not found:
        raise ConfigError(f"the folder {folder} holds no videos: no file that ends in {' or '.join(SUFFIXES)}")
    return found


def _hint(stem: str, files: Mapping[str, Path]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(stem, files, n=1, cutoff=0.9)
    return f"the nearest is {files[near[0]].name!r}" if near else "generate those, or leave the dimension out"


def check_custom(names: Sequence[str]) -> None:
    """Refuse dimensions that can't be measured of videos of one's own, since they ask for more than a prompt."""
    blocked = [name for name in names if name in ASKED]
    if blocked:
        free = [name for name in DIMENSIONS if name not in ASKED]
        raise ConfigError(
            f"{', '.join(blocked)} can't be measured of videos of one's own, since VBench's own prompts tell what they "
            f"ask for; use {', '.join(free)}"
        )


def custom_videos(folder: Path, prompts_file: Path | None, names: Sequence[str]) -> list[Wanted]:
    """Return all videos of a folder, with prompts from a JSON {file name: prompt} of them all or from their names."""
    paths = _files(folder).values()
    prompts = {path.name: prompt_of(path) for path in paths}
    if prompts_file is not None:
        prompts = prompts_by_name(prompts_file, prompts)
    served = tuple(names)
    return [Wanted(prompt=Prompt(text=prompts[path.name], dimensions=served), paths=(path,)) for path in paths]


def prompts_by_name(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the prompts of files by name, from a JSON {file name: prompt} that has them all."""
    prompts = _json(path)
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError(f"prompts {path} must be a JSON object {{file name: prompt}}")
    missing = next((name for name in names if name not in prompts), None)
    if missing is not None:
        raise ConfigError(f"prompts {path} has no {missing!r}; {did_you_mean(missing, prompts)}")
    return prompts


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"prompts {path} can't be read: {error.strerror}; name a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"prompts {path} are not JSON ({error})") from None
