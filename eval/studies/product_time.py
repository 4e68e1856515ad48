"""Times a sparse method, a step cache and both together: `python eval/studies/product_time.py`.

What both save together should be the product of what each saves alone. Blocks of Wan 2.1 1.3B's shape with random
weights make the forwards, over 4,200 tokens; processor time of one thread is compared, arm by arm in turn. About 6
minutes.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from dit_accel_eval.bench.loop import in_turn
from dit_accel_eval.runs.results import Line
from dit_accel_pipelines.families.wan import WAN
from study import about, seconds_of, study

import dit_accel
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


def page_text(lines: Sequence[Line]) -> str:
    """Return the last run's line as a sentence."""
    line = lines[-1]
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
    """Write one JSON line: what each arm takes of the dense one, and product over both; returns the exit code."""
    return study(__doc__, arguments, measure, page_text, out="product-time.jsonl", layers=1, steps=8, rounds=3)


def measure(options: Any, lines: list[Line]) -> Iterator[Line]:
    """Give the line of a run."""
    transformer = make_transformer(options.layers)

    def run(methods: tuple[MethodConfig, ...]) -> tuple[float, float]:
        with dit_accel.attach(transformer, *methods, preset="none") as attachment:
            seconds = seconds_of(lambda: denoise(transformer, options.steps))
            return seconds, attachment.report().density

    denoise(transformer, 1)  # warms up
    arms = {name: partial(run, methods) for name, methods in ARMS.items()}
    runs = list(in_turn(arms, options.rounds, warm_up=0))
    seconds = {name: np.array([one[name][0] for one in runs]) for name in ARMS}
    shares = {name: seconds[name] / seconds["dense"] for name in ARMS}
    off = shares["both"] / (shares["sparse"] * shares["cache"]) - 1
    yield {
        "layers": options.layers, "steps": options.steps, "rounds": options.rounds, "tokens": 21 * 10 * 20,
        "density": runs[-1]["sparse"][1], "dense_seconds": float(np.median(seconds["dense"])),
        **{f"{name}_share": float(np.median(share)) for name, share in shares.items() if name != "dense"},
        "both_over_product": float(np.median(off)), "both_over_product_range": [float(off.min()), float(off.max())],
        **about(),
    }  # fmt: skip


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
