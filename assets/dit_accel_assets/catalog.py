"""The embedded models by name: where each one's files are, what it was trained on and how it samples by default."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dit_accel_assets import clips, painter, prompts, world

if TYPE_CHECKING:
    from dit_accel_assets.judge import Judgement

MODELS = Path(__file__).parent / "models"
_CHECKED = ("color", "shape", "direction", "background")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedModel:
    """What there is to know about an embedded model besides its files."""

    pipeline: str
    """Name of the diffusers pipeline class that loads it."""
    words: Callable[[], tuple[str, ...]]
    held_out: Callable[[int], str]
    """Number -> prompt of a combination that training never saw."""
    defaults: dict[str, float | int | str]
    """The call arguments it is meant to be sampled with: size and length in pixels and frames, steps, guidance."""
    score: Callable[[np.ndarray, int], float]
    """(clip, number) -> the share of the prompt's questions that a clip answers rightly."""
    closeness: Callable[[np.ndarray, int, int, int | None], float]
    """(clip, number, first, end) -> how near those frames of a clip come to the prompt, 0 to 1, with no pass marks."""
    path: Callable[[np.ndarray, int], float]
    """(clip, number) -> how far its objects stray from the nearest paths that the prompt allows, RMS in pixels; NaN
    where none shows in two frames."""
    drawn: Callable[[int, int, int, int], tuple[str, np.ndarray]]
    """(number, height, width, frames) -> caption and clip [F, H, W, 3] of its world, never of a held-out prompt."""
    longest: int = 1
    """Frames of the longest clips that it was trained on."""
    base: str = ""
    """The model whose weights it shares, changed by the LoRA in its folder; empty: all of them are its own."""


@lru_cache(maxsize=1024)
def _clip_prompt(index: int) -> str:
    return clips.clip_of(index, frames=1, held_out=True)[0]


def _clip_score(video: np.ndarray, index: int) -> float:
    from dit_accel_assets.checker import check_clip

    finding, (_, scene, _) = check_clip(video), clips.clip_of(index, frames=1, held_out=True)
    return float(np.mean([getattr(finding, name) == getattr(scene, name) for name in _CHECKED]))


def _clip_closeness(video: np.ndarray, index: int, first: int, end: int | None) -> float:
    from dit_accel_assets.checker import closeness

    return float(np.mean(list(closeness(video[first:end], clips.clip_of(index, frames=1, held_out=True)[1]).values())))


def _clip_drawn(index: int, height: int, width: int, frames: int) -> tuple[str, np.ndarray]:
    if (height, width) != (clips.SIZE, clips.SIZE):
        raise ValueError(f"clips of this world have {clips.SIZE} x {clips.SIZE} pixels, got {width} x {height}")
    caption, _, clip = clips.clip_of(index, frames=frames)
    return caption, clip


def _clip_path(video: np.ndarray, index: int) -> float:
    from dit_accel_assets.checker import path_distance

    return path_distance(video)  # the prompts say nothing of speed


@lru_cache(maxsize=1024)
def _world_scene(index: int) -> world.Scene:
    return world.scene_of(0, index, held_out=True)


def _world_prompt(index: int) -> str:
    return prompts.prompt_of(_world_scene(index))


def _world_drawn(index: int, height: int, width: int, frames: int, *, still: bool = False) -> tuple[str, np.ndarray]:
    scene = world.scene_of(1, index, height=height, width=width, still=still)
    return prompts.prompt_of(scene), painter.draw(scene, frames)


def _world_score(video: np.ndarray, index: int) -> float:
    return _judged(video, _world_scene(index)).score


def _world_closeness(video: np.ndarray, index: int, first: int, end: int | None) -> float:
    return _judged(video, _world_scene(index), first, end).closeness


def _world_path(video: np.ndarray, index: int) -> float:
    answers = _judged(video, _world_scene(index)).answers
    values = [answer.value for name, answer in answers.items() if name.startswith("path.")]
    values = [value for value in values if np.isfinite(value)]
    return float(np.mean(values)) if values else float("nan")


@lru_cache(maxsize=1024)
def _still_scene(index: int) -> world.Scene:
    return world.scene_of(0, index, height=96, width=96, held_out=True, still=True)


def _still_prompt(index: int) -> str:
    return prompts.prompt_of(_still_scene(index))


def _still_score(video: np.ndarray, index: int) -> float:
    return _judged(video, _still_scene(index)).score


def _still_closeness(video: np.ndarray, index: int, first: int, end: int | None) -> float:
    return _judged(video, _still_scene(index)).closeness


def _still_path(video: np.ndarray, index: int) -> float:
    return float("nan")


def _judged(video: np.ndarray, scene: world.Scene, first: int = 0, end: int | None = None) -> Judgement:
    from dit_accel_assets.judge import judge_clips

    return judge_clips(video, scene, first=first, end=end)


