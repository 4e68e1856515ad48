"""The converged runs that the demo is held against: those that are committed; all others are made on every core.

They are committed since they take longer than the demo: up to 256 steps each. `write` says what shapes each, as the
dense runs' files do, so that a run of other weights, another prompt or another size is never taken for it.
"""

import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_eval.runs.counting import Counts
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.pool import run_beside
from dit_accel_eval.suites.reference import MOST, Reference, converged, run_setting
from dit_accel_pipelines.generation.media import to_uint8

from dit_accel import ConfigError
from dit_accel.cli.console import TALK
from dit_accel.files import written_whole

COMMITTED = Path(__file__).with_name("demo_references.npz")

SOON = 128
"""Steps at which the search ends for runs that are not committed, so that the demo of another prompt takes minutes."""


def references(
    requested: Sequence[Any], model: EmbeddedModel, seeds: int, cache: Path, *, committed: Path | None = COMMITTED
) -> list[Reference]:
    """Return the converged run of every seed: those of a file, others made by processes of one thread, one a core.

    Args:
        requested: what `EmbeddedModel` is made of.
        model: made of it.
        seeds: how many, from 0.
        cache: folder of dense runs, for those that are made.
        committed: file of `write`; None: make all, with as many steps as it takes.
    """
    found = {} if committed is None else read(committed, model, seeds)
    most = MOST if committed is None else SOON
    missing = [seed for seed in range(seeds) if seed not in found]
    if missing:
        make = functools.partial(_converge, tuple(requested), cache, most)
        workers = min(len(missing), os.cpu_count() or 1)
        run_beside(make, missing, workers, lambda seed: TALK.print(f"seed {seed}: converged"))
    return [found.get(seed) or converged(model, seed, cache, most=most) for seed in range(seeds)]


def _converge(requested: Sequence[Any], cache: Path, most: int, seed: int) -> int:
    """Make a seed's dense runs in a process of its own, kept on disk by their hash; returns the seed."""
    torch.set_num_threads(1)
    converged(EmbeddedModel(*requested), seed, cache, most=most)
    return seed


def write(path: Path, model: EmbeddedModel, found: Sequence[Reference]) -> None:
    """Write converged runs of the seeds from 0 to one file, their frames in 8 bits."""
    about = [
        {"setting": run_setting(model, seed, one.steps), "agreement": one.agreement,
         "step": dataclasses.asdict(one.step)}
        for seed, one in enumerate(found)
    ]  # fmt: skip
    with written_whole(path) as temporary:  # the file's entry keeps the name that files have which are there
        np.savez_compressed(temporary, frames=np.stack([to_uint8(one.frames) for one in found]), told=json.dumps(about))


def read(path: Path, model: EmbeddedModel, seeds: int) -> dict[int, Reference]:
    """Return seed -> converged run, of those in a file of `write` that are the model's own in all that shapes them."""
    try:
        with np.load(path) as saved:
            frames, about = saved["frames"], json.loads(str(saved["told"]))
        found = {}
        for seed, (one, pictures) in enumerate(zip(about, frames, strict=True)):
            steps = one["setting"]["steps"]
            if seed < seeds and one["setting"] == json.loads(json.dumps(run_setting(model, seed, steps))):
                clip, step = pictures.astype(np.float32) / 255, Counts(**one["step"])
                found[seed] = Reference(frames=clip, steps=steps, agreement=one["agreement"], step=step)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} can't be read as converged runs ({error}); make them with --anew") from None
    return found
