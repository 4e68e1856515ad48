"""Reads what other tools say of clips: the results of `fastvideo eval run`, and of VBench's package."""

import math
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
        values: dict[str, list[float]] = {}
        tables = [sample.get("scores") for sample in samples if isinstance(sample, dict)]
        for scores in (part for table in tables for part in (table if isinstance(table, list) else [table])):
            for metric, result in scores.items() if isinstance(scores, dict) else ():
                score = result.get("score") if isinstance(result, dict) else result
                if isinstance(score, int | float) and math.isfinite(score):
                    values.setdefault(metric, []).append(float(score))
        means = {metric: float(np.mean(each)) for metric, each in values.items()}
        return [OtherScore(tool="FastVideo", metric=key, mean=means[key], videos=len(values[key])) for key in means]
    dimensions = data.items() if isinstance(data, dict) else ()
    return [
        OtherScore(tool="VBench", metric=name, mean=float(value[0]), videos=len(value[1]))
        for name, value in dimensions
        if isinstance(value, list) and [type(part) for part in value] in ([float, list], [int, list])
    ]
