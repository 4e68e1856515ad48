"""Reads what other tools say of clips: the results of `fastvideo eval run`, and of VBench's package."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherScore:
    """The mean of a metric over videos, by another tool; it is held against no reference run and no rival."""

    tool: str
    metric: str
    mean: float
    videos: int


def other_scores(data: Any) -> list[OtherScore]:
    """Return the scores in a file's JSON, [] where it is of neither tool.

    FastVideo writes a list of ``{"video": ..., "scores": {metric: {"score": ...}}}``, or such a list as ``samples``;
    VBench ``{dimension: [score, [{"video_path": ..., "video_results": ...}, ...]]}``.
    """
    samples = data.get("samples") if isinstance(data, dict) else data
    if isinstance(samples, list):
        return _of_samples([sample for sample in samples if isinstance(sample, dict)])
    dimensions = data if isinstance(data, dict) else {}
    found = {name: value for name, value in dimensions.items() if _is_dimension(value)}
    return [
        OtherScore(tool="VBench", metric=name, mean=float(mean), videos=len(entries))
        for name, (mean, entries) in found.items()
    ]


def _of_samples(samples: list[dict[str, Any]]) -> list[OtherScore]:
    values: dict[str, list[float]] = {}
    for sample in samples:
        parts = sample.get("scores")
        for scores in parts if isinstance(parts, list) else [parts]:
            for metric, result in scores.items() if isinstance(scores, Mapping) else ():
                score = result.get("score") if isinstance(result, Mapping) else result
                if _is_number(score):
                    values.setdefault(metric, []).append(float(score))
    return [OtherScore(tool="FastVideo", metric=metric, mean=float(np.mean(each)), videos=len(each))
            for metric, each in values.items()]  # fmt: skip


def _is_dimension(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_number(value[0]) and isinstance(value[1], list)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