KNOWN: dict[str, EmbeddedModel] = {
    "wan-tiny": EmbeddedModel(
        pipeline="WanPipeline",
        words=prompts.world_vocabulary,
        held_out=_world_prompt,
        score=_world_score,
        closeness=_world_closeness,
        path=_world_path,
        drawn=_world_drawn,
        longest=world.FRAMES,
        defaults={"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "guidance_scale": 4.0},
    ),
    "wan-plain": EmbeddedModel(
        pipeline="WanPipeline",
        words=clips.plain_vocabulary,
        held_out=_clip_prompt,
        score=_clip_score,
        closeness=_clip_closeness,
        path=_clip_path,
        drawn=_clip_drawn,
        longest=33,
        defaults={"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 20, "guidance_scale": 4.0},
    ),
    "flux-tiny": EmbeddedModel(
        pipeline="FluxPipeline",
        words=prompts.world_vocabulary,
        held_out=_still_prompt,
        score=_still_score,
        closeness=_still_closeness,
        path=_still_path,
        drawn=partial(_world_drawn, still=True),
        defaults={
            "height": 96,
            "width": 96,
            "num_inference_steps": 20,
            "true_cfg_scale": 4.0,
            "negative_prompt": "",
            "max_sequence_length": 64,
        },
    ),
}

KNOWN["flux-sizes"] = KNOWN["flux-tiny"]  # the same world, learnt at several picture sizes
KNOWN |= {
    f"{base}-{steps}": replace(
        KNOWN[base], base=base, defaults={**KNOWN[base].defaults, "num_inference_steps": steps, guidance: 1.0}
    )
    for base, guidance in (("wan-tiny", "guidance_scale"), ("flux-tiny", "true_cfg_scale"))
    for steps in (4, 8)
}


def model_names() -> tuple[str, ...]:
    """Return the names of the embedded models whose files are here."""
    return tuple(name for name in KNOWN if (MODELS / name / "model_index.json").is_file())


def model_path(name: str = "wan-tiny") -> Path:
    """Return the folder of an embedded model, which its diffusers pipeline loads; ValueError for an unknown name.

    That of a model for few steps holds its configs and its LoRA alone: `opened` finds the rest.
    """
    _known(name)
    return MODELS / name


def model_defaults(name: str = "wan-tiny") -> dict[str, float | int | str]:
    """Return the call arguments (size, frames, steps, guidance) that an embedded model is meant to be sampled with."""
    return dict(_known(name).defaults)


def held_out_prompts(name: str, count: int) -> list[str]:
    """Return the first `count` prompts, always the same, of word combinations that a model's training never saw."""
    if count < 0:
        raise ValueError(f"count={count}: ask for 0 or more prompts")
    model = _known(name)
    return [model.held_out(index) for index in range(count)]


def drawn_clip(name: str, number: int, *, height: int, width: int, frames: int) -> tuple[str, np.ndarray]:
    """Return caption and clip, uint8 [F, H, W, 3], that a number stands for in the world that a model was trained on.

    Raises:
        ValueError: for an unknown model, or a size or length that its world is not drawn in.
    """
    return _known(name).drawn(number, height, width, frames)


def model_score(name: str, index: int, video: np.ndarray) -> float:
    """Return in [0, 1] how much of the held-out prompt of a number a clip [F, H, W, 3] shows, by the model's judge."""
    return _known(name).score(video, index)


def model_closeness(name: str, index: int, video: np.ndarray, *, first: int = 0, end: int | None = None) -> float:
    """Return in [0, 1] how near a clip [F, H, W, 3] comes to the prompt of a number; ValueError for an unknown model.

    With `first` and `end` the stretch of those frames alone.
    """
    return _known(name).closeness(video, index, first, end)


def model_path_error(name: str, index: int, video: np.ndarray) -> float:
    """Return how far a clip's objects stray from the nearest paths that the prompt of a number allows, RMS in pixels.

    NaN where no object shows in two frames, or the model draws pictures.
    """
    return _known(name).path(video, index)


def longest_trained(name: str) -> int:
    """Return the frames of the longest clips that a model was trained on; 1 for pictures."""
    return _known(name).longest


def vocabulary(name: str = "wan-tiny") -> tuple[str, ...]:
    """Return every word that a prompt for this model may use, sorted."""
    return _known(name).words()


def check_prompt(prompt: str, name: str = "wan-tiny") -> tuple[str, ...]:
    """Return the words of `prompt`; raise ValueError naming the words that the embedded model has never seen."""
    words = tuple(re.findall(r"[^\s,.;:!?\"()]+", prompt.lower()))
    known = vocabulary(name)
    unknown = [word for word in dict.fromkeys(words) if word not in known]
    if unknown:
        raise ValueError(
            f"prompt {prompt!r}: unknown word(s) {', '.join(unknown)}; "
            f"the embedded model knows only: {', '.join(known)}"
        )
    return words


def _known(name: str) -> EmbeddedModel:
    here = model_names()
    if name not in here:
        raise ValueError(f"{name!r} is no embedded model; choose one of {', '.join(here)}")
    return KNOWN[name]
