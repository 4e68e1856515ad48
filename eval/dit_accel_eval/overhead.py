"""Measures what an attached method that changes nothing costs a step: `python -m dit_accel_eval.overhead`.

Attached and plain runs of the embedded model alternate; processor time is compared, so that other work on the machine
does not count. The caches measure what they would decide by, and never skip.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path

import dit_accel
from dit_accel.files import written_whole
from dit_accel.methods.config import MethodConfig

from .denoising_time import processor

NEVER = 1e-12
"""A threshold below which nothing lies; with 0 nothing would be measured."""

METHODS: dict[str, MethodConfig | None] = {
    "plain again": None,
    "radial, dense": dit_accel.RadialAttention(dense_steps=1000),
    "easycache": dit_accel.EasyCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "teacache": dit_accel.TeaCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "magcache": dit_accel.MagCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "firstblockcache": dit_accel.FirstBlockCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
}
"""Name of an arm -> what is attached; the first shows what the measurement itself is off by."""


def main() -> None:
    """Print one JSON line an arm: processor seconds a step, and the overhead with its quartiles over the pairs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the lines to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = WanPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    lines = []
    for name, method in METHODS.items():
        pairs = [
            [_seconds_a_step(pipe, options.steps, each) for each in (None, method)] for _ in range(options.pairs + 1)
        ]
        seconds = np.array(pairs[1:])
        quartiles = np.quantile(seconds[:, 1] / seconds[:, 0] - 1, (0.25, 0.5, 0.75))
        line = {
            "arm": name,
            "plain_seconds_a_step": float(np.median(seconds[:, 0])),
            "overhead": float(quartiles[1]),
            "overhead_quartiles": [float(quartiles[0]), float(quartiles[2])],
            "pairs": options.pairs,
            "steps": options.steps,
            "threads": options.threads,
            "torch": torch.__version__,
            "processor": processor(),
        }
        lines.append(json.dumps(line))
        print(lines[-1], flush=True)
    if options.out:
        with written_whole(options.out) as path:
            path.write_text("\n".join(lines) + "\n")


def _seconds_a_step(pipe: WanPipeline, steps: int, method: MethodConfig | None) -> float:
    with dit_accel.attach(pipe, method) if method else contextlib.nullcontext():
        started = time.process_time()
        pipe(
            "a red circle moving right on a navy background",
            num_frames=17,
            height=64,
            width=64,
            num_inference_steps=steps,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        return (time.process_time() - started) / steps


if __name__ == "__main__":
    main()
