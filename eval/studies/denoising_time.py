"""Times denoising with LiteAttention at falling densities on a CPU: `python eval/studies/denoising_time.py`.

The embedded model makes a clip so long that attention is most of its work; the dense runs are diffusers' own, and one
of fewer steps is the rival. All arms run in turn, round after round; a time is given over the dense one of the same
round, text encoding and autoencoder left out. The default settings take about 5 minutes on two cores.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from dit_accel_eval.runs.machine import processor
from torch import Tensor

import dit_accel
from dit_accel.files import written_whole

THRESHOLDS = (-6.0, -3.0, -1.0, -0.5, -0.25, -0.1)
Arm = tuple[dit_accel.LiteAttention | None, int]
"""Method, if any, and steps."""

OUT = Path(__file__).parents[1] / "results" / "denoising-time.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write one JSON line per arm and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-frames", type=int, default=129)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="print the table of an earlier run, time nothing")
    options = parser.parse_args(arguments)
    if not options.table:
        rows = measure(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(options.out) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table([json.loads(line) for line in options.out.read_text().splitlines()]))
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per arm: its density over the whole run, its time and its result against the dense run's."""
    torch.set_num_threads(options.threads)
    pipe = WanPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    fewer = max(1, options.steps * 2 // 3)
    arms: dict[str, Arm] = {"dense": (None, options.steps), f"dense, {fewer} steps": (None, fewer)}
    for value in THRESHOLDS:
        lite = dit_accel.LiteAttention(threshold=value, block_size=options.block_size, dense_steps=1)
        arms[f"threshold {value:g}"] = lite, options.steps
    _run(pipe, (None, 2), options)  # warm-up
    runs_of: dict[str, list[tuple[float, float, Tensor]]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            runs_of[name].append(_run(pipe, arm, options))
    dense = np.array([seconds for seconds, *_ in runs_of["dense"]])
    latents = runs_of["dense"][0][2]
    about = {
        "num_frames": options.num_frames,
        "tokens": (options.num_frames // 2 + 1) * 64,
        "steps": options.steps,
        "rounds": options.rounds,
        "block_size": options.block_size,
        "threads": options.threads,
        "torch": torch.__version__,
        "processor": processor(),
    }
    return [
        {
            "arm": name,
            "density": runs[0][1],
            "time": float(np.median(np.array([seconds for seconds, *_ in runs]) / dense)),
            "seconds": float(np.median([seconds for seconds, *_ in runs])),
            "distance": float((runs[0][2] - latents).norm() / latents.norm()),
            **about,
        }
        for name, runs in runs_of.items()
    ]


def _run(pipe: WanPipeline, arm: Arm, options: argparse.Namespace) -> tuple[float, float, Tensor]:
    """Return the seconds of the denoising loop, the density of its attention and the latents it ends with."""
    method, steps = arm
    with torch.no_grad():
        text, nothing = pipe.encode_prompt(
            "a red circle moving right", max_sequence_length=32, device=torch.device("cpu")
        )
    with dit_accel.attach(pipe, *([method] if method else [])) as attachment:
        started = time.perf_counter()
        latents: Any = pipe(
            prompt_embeds=text,
            negative_prompt_embeds=nothing,
            num_frames=options.num_frames,
            height=64,
            width=64,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
        )
        return time.perf_counter() - started, attachment.report().density, latents[0]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table under a line that says how they were made."""
    first = rows[0]
    lines = [
        f"{first['tokens']} tokens ({first['num_frames']} frames), {first['steps']} steps, tiles of "
        f"{first['block_size']}, {first['threads']} threads, torch {first['torch']}, {first['rounds']} rounds, "
        f"{first['processor']}",
        "",
        "| arm | density of the run | time over dense | distance of the latents |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['arm']} | {row['density']:.3f} | {row['time']:.2f} | {row['distance']:.3f} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
