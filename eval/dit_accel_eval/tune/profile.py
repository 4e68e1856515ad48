"""Profiles a model's blocks for ProfilingCache: which attend to the background, or hardly change, on its generations.

Source: the profiling of ProfilingDiT (arXiv 2504.03140), whose code was not released. Where we depart from it: no
segmenter, the foreground is what moves in the predicted picture; attention is streamed, and of long clips read off a
sample of the queries; other criteria, since which blocks attend to what need not tell which can be cached.
"""

import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_pipelines.generation.progress import Stages

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean
from dit_accel.files import write_json
from dit_accel.methods.caches.block_numbers import spell_numbers
from dit_accel.methods.caches.profile_file import VERSION, weights_digest
from dit_accel.methods.find import find_transformers, resolve_model

from ..runs.loaded import TuningRequest
from .base import Tuned, TuningRun, run_settings
from .profile_watch import CRITERIA, Profiler


def tune_profile(
    request: TuningRequest, output: Path, *, criterion: str = "error", cached: int | None = None,
    stages: Stages | None = None,
) -> Tuned:  # fmt: skip
    """Profile the blocks on every prompt, for `ProfilingCache.blocks`; step caches are refused."""
    if criterion not in CRITERIA:
        raise ConfigError(f"there is no criterion {criterion!r}; {did_you_mean(criterion, CRITERIA)}")
    if cached is not None and cached < 1:
        raise ConfigError(f"tune profile's cached must be >= 1, got {cached}")
    runs = TuningRun(request, output, ".json", stages)
    with runs.attached() as attachment:
        profiler = Profiler(attachment, criterion == "attention")
        skipping = (handler.name for handler in attachment.engine.handlers if "cache" in handler.exclusive)
        if (skips := next(skipping, None)) is not None:
            raise ConfigError(f"tune profile watches every block at each step, and {skips} skips some; leave it out")
        for name, blocks in profiler.names.items():
            if cached is not None and cached > len(blocks):
                has = f"{name} has {len(blocks)} blocks"
                raise ConfigError(f"tune profile's cached = {cached}, and {has}; ask for fewer")

        def profiled(prompt: str) -> dict[str, Any]:
            with profiler.watching():
                runs.run(prompt)
            blocks = {name: range(len(listed)) for name, listed in profiler.names.items()}
            return {
                "prompt": prompt, "foreground": [share for _, share in sorted(profiler.foreground.items())],
                "transformers": {
                    name: {criterion: _matrix(scores[criterion], blocks[name]) for criterion in CRITERIA}
                    for name, scores in profiler.scores.items()
                },
            }  # fmt: skip

        parts = runs.over_prompts(profiled)
    transformers = find_transformers(runs.pipe)
    content = {
        "profile": VERSION, "model": resolve_model(next(iter(transformers)), transformers).name,
        "criterion": criterion, "cached": cached, "settings": run_settings(runs),
        "versions": {name: importlib.metadata.version(name) for name in ("dit-accel", "torch", "diffusers")},
        "runs": [{"prompt": part["prompt"], "foreground": part["foreground"]} for part in parts],
        "transformers": {
            name: {
                "weights": weights_digest(module), "names": profiler.names[name], "blocks": len(profiler.names[name]),
                **_entry(name, parts, criterion, cached),
            }
            for name, module in transformers.items()
        },
    }  # fmt: skip
    write_json(output, content)
    runs.finish()
    return _tuned(content)


def _matrix(values: Mapping[tuple[int, int], float], blocks: range) -> list[list[float | None]]:
    """Return the values by block and step, None where there is none."""
    steps = 1 + max((step for _, step in values), default=-1)
    return [[values.get((block, step)) for step in range(steps)] for block in blocks]


def _entry(name: str, parts: Sequence[Mapping[str, Any]], criterion: str, cached: int | None) -> dict[str, Any]:
    """Return what all runs say about one transformer."""
    seen = [part["transformers"][name] for part in parts if name in part["transformers"]]
    if not seen:
        raise ConfigError(f"{name} never ran; show something for which it does, or ask for more steps")
    by_step = {kind: mean_of_known([np.array(entry[kind], float) for entry in seen]) for kind in CRITERIA}
    scores = {kind: mean_of_known([*values.T]) if values.size else np.full(len(values), np.nan)
              for kind, values in by_step.items()}  # fmt: skip
    if np.isnan(scores[criterion]).all():
        raise ConfigError(
            f"tune profile found nothing to tell {name}'s blocks apart by {criterion!r}: no foreground, or too few "
            "steps; show something that moves, or use another criterion"
        )
    blocks, edge = cached_blocks(scores[criterion].tolist(), cached)
    return {
        "cached": blocks, "split_at": edge, "scores": {kind: _plain(values) for kind, values in scores.items()},
        "by_step": {kind: [*map(_plain, values)] for kind, values in by_step.items()},
    }  # fmt: skip


def _plain(values: np.ndarray) -> list[float | None]:
    """Return numbers as JSON has them: None for what is none."""
    return [None if np.isnan(value) else float(value) for value in values]


def _tuned(content: Mapping[str, Any]) -> Tuned:
    """Return the content with the blocks' scores by transformer as a table, and what they say together."""
    rows: list[tuple[str, ...]] = []
    remarks: list[str] = []
    for name, entry in content["transformers"].items():
        for block, scores in enumerate(zip(*(entry["scores"][kind] for kind in CRITERIA), strict=True)):
            spelt = ("" if score is None else f"{score:.3f}" for score in scores)
            rows.append((name, str(block), *spelt, "cached" if block in entry["cached"] else ""))
        remarks.append(f"{name}: blocks {spell_numbers(entry['cached']) or 'none'} may be cached")
    columns = ("transformer", "block", *CRITERIA, content["criterion"])
    return Tuned(found=content, columns=columns, rows=rows, remarks=remarks)


def cached_blocks(scores: Sequence[float], count: int | None = None) -> tuple[list[int], float]:
    """Return the blocks of lowest scores, ``count`` or all below the largest gap, and the threshold above them."""
    known = sorted((score, block) for block, score in enumerate(scores) if score == score)
    if count is None:
        gaps = [high[0] - low[0] for low, high in itertools.pairwise(known)]
        count = 1 + int(np.argmax(gaps)) if gaps else 0
    edges = [entry[0] for entry in known[max(count - 1, 0) : count + 1]] or [0.0]
    return sorted(block for _, block in known[:count]), float(np.mean(edges))


def mean_of_known(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of arrays, of what is a number; NaN where none is. They are cut to the shortest's steps."""
    steps = min(array.shape[-1] for array in arrays)
    stacked = np.stack([array[..., :steps] for array in arrays])
    known = ~np.isnan(stacked)
    return np.where(known.any(0), np.nansum(stacked, 0) / np.maximum(known.sum(0), 1), np.nan)
