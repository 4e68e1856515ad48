"""Shows at which noise levels the transformer heeds which words: `python assets/training/probe.py`.

A word that is learned lowers the loss against the same prompt with that word exchanged.
"""

from __future__ import annotations

import numpy as np
import torch
from common import RUNS
from diffusers import WanPipeline
from dit_accel_assets import clips, model_path
from train_transformer import Pool


def swapped(scene: clips.Scene, part: str) -> str:
    """Return the scene's prompt with one of its words exchanged for the farthest other one (or none, for "")."""
    color, shape, direction, background = scene.words
    if part == "direction":
        x, y = clips.DIRECTIONS[direction]
        direction = next(name for name, step in clips.DIRECTIONS.items() if step == (-x, -y))
    elif part == "color":
        color = "white" if color != "white" else "red"
    elif part == "shape":
        shape = clips.SHAPES[(clips.SHAPES.index(shape) + 2) % len(clips.SHAPES)]
    return f"a {color} {shape} moving {direction} on a {background} background"


@torch.no_grad()
def main() -> None:
    """Print the loss per noise level with the right words and with each kind of word exchanged."""
    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(model_path(), torch_dtype=torch.float32, local_files_only=True)
    pool = Pool(RUNS / "pool", 17, pipe.vae)
    latents, scenes = (pool.latents[:24].float() - pool.mean) / pool.std, pool.scenes[:24]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    states = {
        part: pipe.encode_prompt([swapped(scene, part) for scene in scenes], do_classifier_free_guidance=False)[0]
        for part in ("", "color", "shape", "direction")
    }
    for level in (1.0, 0.98, 0.95, 0.9, 0.8, 0.6):
        mixed, time = torch.lerp(latents, noise, level), torch.full((len(scenes),), 1000 * level)
        losses = {
            part or "right words": (pipe.transformer(mixed, time, text, return_dict=False)[0] - (noise - latents))
            for part, text in states.items()
        }
        print(level, {part: round(float(np.square(error.numpy()).mean()), 4) for part, error in losses.items()})


if __name__ == "__main__":
    main()
