"""Tunes SparseD: the one density, or share of the mass, whose attention errs by so much where it is dense in turn."""

import dataclasses
from bisect import bisect_left
from pathlib import Path
from statistics import fmean
from typing import Any

from dit_accel_pipelines.generation.progress import Stages

from dit_accel import ConfigError, SparseD

from ..runs.loaded import TuningRequest
from .base import Tuned, TuningRun, replaced_method, write_config

LADDER = (*(n / 20 for n in range(1, 20)), 0.97, 0.98, 0.99)  # tried by halves: the error falls as they rise


def tune_density(
    request: TuningRequest, output: Path, *, error: float = 0.05, by: str = "density", stages: Stages | None = None
) -> Tuned:
    """Find the least ``density`` or ``mass`` whose mean error over the prompts is within ``error``, for ``--config``.

    The request may hold a `SparseD` that says all else. Found are the ``value``, and those that were ``tried``.
    """
    config, rest = replaced_method(request, SparseD, SparseD(rest="cached"))
    if config.density or config.mass or not config.caches_rest or not 0 < error < 1:
        about = ", ".join(f"sparsed.{name} = {getattr(config, name)!r}" for name in ("density", "mass", "rest"))
        raise ConfigError(f"tune density takes an error in (0, 1) and rest = 'cached' alone, got {error}, {about}")
    settings = {"by": by, "sparsed": config.to_dict()}
    runs, tried = TuningRun(dataclasses.replace(request, methods=rest), output, ".toml", stages, **settings), {}

    def measured(point: tuple[float, str]) -> tuple[float, float]:
        with runs.attached(dataclasses.replace(config, **{by: point[0]})) as attachment:
            report: Any = runs.run(point[1], attachment).report
        if (section := report.section("sparsed")) is None:
            raise ConfigError(f"tune density saw no dense turn in {len(report.steps)} forwards; ask for more steps")
        return section.data["error"], report.sparse_density

    def mean(value: float) -> float:
        found = runs.search([(value, prompt) for prompt in runs.prompts], measured, lambda at: f"{by} {at[0]:g}")
        tried[value] = (value, *map(fmean, zip(*found, strict=True)))
        return tried[value][1]

    value = LADDER[min(bisect_left(LADDER, True, key=lambda value: mean(value) <= error), len(LADDER) - 1)]
    if mean(value) > error:
        raise ConfigError(f"tune density found an error of {mean(value):.3f} at {by} {value}, got error = {error}")
    about = f"Found by dit-accel tune density: error {mean(value):.3f}, {len(runs.prompts)} prompts."
    write_config(output, dataclasses.replace(config, **{by: value}), [about])
    runs.finish()
    rows = [tuple(f"{cell:.3g}" for cell in tried[at]) for at in sorted(tried)]
    found = {"by": by, "value": value, "tried": sorted(tried.values())}
    return Tuned(found=found, columns=(by, "error", "kept, dense turns included"), rows=rows)
