"""Does one mean error for all models give more even quality than one density for all? Judges `dit-accel tune density`.

SparseD with a cached rest, 20 steps. Each model and size has its density for a mean error of .05 from two prompts; four
other clips judge it beside .3 and the mean of the densities found: ``python eval/studies/density_error.py RESULTS``.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from dit_accel_assets import held_out_prompts
from dit_accel_eval.runs.loaded import tuning_request
from dit_accel_eval.tune.density import tune_density
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.request import Request, resolve

from dit_accel import SparseD, attach

SIZES = {"wan-tiny": (64, 48), "wan-plain": (64,), "flux-tiny": (96, 144), "flux-sizes": (64, 128)}  # sides in pixels
SETTINGS = {f"{name}, {side} pixels": (name, dict(height=side, width=side)) for name in SIZES for side in SIZES[name]}
CHOOSING, JUDGING, ERROR, FIXED = range(16, 18), range(64, 68), 0.05, 0.3
METHOD = SparseD(block_size=16, rest="cached", refresh=3, dense_steps=4, dense_layers=0)


def found(model: str, size: dict[str, Any]) -> float:
    """Return the density that `tune density` finds."""
    prompts = tuple(held_out_prompts(model, CHOOSING.stop)[CHOOSING.start :])
    request = tuning_request(model=model, prompts=prompts, num_inference_steps=20, methods=(METHOD,), **size)
    with tempfile.TemporaryDirectory() as folder:
        return float(tune_density(request, Path(folder) / "density.toml", error=ERROR).found["value"])


def runner(model: str, size: dict[str, Any]) -> Callable[[float | None], list[np.ndarray]]:
    """Return what makes the judging clips at a density, or dense, as arrays in [0, 1]."""
    output = Path(tempfile.gettempdir()) / "none.png"  # nothing is written there
    prompts = held_out_prompts(model, JUDGING.stop)
    given = {"model": model, "num_inference_steps": 20, "device": "cpu", "output": output, "preset": "none", **size}
    requests = [resolve(Request(prompt=prompts[n], seed=n, **given)).request for n in JUDGING]
    pipe = load_pipeline(requests[0])

    def made(density: float | None) -> list[np.ndarray]:
        method = None if density is None else replace(METHOD, density=density)
        with attach(pipe, method, preset="none") if method else nullcontext():
            return [run(pipe, request).frames / 255 for request in requests]

    return made


def main() -> None:
    """Write a line for each model and size, then one of the spreads."""
    torch.set_num_threads(1)
    results, lines = Path(sys.argv[1]), list[dict[str, Any]]()
    chosen = {name: found(*setting) for name, setting in SETTINGS.items()}
    arms = {"found": chosen, f"{FIXED}": dict.fromkeys(chosen, FIXED)}
    arms["mean of those found"] = dict.fromkeys(chosen, round(fmean(chosen.values()), 3))
    for name, setting in SETTINGS.items():
        made = runner(*setting)
        dense, line = made(None), {"setting": name, "density": {arm: of[name] for arm, of in arms.items()}}
        line["psnr"] = {arm: psnr(made(of[name]), dense) for arm, of in arms.items()}
        lines.append(line)
        print(json.dumps(line), flush=True)
    means = {arm: [fmean(line["psnr"][arm]) for line in lines] for arm in arms}
    spread = {arm: {"spread": max(of) - min(of), "mean": fmean(of), "least": min(of)} for arm, of in means.items()}
    results.write_text("".join(json.dumps(line) + "\n" for line in [*lines, spread]))


def psnr(made: list[np.ndarray], dense: list[np.ndarray]) -> list[float]:
    """Return the PSNR of each clip to its dense run, in dB."""
    return [round(float(-10 * np.log10(((a - b) ** 2).mean())), 2) for a, b in zip(made, dense, strict=True)]


if __name__ == "__main__":
    main()
