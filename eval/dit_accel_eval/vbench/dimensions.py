"""VBench's sixteen dimensions with their totals, its prompts, and the videos of a folder that belong to them.

Totals are of all raw scores or not given. Source: Huang et al., arXiv 2311.17982; ranges and weights are those of the
official totals (scripts/constant.py). The official script takes 0 for a dimension that is missing, which its range
turns into less than 0.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

Group = Literal["quality", "semantic"]
GROUP_WEIGHTS: dict[Group, int] = {"quality": 4, "semantic": 1}  # what the groups weigh in the total


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One dimension of VBench: the raw scores that become 0 and 1, and the least that its formula can give."""

    name: str
    group: Group
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    least: float = 0.0


_ALL = (
    Dimension(name="subject_consistency", group="quality", low=0.1462),
    Dimension(name="background_consistency", group="quality", low=0.2615),
    Dimension(name="temporal_flickering", group="quality", low=0.6293),
    Dimension(name="motion_smoothness", group="quality", low=0.706, high=0.9975),
    Dimension(name="dynamic_degree", group="quality", weight=0.5),
    *(Dimension(name=name, group="quality") for name in ("aesthetic_quality", "imaging_quality")),
    *(Dimension(name=name, group="semantic") for name in
      ("object_class", "multiple_objects", "human_action", "color", "spatial_relationship")),
    Dimension(name="scene", group="semantic", high=0.8222),
    Dimension(name="appearance_style", group="semantic", low=0.0009, high=0.2855, least=-1.0),
    Dimension(name="temporal_style", group="semantic", high=0.364, least=-1.0),
    Dimension(name="overall_consistency", group="semantic", high=0.364, least=-1.0),
)  # fmt: skip

DIMENSIONS: dict[str, Dimension] = {entry.name: entry for entry in _ALL}  # in the official order


def dimension(name: str) -> Dimension:
    """Return a dimension; blanks and hyphens are as good as underscores, and unknown names are refused."""
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    if plain not in DIMENSIONS:
        raise ConfigError(f"there is no dimension {name!r} of VBench; {did_you_mean(plain, DIMENSIONS)}")
    return DIMENSIONS[plain]


def totals(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``quality``, ``semantic`` and ``total`` of raw scores, 1 at the range's upper end, and ``normalized``.

    The last has each dimension's score before weights. Missing, doubled and impossible scores are refused.
    """
    scores: dict[str, float] = {}
    for spelling, score in raw.items():
        entry = dimension(spelling)
        if entry.name in scores:
            raise ConfigError(f"dimension {entry.name} is given twice, last as {spelling!r}; leave one out")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ConfigError(f"the score of {entry.name} must be a number, got {score!r}")
        if not entry.least <= score <= 1:
            percent = "; divide percentages by 100" if 1 < score <= 100 else ""
            raise ConfigError(f"the raw score of {entry.name} must lie in [{entry.least:g}, 1], got {score}{percent}")
        scores[entry.name] = float(score)
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing:
        listed = f"{len(missing)} are missing: {', '.join(missing)}"
        raise ConfigError(f"VBench's totals take all {len(DIMENSIONS)} dimensions, and {listed}; measure those, too")
    normalized = {name: (scores[name] - bounds.low) / (bounds.high - bounds.low) for name, bounds in DIMENSIONS.items()}
    groups: dict[str, Any] = {}
    for group in GROUP_WEIGHTS:
        parts = [part for part in _ALL if part.group == group]
        values = [normalized[part.name] for part in parts]
        groups[group] = fmean(values, [part.weight for part in parts])
    total = fmean(groups.values(), GROUP_WEIGHTS.values())
    return {**groups, "total": total, "normalized": normalized}


def read_scores(path: Path) -> dict[str, Any]:
    """Return dimension -> raw score of a JSON file: an object of numbers, or of an official result's lists."""
    held = read_json(path, "scores")
    if not isinstance(held, dict):
        raise ConfigError(f"scores {path} must be a JSON object dimension -> raw score, got {type(held).__name__}")
    return {name: score[0] if isinstance(score, list) and score else score for name, score in held.items()}


def read_json(path: Path, what: str) -> Any:
    """Return what a JSON file holds, in which no key may stand twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)
    except OSError as error:
        raise ConfigError(f"{what} {path} can't be read: {error.strerror}; name a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"{what} {path} are not JSON ({error}); name a JSON file") from None


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{double!r} is there twice")
    return dict(pairs)


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


Wanted = tuple[Prompt, list[Path]]  # the videos of one prompt that are to be scored


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
        names = (f"{prompt.text}-{number}" for number in range(samples))
        wanted.append((prompt, [files[name] for name in names if name in files]))
    return wanted


def all_videos_of(prompts: Sequence[Prompt], folder: Path, name: str, samples: int = SAMPLES) -> list[Wanted]:
    """Return all videos of a dimension's prompts; those that are missing are named."""
    wanted = videos_of(prompts, folder, name, samples)
    there = {path.stem for _, paths in wanted for path in paths}
    every = [f"{prompt.text}-{number}" for prompt, _ in wanted for number in range(samples)]
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
    return [(Prompt(text=prompts[path.name], dimensions=()), [path]) for path in paths]


def prompts_by_name(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the prompts of files by name, from a JSON {file name: prompt} that has them all."""
    prompts = read_json(path, "prompts")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError(f"prompts {path} must be a JSON object {{file name: prompt}}")
    missing = next((name for name in names if name not in prompts), None)
    if missing is not None:
        raise ConfigError(f"prompts {path} has no {missing!r}; {did_you_mean(missing, prompts)}")
    return prompts
