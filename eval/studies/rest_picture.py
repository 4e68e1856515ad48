"""Draws a clip with a cached rest, beside the dense run and the same tiles without one: docs/cached-rest.png."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from dit_accel_assets import held_out_prompts, model_path
from PIL import Image

import dit_accel
from dit_accel import LiteAttention, SparseD
from dit_accel.methods.config import MethodConfig

CLIP = 20
"""A held-out prompt and its seed; one of those that chose settings."""

FRAMES = (0, 5, 10, 16)
COMMON: dict[str, Any] = dict(block_size=16, dense_steps=2, dense_layers=0)
ROWS: tuple[tuple[MethodConfig, ...], ...] = (
    (),
    (LiteAttention(threshold=-2.0, rest="cached", refresh=3, **COMMON),),
    (SparseD(density=0.3, rest="cached", refresh=3, rest_dtype="int4", **COMMON),),
    (LiteAttention(threshold=-2.0, **COMMON),),
)
"""What is drawn, a row each, from the top."""


def main() -> None:
    """Generate each row's clip in 20 steps and write its frames side by side, twice as large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/cached-rest.png"))
    out = parser.parse_args().out
    pipe: Any = DiffusionPipeline.from_pretrained(model_path("wan-tiny"))
    prompt, rows = held_out_prompts("wan-tiny", CLIP + 1)[CLIP], []
    for methods in ROWS:
        with dit_accel.attach(pipe, *methods, preset="none"):
            frames = pipe(
                prompt, height=64, width=64, num_frames=17, num_inference_steps=20, guidance_scale=4.0,
                generator=torch.Generator().manual_seed(CLIP), output_type="np",
            ).frames[0]  # fmt: skip
        rows.append(np.concatenate([frames[index] for index in FRAMES], axis=1))
    picture = Image.fromarray((np.concatenate(rows) * 255).round().astype("uint8"))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(out)


if __name__ == "__main__":
    main()
