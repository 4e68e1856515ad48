"""Profiles a model's blocks for ProfilingCache: which attend to the background, or hardly change, on its generations.

Source: the profiling of ProfilingDiT (arXiv 2504.03140), whose code was not released. Where we depart from it: no
segmenter, the foreground is what moves in the predicted picture; attention is streamed, or read off a sample of the
queries; other criteria, since which blocks attend to what need not tell which can be cached.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.media import contact_sheet, read_image, read_video
from dit_accel_pipelines.generation.progress import Stages
from dit_accel_pipelines.generation.request import Request, settle

import dit_accel
from dit_accel import ConfigError
from dit_accel.adapters.adapter import Family
from dit_accel.adapters.model_files import read_model_files
from dit_accel.errors import did_you_mean
from dit_accel.estimate.estimate import estimate
from dit_accel.files import json_text, written_whole
from dit_accel.methods.caches.block_numbers import spell_numbers
from dit_accel.methods.caches.profile_file import VERSION, weights_of
from dit_accel.methods.find import find_transformers, resolve_model

from ..statistics import rank_correlation
from .base import Progress, Table, Tuned, check_output, run_settings
from .block_ranking import cached_blocks
from .profile_plots import write_heat_map
from .profile_watch import CRITERIA, Profiler

SHOWN_STEPS = 6
"""Steps whose masks the contact sheet shows."""

Part = dict[str, Any]
"""What one run gave: prompt, seed, by transformer the values of each criterion, and masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """How a profile is made.

    Attributes:
        criterion: a name of `CRITERIA`.
        threshold: blocks whose score is below it are cached; None: those below the largest gap.
        cached: so many blocks are cached, those of the lowest scores.
        queries: queries of each attention call that are looked at; None: all.
        seeds: runs of each prompt, of the request's seed and those that follow it.
        mask: picture or video of the foreground; None: what moves.

    Raises:
        ConfigError: for a value out of range, or two ways of splitting the blocks.
    """

    criterion: str = "error"
    threshold: float | None = None
    cached: int | None = None
    queries: int | None = None
    seeds: int = 1
    mask: Path | None = None

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ConfigError(f"there is no criterion {self.criterion!r}; {did_you_mean(self.criterion, CRITERIA)}")
        if self.threshold is not None and self.cached is not None:
            raise ConfigError(
                f"tune profile takes --threshold or --cached, got both ({self.threshold} and {self.cached}); give one"
            )
        for name, least in (("cached", 1), ("queries", 2), ("seeds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"tune profile's {name} must be >= {least}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(Tuned):
    """What `tune_profile` found and wrote: the file, and its content."""

    output: Path
    content: Mapping[str, Any]

    def table(self) -> Table:
        """Return the blocks' scores by transformer, and what they say together."""
        rows, remarks = [], []
        for name, entry in self.content["transformers"].items():
            for block, scores in enumerate(zip(*(entry["scores"][one] for one in CRITERIA), strict=True)):
                spelt = ("" if score is None else f"{score:.3f}" for score in scores)
                rows.append((name, str(block), *spelt, "cached" if block in entry["cached"] else ""))
            remarks.append(f"{name}: blocks {spell_numbers(entry['cached']) or 'none'} may be cached")
            text = {key: value for key, value in entry["stability"].items() if value is not None}
            remarks += [f"{name}: rank correlation {key}: {value:.2f}" for key, value in text.items()]
            if entry["sample_error"] is not None:
                remarks.append(f"{name}: attention received is off by {entry['sample_error']:.1%} (standard error)")
        return ("transformer", "block", *CRITERIA, self.content["criterion"]), rows, remarks

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {**self.content, "output": str(self.output)}


def tune_profile(request: Request, output: Path, *, stages: Stages | None = None, **options: Any) -> Profile:
    """Profile the blocks on every prompt and seed, for `ProfilingCache.blocks`; the options are `ProfileOptions`'.

    Beside ``output`` lie a heat map and a contact sheet of the masks. Of an image without a mask, in which nothing
    moves, attention is not measured. Step caches among the request's methods are refused.
    """
    how = ProfileOptions(**options)
    pictures = {kind: output.with_name(f"{output.stem}-{kind}.png") for kind in ("heat-map", "masks")}
    check_output(output, ".json", *pictures.values())
    request, family, *_ = settle(request)
    mask = None if how.mask is None else read_mask(how.mask)
    settings = run_settings(request, **{**dataclasses.asdict(how), "mask": how.mask and str(how.mask)})
    if mask is not None:  # which a file of the same name may not be tomorrow
        settings["mask_pixels"] = hashlib.sha256(repr(mask.shape).encode() + mask.tobytes()).hexdigest()[:12]
    for name in ("threshold", "cached", "criterion"):  # all criteria are measured, and the split is made at the end
        settings.pop(name)
    progress: Progress[Part] = Progress(output, settings, dict)
    stages = stages or Stages(quiet=True)
    stages.note(_cost(request, family, how))
    described = _watch_all(request, how, mask, progress, stages)
    content = _content(progress.done, how, settings, described)
    with written_whole(output) as temporary:
        temporary.write_text(json_text(content) + "\n", encoding="utf-8")
    write_heat_map(content, pictures["heat-map"])
    if any(part["masks"] for part in progress.done):
        with written_whole(pictures["masks"]) as temporary:
            _sheet(progress.done).save(temporary)
    progress.finish()
    return Profile(output=output, content=content)


def _watch_all(
    request: Request, how: ProfileOptions, mask: np.ndarray | None, progress: Progress[Part], stages: Stages
) -> dict[str, Any]:
    """Run what is not done yet, and return what the transformers are: weights, and the names of their blocks."""
    stages.stage("loading")
    pipe = load_pipeline(request)
    runs = [(prompt, request.seed + number) for prompt in request.prompts for number in range(how.seeds)]
    with dit_accel.attach(pipe, *request.methods, preset="none", backend=request.backend) as attachment:
        for handler in attachment._execution.handlers:
            if "cache" in handler.exclusive:
                raise ConfigError(
                    f"tune profile watches every block at every step, and {handler.name} skips some; leave it out"
                )
        transformers, blocks = find_transformers(pipe), Profiler(attachment, None, 0, None, False).blocks
        entries = {
            name: {"weights": weights_of(one), "names": [block.name for block in blocks(name)]}
            for name, one in transformers.items()
        }
        for name, entry in entries.items():
            if how.cached is not None and how.cached > len(entry["names"]):
                raise ConfigError(
                    f"tune profile's cached = {how.cached}, and {name} has {len(entry['names'])} blocks; ask for fewer"
                )
        for number, (prompt, seed) in enumerate(runs[len(progress.done) :], len(progress.done) + 1):
            stages.stage(f"run {number} of {len(runs)}")
            profiler = Profiler(attachment, how.queries, seed, mask, how.criterion == "attention")
            with profiler.watching():
                run(pipe, prompt, dataclasses.replace(request, seed=seed), stages=stages)
            progress.add(_part(prompt, seed, profiler))
        return {"model": resolve_model(next(iter(entries)), transformers).name, "transformers": entries}


def _part(prompt: str, seed: int, profiler: Profiler) -> Part:
    steps = sorted(profiler.masks)
    places = np.linspace(0, len(steps) - 1, SHOWN_STEPS).round().astype(int).tolist() if steps else []
    shown = [steps[at] for at in sorted({*places})]
    return {
        "prompt": prompt,
        "seed": seed,
        "foreground": [float(mask.mean()) for _, mask in sorted(profiler.masks.items())],
        "masks": {
            str(step): {"shape": profiler.masks[step].shape, "bits": np.packbits(profiler.masks[step]).tobytes().hex()}
            for step in shown
        },
        "transformers": {
            name: {
                **{one: scores.matrix(one, len(profiler.blocks(name))) for one in CRITERIA},
                "sample_error": float(np.mean(scores.errors)) if scores.errors else None,
            }
            for name, scores in profiler.scores.items()
        },
    }


def _content(
    parts: Sequence[Part], how: ProfileOptions, settings: Mapping[str, Any], described: Mapping[str, Any]
) -> dict[str, Any]:
    entries = {
        name: {**entry, "blocks": len(entry["names"]), **_entry(name, len(entry["names"]), parts, how)}
        for name, entry in described["transformers"].items()
    }
    packages = ("dit-accel", "torch", "diffusers")
    return {
        "profile": VERSION, "model": described["model"], "criterion": how.criterion, "threshold": how.threshold,
        "cached": how.cached, "settings": dict(settings),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "runs": [{key: part[key] for key in ("prompt", "seed", "foreground")} for part in parts],
        "transformers": entries,
    }  # fmt: skip


def _entry(name: str, blocks: int, parts: Sequence[Part], how: ProfileOptions) -> dict[str, Any]:
    """Return what all runs say about one transformer."""
    seen = [(part, part["transformers"][name]) for part in parts if name in part["transformers"]]
    if not seen:
        raise ConfigError(f"{name} never ran; show something for which it does, or ask for more steps")
    by_step = {one: _mean([_array(found[one], blocks) for _, found in seen]) for one in CRITERIA}
    means = {one: _mean(list(values.T)) if values.size else np.full(blocks, np.nan) for one, values in by_step.items()}
    if np.isnan(means[how.criterion]).all():
        raise ConfigError(
            f"tune profile found nothing to tell {name}'s blocks apart by {how.criterion!r}: no foreground, or too few "
            "steps; show something that moves, or use another criterion"
        )
    cached, edge = cached_blocks(means[how.criterion].tolist(), how.threshold, how.cached)
    own = {
        (part["prompt"], part["seed"]): _mean(list(_array(found[how.criterion], blocks).T)).tolist()
        for part, found in seen
    }
    errors = [found["sample_error"] for _, found in seen if found["sample_error"] is not None]
    return {
        "cached": cached,
        "split_at": edge,
        "scores": {one: _plain(values) for one, values in means.items()},
        "by_step": {one: [_plain(row) for row in values] for one, values in by_step.items()},
        "stability": {
            "between prompts": _agreement(own, lambda one, two: one[0] != two[0] and one[1] == two[1]),
            "between seeds": _agreement(own, lambda one, two: one[0] == two[0] and one[1] != two[1]),
        },
        "sample_error": float(np.mean(errors)) if errors else None,
    }


def _array(values: Sequence[Sequence[float | None]], blocks: int) -> np.ndarray:
    """Return values [block][step] as an array, NaN where there is none."""
    return np.array([[np.nan if x is None else x for x in row] for row in values], float).reshape(blocks, -1)


def _plain(values: np.ndarray) -> list[float | None]:
    """Return numbers as JSON has them: None for what is none."""
    return [None if np.isnan(value) else float(value) for value in values]


def _mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of arrays, of what is a number; NaN where none is. They are cut to the shortest's steps."""
    steps = min(array.shape[-1] for array in arrays)
    stacked = np.stack([array[..., :steps] for array in arrays])
    known = ~np.isnan(stacked)
    return np.where(known.any(0), np.nansum(stacked, 0) / np.maximum(known.sum(0), 1), np.nan)


def _agreement(own: Mapping[tuple[str, int], list[float]], pairs: Any) -> float | None:
    """Return the mean rank correlation of the runs' scores over the pairs that are meant; None without any."""
    found = [rank_correlation(own[one], own[two]) for one, two in itertools.combinations(own, 2) if pairs(one, two)]
    found = [value for value in found if value == value]
    return float(np.mean(found)) if found else None


def _cost(request: Request, family: Family | None, how: ProfileOptions) -> str:
    """Return in words what the runs cost, and what watching them adds."""
    runs = len(request.prompts) * how.seeds
    begin = f"{runs} runs of {request.num_inference_steps or 'the usual number of'} steps"
    if family is None:
        return f"{begin}; watching attention adds the half of its own work, or less with --queries"
    adapter, _ = read_model_files(request.source).identify()
    sizes = {name: getattr(request, name) for name in ("height", "width", "num_frames", "num_inference_steps")}
    whole = estimate(adapter, family, **sizes)
    tokens = whole.layout.visual_tokens
    if whole.layout.frames == 1 and how.mask is None:
        return f"{begin}: {runs * whole.total_flops / 1e12:.3g} TFLOP; attention is not watched, which needs --mask"
    share = 1.0 if how.queries is None else min(1.0, how.queries / tokens)
    added = share * whole.attention_flops / 2 / family.forwards_per_step  # scores alone, and of one branch
    looked = "every query" if share == 1 else f"{how.queries} queries"
    return (
        f"{begin}: {runs * whole.total_flops / 1e12:.3g} TFLOP; watching attention adds {runs * added / 1e12:.3g} "
        f"TFLOP ({added / whole.total_flops:.0%}), in float32, {looked} of a call"
    )


def read_mask(path: Path) -> np.ndarray:
    """Return the foreground that a picture or video draws in white, not all over, bool [frames, height, width]."""
    still = path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    frames = [read_image(path)] if still else read_video(path)
    mask = np.stack([np.asarray(frame.convert("L")) for frame in frames]) >= 128
    if mask.all() or not mask.any():
        raise ConfigError(
            f"the mask {path} is {'white' if mask.all() else 'black'} all over; draw the foreground in white"
        )
    return mask


def _sheet(parts: Sequence[Part]) -> Any:
    """Return the masks as a contact sheet, a row a step of each run; frames side by side."""
    videos, labels = [], []
    for part in parts:
        for step, packed in part["masks"].items():
            size = int(np.prod(packed["shape"]))
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed["bits"]), np.uint8))[:size]
            video = (bits.reshape(packed["shape"]) * 255).astype(np.uint8)
            videos.append(np.repeat(video[..., None], 3, -1))
            labels.append(f"{part['prompt'][:32]}, seed {part['seed']}, step {step}")
    return contact_sheet(videos, labels)
