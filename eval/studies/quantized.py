"""Weights in fewer bits on a CPU: their bytes, the processor's time, and how near a clip stays to that of float32.

Prints a line for each model, kind and prompt: ``python eval/studies/quantized.py > eval/results/quantized.jsonl``, and
``... wan-tiny-4 flux-tiny-4 > eval/results/quantized-few-steps.jsonl``, where also the products of queries and keys
are in int8, as the reference simulates them: its seconds say nothing about a card.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchao  # pyright: ignore[reportMissingImports]
from dit_accel_assets import held_out_prompts, model_defaults
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.request import Request, resolve

from dit_accel import SparseD, attach
from dit_accel.estimate.hardware import weight_size

KINDS = (None, "int8-weights", "int8", "fp8-weights")
FEW = (*KINDS, "int8 products of queries and keys")
PROMPTS, STEPS = 3, 20
ALL_TILES = SparseD(density=1.0, block_size=16, precision="int8", dense_steps=0, dense_layers=0)


def main() -> None:
    """Run every kind on the models named."""
    torch.set_num_threads(1)
    for model in sys.argv[1:] or ("wan-tiny", "flux-tiny"):
        plain: list[np.ndarray] = []
        for kind in FEW if steps_of(model) < STEPS else KINDS:
            for line in measured(model, kind, plain):
                print(json.dumps(line), flush=True)


def steps_of(model: str) -> int:
    """Return the steps of a model of few, else of all others."""
    return min(STEPS, int(model_defaults(model)["num_inference_steps"]))


def measured(model: str, kind: str | None, plain: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    """Give a line for each prompt of a kind; ``plain`` holds the frames in float32, and is filled by their own runs."""
    output = Path(tempfile.gettempdir()) / "none.png"  # nothing is written there
    steps, products = steps_of(model), kind == FEW[-1]
    requests = [
        resolve(Request(model=model, prompt=prompt, seed=seed, num_inference_steps=steps, device="cpu", output=output,
                        quantize=None if products else kind, preset="none")).request
        for seed, prompt in enumerate(held_out_prompts(model, PROMPTS))
    ]  # fmt: skip
    pipe = load_pipeline(requests[0])
    run(pipe, replace(requests[0], num_inference_steps=2))  # the first run is slower
    for seed, request in enumerate(requests):
        started = time.process_time()
        with attach(pipe, ALL_TILES, preset="none", backend="reference") if products else nullcontext():
            frames = run(pipe, request).frames / 255
        seconds = time.process_time() - started
        if kind is None:
            plain.append(frames)
        error = np.mean((frames - plain[seed]) ** 2)
        yield {
            "model": model, "quantize": kind, "clip": seed, "steps": steps, "seconds": round(seconds, 3),
            "weight_bytes": sum(map(weight_size, pipe.transformer.parameters())),
            "psnr": None if kind is None else round(float(-10 * np.log10(error)), 2),
            "torch": torch.__version__, "torchao": torchao.__version__, "threads": 1,
        }  # fmt: skip


if __name__ == "__main__":
    main()
