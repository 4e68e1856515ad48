"""Times a sparse method, a step cache and both together: `python eval/studies/product_time.py`.

What both save together should be the product of what each saves alone. Blocks of Wan 2.1 1.3B's shape with random
weights make the forwards, over 4,200 tokens; processor time of one thread is compared, arm by arm in turn. About 6
minutes.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from dit_accel_eval.runs.machine import processor
from dit_accel_pipelines.families.wan import WAN

import dit_accel
from dit_accel.files import written_whole
from dit_accel.methods.config import MethodConfig

LATENTS = (1, 16, 21, 20, 40)
"""[B, C, T, H, W]: 21 x 10 x 20 tokens."""

RADIAL = dit_accel.RadialAttention(dense_steps=0, dense_last_steps=0, dense_layers=0, block_size=32, decay_factor=0.2)
CACHE = dit_accel.StaticCache(every=2, warmup_steps=2, last_steps=1, predictor="taylor")
ARMS: dict[str, tuple[MethodConfig, ...]] = {
    "dense": (),
    "sparse": (RADIAL,),
    "cache": (CACHE,),
    "both": (RADIAL, CACHE),
}


def told(line: dict[str, Any]) -> str:
    """Return a run's line as a sentence."""
    low, high = line["both_over_product_range"]
    return (
        f"{line['layers']} block of Wan 2.1 1.3B's shape with random weights, {line['tokens']} tokens, "
        f"{line['steps']} steps, {line['rounds']} rounds, {line['threads']} thread of processor time, torch "
        f"{line['torch']}, {line['processor']}: Radial at density {line['density']:.2f} takes "
        f"{line['sparse_share']:.2f} of the dense time, a cache that computes every second step "
        f"{line['cache_share']:.2f}, both {line['both_share']:.2f}: {line['both_over_product']:+.1%} "
        f"[{low:+.1%}, {high:+.1%}] from the product."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write one JSON line: seconds of each arm, what each takes of the dense one, and product over both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "product-time.jsonl")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformer = make_transformer(options.layers)
    seconds, density = {name: [] for name in ARMS}, 1.0
    denoise(transformer, 1)  # warms up
    for _ in range(options.rounds):
        for name, methods in ARMS.items():
            with dit_accel.attach(transformer, *methods) as attachment:
                started = time.process_time()
                denoise(transformer, options.steps)
                seconds[name].append(time.process_time() - started)
                density = attachment.report().density if name == "sparse" else density
    shares = {name: np.array(seconds[name]) / np.array(seconds["dense"]) for name in ARMS}
    off = shares["both"] / (shares["sparse"] * shares["cache"]) - 1
    line = {
        "layers": options.layers, "steps": options.steps, "rounds": options.rounds, "tokens": 21 * 10 * 20,
        "density": density, "dense_seconds": float(np.median(seconds["dense"])),
        **{f"{name}_share": float(np.median(share)) for name, share in shares.items() if name != "dense"},
        "both_over_product": float(np.median(off)), "both_over_product_range": [float(off.min()), float(off.max())],
        "threads": 1, "torch": torch.__version__, "processor": processor(),
    }  # fmt: skip
    print(json.dumps(line))
    with written_whole(options.out) as path:
        path.write_text(json.dumps(line) + "\n")
    return 0


def make_transformer(layers: int) -> WanTransformer3DModel:
    """Return blocks of the released model's shape with random weights."""
    family = next(one for one in WAN.families if one.name == "wan2.1-1.3b")
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_layers=layers, num_attention_heads=family.heads, attention_head_dim=family.head_dim, ffn_dim=family.ffn_dim
    ).eval()


@torch.no_grad()
def denoise(transformer: WanTransformer3DModel, steps: int) -> None:
    """Run steps of the transformer, as a pipeline without guidance does."""
    torch.manual_seed(1)
    x, text = torch.randn(LATENTS), torch.randn(1, 512, 4096)
    for step in range(steps):
        with transformer.cache_context("cond", step_index=step, num_inference_steps=steps):
            x = x - transformer(x, torch.tensor([1000.0 * (1 - step / steps)]), text, return_dict=False)[0] / steps


if __name__ == "__main__":
    raise SystemExit(main())
