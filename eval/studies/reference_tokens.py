"""What `ReferenceCache` saves and loses: the embedded image model called as FLUX.1 Kontext, with pictures of its own.

It was not trained on references, so the error is that of trained weights on a task that they do not know. CPU seconds
of one thread, with the text encoder and decoder:
``python eval/studies/reference_tokens.py > eval/results/reference-tokens.jsonl``.
"""

import json
import os
import time
from statistics import fmean
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from dit_accel_assets import held_out_prompts, load, model_defaults
from dit_accel_eval.runs.loaded import processor_name
from PIL import Image

from dit_accel import ReferenceCache, attach

CLIPS = range(64, 68)
SIDES = (96, 192, 288)  # of the reference, in pixels: 144, 576, 1,296 tokens beside the picture's 144
STEPS = (20, 8, 4)
EVERY = (2, 4, 20)


def picture(pipe: Any, prompt: str, seed: int, **call: Any) -> tuple[np.ndarray, float]:
    """Return a picture [H, W, 3] in [0, 1] and the CPU seconds that it took."""
    began = time.process_time()
    made = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **call)
    return made.images[0], time.process_time() - began


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Return the PSNR of two pictures, in dB."""
    return float(-10 * np.log10(max(((one - other) ** 2).mean(), 1e-10)))


def main() -> None:
    """Print a line for each size of the reference and number of steps."""
    torch.set_num_threads(1)
    plain = load("flux-tiny")
    pipe = FluxKontextPipeline(**plain.components)
    for each in (plain, pipe):
        each.set_progress_bar_config(disable=True)
    defaults, prompts = model_defaults("flux-tiny"), held_out_prompts("flux-tiny", CLIPS.stop + 1)
    kept = {"true_cfg_scale", "negative_prompt", "max_sequence_length"}
    shared = {name: value for name, value in defaults.items() if name in kept}
    size = {"height": defaults["height"], "width": defaults["width"]}
    about = {"processor": processor_name(), "threads": 1, "torch": torch.__version__}
    for side in SIDES:
        given = {"height": side, "width": side, "num_inference_steps": 20}
        pictures = {n: picture(plain, prompts[n], n, **shared, **given)[0] for n in CLIPS}
        sources = {n: Image.fromarray((255 * one).round().astype("uint8")) for n, one in pictures.items()}
        for steps in STEPS:
            call = {**shared, **size, "num_inference_steps": steps, "_auto_resize": False, "max_area": 96 * 96}

            def made(call: dict[str, Any] = call, sources: dict[int, Image.Image] = sources) -> list[Any]:
                return [picture(pipe, prompts[n + 1], n, image=sources[n], **call) for n in CLIPS]

            dense = made()
            base = fmean(seconds for _, seconds in dense)
            line: dict[str, Any] = {"reference_tokens": (side // 8) ** 2, "steps": steps, "seconds": round(base, 2)}
            for every in EVERY:
                with attach(pipe, ReferenceCache(refresh_every=every), preset="none", backend="torch"):
                    ours = made()
                off = [psnr(one, other) for (one, _), (other, _) in zip(ours, dense, strict=True)]
                share = fmean(seconds for _, seconds in ours) / base
                line[f"every {every}"] = {"time": round(share, 3), "psnr": [round(db, 1) for db in off]}
            print(json.dumps({**line, "load": os.getloadavg()[0], **about}), flush=True)


if __name__ == "__main__":
    main()
