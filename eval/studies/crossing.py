"""From how many tokens on sparse attention takes less time than dense, in layers with two embedded models' attention.

CPU seconds of one thread, the least of two; alone: ``python eval/studies/crossing.py > eval/results/crossing.jsonl``.
"""

import json
import math
import os
import time
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from dit_accel_eval.runs.loaded import processor_name

from dit_accel import SparseD, attach

SHAPES = {"wan-plain": (5, 32), "flux-tiny": (2, 64)}  # heads and channels of one
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SKIPPED = SparseD(density=0.3, block_size=64, dense_steps=0, dense_layers=0)
CACHED = {f"cached, every {n}": replace(SKIPPED, rest="cached", refresh=n) for n in (3, 6)}
ARMS = {"dense": None, "skipped": SKIPPED, **CACHED}


@torch.no_grad()
def seconds(layers: WanTransformer3DModel, tokens: int, method: SparseD | None) -> float:
    """Return the seconds of six forwards after the first, in which each layer of a cached arm has its turns."""
    inputs = torch.randn(1, 4, tokens // 64, 16, 16), torch.randn(1, 8, 32)
    attachment = None if method is None else attach(layers, method, backend="torch")
    times = []
    for step in range(7):
        times.append(time.process_time())
        layers(inputs[0], torch.tensor([900 - 100 * step]), inputs[1])
    if attachment is not None:
        attachment.detach()
    return time.process_time() - times[1]


def main() -> None:
    """Print a line for each length, and one for each arm with the length at which it takes as long as dense."""
    torch.set_num_threads(1)
    about = {"threads": 1, "processor": processor_name(), "torch": torch.__version__}
    for shape, (heads, size) in SHAPES.items():
        small: dict[str, Any] = dict(
            in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=3 * heads * size, num_layers=3
        )
        layers = WanTransformer3DModel(num_attention_heads=heads, attention_head_dim=size, **small).eval()
        shares = []
        for tokens in LENGTHS:
            rounds = [[seconds(layers, tokens, arm) for arm in ARMS.values()] for _ in range(2)]
            dense, *sparse = (min(times) for times in zip(*rounds, strict=True))
            shares.append([taken / dense for taken in sparse])
            line = {"shape": shape, "tokens": tokens, **dict(zip(ARMS, [dense, *shares[-1]], strict=True))}
            print(json.dumps({**line, "load": os.getloadavg()[0], **about}), flush=True)
        for arm, points in zip([*ARMS][1:], zip(*shares, strict=True), strict=True):
            lines = zip(LENGTHS, LENGTHS[1:], points, points[1:], strict=False)
            passes = [a * (b / a) ** (math.log(x) / math.log(x / y)) for a, b, x, y in lines if x > 1 >= y]
            print(json.dumps({"shape": shape, "arm": arm, "crossing": passes, **about}), flush=True)


if __name__ == "__main__":
    main()
