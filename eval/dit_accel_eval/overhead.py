"""Measures what an attached method that saves nothing costs a step: `python -m dit_accel_eval.overhead`.

Two copies of the embedded model, one plain and one attached, take each step in turn; processor time is compared pair
by pair, so that other work on the machine does not count. The caches measure what they would decide by, and never
skip; PAG in free mode perturbs a layer of every forward, as it does in the unconditional ones of a run.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from dit_accel_assets import model_path
from torch import Tensor

import dit_accel
from dit_accel.files import written_whole
from dit_accel.methods.config import MethodConfig

from .machine import processor

NEVER = 1e-12
"""A threshold below which nothing lies; with 0 nothing would be measured."""

METHODS: dict[str, MethodConfig | None] = {
    "plain again": None,
    "radial, dense": dit_accel.RadialAttention(dense_steps=1000),
    "easycache": dit_accel.EasyCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "teacache": dit_accel.TeaCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "magcache": dit_accel.MagCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "firstblockcache": dit_accel.FirstBlockCache(threshold=NEVER, warmup_steps=0, predictor="taylor"),
    "pag, free mode": dit_accel.PAG(layers="L1", mode="free"),
}
"""Name of an arm -> what is attached; the first shows what the measurement itself is off by."""


LATENTS = (1, 12, 9, 16, 16)
"""[B, C, T, H, W] of the model's default clip."""


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the lines of a run as a Markdown table under a sentence on how they were measured."""
    first = records[0]
    head = (
        f"{first['pairs']} steps on each of two copies in turn, {first['threads']} thread of processor time, torch "
        f"{first['torch']}, {first['processor']}; medians and their 95 % intervals. Plain steps take "
        f"{1000 * first['plain_seconds_a_step']:.0f} ms."
    )
    rows = ["| attached, all computed | more than a plain step | in ms |", "|---|---|---|"]
    for line in records:
        share, (low, high) = line["overhead"], line["overhead_interval"]
        more = 1000 * share * line["plain_seconds_a_step"]
        rows.append(f"| {line['arm']} | {share:+.1%} [{low:+.1%}, {high:+.1%}] | {more:+.1f} |")
    return f"{head}\n\n" + "\n".join(rows)


def main() -> None:
    """Print one JSON line an arm: processor seconds a step, and the median overhead with its 95 % interval."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=300, help="steps that both copies take")
    parser.add_argument("--steps", type=int, default=20, help="of one generation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the lines to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for name, method in METHODS.items():
        seconds = _measured(method, options.pairs, options.steps)
        shares = seconds[:, 1] / seconds[:, 0] - 1
        draws = np.random.default_rng(0).choice(shares, (2000, len(shares)))
        interval = np.quantile(np.median(draws, 1), (0.025, 0.975))
        line = {
            "arm": name,
            "plain_seconds_a_step": float(np.median(seconds[:, 0])),
            "overhead": float(np.median(shares)),
            "overhead_interval": [float(interval[0]), float(interval[1])],
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


@torch.no_grad()
def _measured(method: MethodConfig | None, pairs: int, steps: int) -> np.ndarray:
    """Return processor seconds of each step, [pairs, plain and attached]; the first two steps warm up."""
    plain, other = (WanTransformer3DModel.from_pretrained(model_path() / "transformer") for _ in range(2))
    torch.manual_seed(0)
    text, seconds = torch.randn(1, 32, plain.config["text_dim"]), np.zeros((pairs + 2, 2))
    x = torch.randn(LATENTS)
    with dit_accel.attach(other, method) if method else contextlib.nullcontext():
        for pair in range(pairs + 2):
            step = pair % steps
            x = torch.randn(LATENTS) if step == 0 else 0.98 * x
            for place in (0, 1) if pair % 2 else (1, 0):
                seconds[pair, place] = _step((plain, other)[place], x, text, step, steps)
    return seconds[2:]


def _step(transformer: WanTransformer3DModel, x: Tensor, text: Tensor, step: int, steps: int) -> float:
    with transformer.cache_context("uncond", step_index=step, num_inference_steps=steps):
        started = time.process_time()
        transformer(x, torch.tensor([1000.0 * (1 - step / steps)]), text, return_dict=False)
        return time.process_time() - started


if __name__ == "__main__":
    main()
