"""Measures what an attached but neutral method costs a denoising step: `python -m dit_accel_eval.overhead`.

Attached and plain runs of the embedded model alternate; processor time is compared, so that other work on the machine
does not count.
"""

import argparse
import contextlib
import json
import platform
import time

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path

import dit_accel


def main() -> None:
    """Print one JSON line: seconds per step of both arms, median over the pairs, and the overhead and its quartiles."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = WanPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    neutral = dit_accel.RadialAttention(dense_steps=options.steps)
    seconds = np.array(
        [
            [_seconds_a_step(pipe, options.steps, method) for method in (None, neutral)]
            for _ in range(options.pairs + 1)
        ][1:]
    )
    ratio = seconds[:, 1] / seconds[:, 0] - 1
    print(
        json.dumps(
            {
                "plain_seconds_a_step": float(np.median(seconds[:, 0])),
                "attached_seconds_a_step": float(np.median(seconds[:, 1])),
                "overhead": float(np.median(seconds[:, 1]) / np.median(seconds[:, 0]) - 1),
                "overhead_quartiles": [float(q) for q in np.quantile(ratio, (0.25, 0.75))],
                "pairs": options.pairs,
                "threads": options.threads,
                "torch": torch.__version__,
                "processor": platform.machine(),
            }
        )
    )


def _seconds_a_step(pipe: WanPipeline, steps: int, method: dit_accel.RadialAttention | None) -> float:
    with dit_accel.attach(pipe, method) if method else contextlib.nullcontext():
        started = time.process_time()
        pipe(
            "a red circle moving right",
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
