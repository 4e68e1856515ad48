"""Times denoising with LiteAttention at falling densities on a CPU: `python eval/studies/denoising_time.py`.

The embedded model makes a clip so long that attention is most of its work; the dense runs are diffusers' own, and one
of fewer steps is the rival. All arms run in turn, round after round; a time is given over the dense one of the same
round, text encoding and autoencoder left out. The default settings take about 5 minutes on two cores.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from dit_accel_eval.bench.loop import in_turn
from dit_accel_eval.runs.results import Line, markdown_table
from study import about, study
from torch import Tensor

import dit_accel
from dit_accel.methods.config import MethodConfig

THRESHOLDS = (-6.0, -3.0, -1.0, -0.5, -0.25, -0.1)
Arm = tuple[MethodConfig | None, int]
"""Method, if any, and steps."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one JSON line per arm and print the table; returns the exit code."""
    return study(
        __doc__, arguments, measure, table, out="denoising-time.jsonl", threads=torch.get_num_threads(), num_frames=129,
        steps=10, rounds=3, block_size=64,
    )  # fmt: skip


def measure(options: argparse.Namespace, lines: list[Line]) -> list[Line]:
    """Return one line per arm: its density over the whole run, its time and its result against the dense run's."""
    fewer = max(1, options.steps * 2 // 3)
    arms: dict[str, Arm] = {"dense": (None, options.steps), f"dense, {fewer} steps": (None, fewer)}
    for value in THRESHOLDS:
        lite = dit_accel.LiteAttention(threshold=value, block_size=options.block_size, dense_steps=1)
        arms[f"threshold {value:g}"] = lite, options.steps
    pipe = WanPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    _run(pipe, (None, 2), options)  # warm-up
    takes = {name: partial(_run, pipe, arm, options) for name, arm in arms.items()}
    runs = list(in_turn(takes, options.rounds, warm_up=0))
    seconds = {name: np.array([one[name][0] for one in runs]) for name in arms}
    first = runs[0]
    latents = first["dense"][2]
    shared = {name: getattr(options, name) for name in ("num_frames", "steps", "rounds", "block_size")}
    return [
        {
            "arm": name, "density": first[name][1], "time": float(np.median(seconds[name] / seconds["dense"])),
            "seconds": float(np.median(seconds[name])),
            "distance": float((first[name][2] - latents).norm() / latents.norm()),
            "tokens": (options.num_frames // 2 + 1) * 64, **shared, **about(),
        }
        for name in arms
    ]  # fmt: skip


def _run(pipe: WanPipeline, arm: Arm, options: argparse.Namespace) -> tuple[float, float, Tensor]:
    """Return the seconds of the denoising loop, the density of its attention and the latents it ends with."""
    method, steps = arm
    with torch.no_grad():
        text, nothing = pipe.encode_prompt(
            "a red circle moving right", max_sequence_length=32, device=torch.device("cpu")
        )
    with dit_accel.attach(pipe, *([method] if method else []), preset="none") as attachment:
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


def table(rows: Sequence[Line]) -> str:
    """Return the rows as a Markdown table under a line that says how they were made."""
    first = rows[0]
    head = (
        f"{first['tokens']} tokens ({first['num_frames']} frames), {first['steps']} steps, tiles of "
        f"{first['block_size']}, {first['threads']} threads, torch {first['torch']}, {first['rounds']} rounds, "
        f"{first['processor']}"
    )
    cells = ((row["arm"], f"{row['density']:.3f}", f"{row['time']:.2f}", f"{row['distance']:.3f}") for row in rows)
    heads = "arm | density of the run | time over dense | distance of the latents"
    return f"{head}\n\n{markdown_table(heads, cells)}"


if __name__ == "__main__":
    raise SystemExit(main())
