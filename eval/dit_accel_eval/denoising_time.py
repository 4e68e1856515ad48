"""Times denoising with LiteAttention at falling densities on a CPU: `python -m dit_accel_eval.denoising_time`.

The embedded model makes a clip so long that attention is most of its work. All arms run in turn, round after round; a
time is given over the dense one of the same round, text encoding and autoencoder left out.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path

import dit_accel
from dit_accel.files import written_whole

THRESHOLDS = (-6.0, -4.0, -3.0, -2.0, -1.0)
OUT = Path(__file__).parents[1] / "results" / "denoising-time.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write one JSON line an arm and print the table; returns the exit code."""
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
    """Return one row an arm: its density over the whole run and its time over that of the dense run."""
    torch.set_num_threads(options.threads)
    pipe = WanPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    common = {"block_size": options.block_size, "dense_steps": 1}
    arms: dict[str, dit_accel.LiteAttention | None] = {"dense": None}
    arms |= {f"{value:g}": dit_accel.LiteAttention(threshold=value, **common) for value in THRESHOLDS}
    _run(pipe, None, options)  # warm-up
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            found[name].append(_run(pipe, arm, options))
    dense = np.array([seconds for seconds, _ in found["dense"]])
    about = {
        "num_frames": options.num_frames,
        "tokens": (options.num_frames // 2 + 1) * 64,
        "steps": options.steps,
        "rounds": options.rounds,
        "block_size": options.block_size,
        "threads": options.threads,
        "torch": torch.__version__,
        "processor": platform.machine(),
    }
    return [
        {
            "threshold": name,
            "density": runs[0][1],
            "time": float(np.median(np.array([seconds for seconds, _ in runs]) / dense)),
            "seconds": float(np.median([seconds for seconds, _ in runs])),
            **about,
        }
        for name, runs in found.items()
    ]


def _run(pipe: WanPipeline, arm: Any, options: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of the denoising loop and the density of its attention."""
    with torch.no_grad():
        text, nothing = pipe.encode_prompt(
            "a red circle moving right", max_sequence_length=32, device=torch.device("cpu")
        )
    with dit_accel.attach(pipe, *([arm] if arm else [])) as attachment:
        started = time.perf_counter()
        pipe(
            prompt_embeds=text,
            negative_prompt_embeds=nothing,
            num_frames=options.num_frames,
            height=64,
            width=64,
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        return time.perf_counter() - started, attachment.report().density


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table under a line that says how they were made."""
    first = rows[0]
    lines = [
        f"{first['tokens']} tokens ({first['num_frames']} frames), {first['steps']} steps, tiles of "
        f"{first['block_size']}, {first['threads']} threads, torch {first['torch']}, {first['rounds']} rounds",
        "",
        "| threshold | density of the run | time over dense |",
        "|---|---|---|",
    ]
    lines += [f"| {row['threshold']} | {row['density']:.3f} | {row['time']:.2f} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
