"""Shows at which noise levels the transformer heeds which words: `python assets/training/probe.py [--run RUN]`.

A word that is learned lowers the loss against the same prompt with that word exchanged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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


def load(run: Path | None) -> WanPipeline:
    """Return the packaged pipeline, with the averaged weights of a training's checkpoint where one is given."""
    pipe = WanPipeline.from_pretrained(model_path(), dtype=torch.float32, local_files_only=True)
    if run is not None:
        state = torch.load(run / "checkpoint.pt", weights_only=False)
        for name in ("transformer", "text_encoder"):
            getattr(pipe, name).load_state_dict(state["averages"][name], strict=False)
        print(f"step {state['step']} of {run}")
    return pipe


@torch.no_grad()
def main() -> None:
    """Print the loss per noise level with the right words, and what each kind of exchanged word adds to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a training whose checkpoint is probed")
    parser.add_argument("--count", type=int, default=24, help="clips (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(args.run)
    pool = Pool(RUNS / "pool", 17, pipe.vae)
    latents, scenes = (pool.latents[: args.count].float() - pool.mean) / pool.std, pool.scenes[: args.count]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    states = {
        part: pipe.encode_prompt([swapped(scene, part) for scene in scenes], do_classifier_free_guidance=False)[0]
        for part in ("", "color", "shape", "direction")
    }
    for level, hint in ((1.0, 1.0), (0.98, 0.98), (0.95, 0.95), (0.9, 0.9), (0.8, 0.8), (0.6, 0.6), (1.0, 0.2)):
        levels = torch.full((latents.shape[2],), level)
        levels[0] = hint
        mixed = torch.lerp(latents, noise, levels[:, None, None])
        time = (levels * 1000).repeat_interleave(latents[0, 0, 0].numel() // 4).expand(len(scenes), -1)
        loss = {
            part: (pipe.transformer(mixed, time, text, return_dict=False)[0] - (noise - latents)).square().mean().item()
            for part, text in states.items()
        }
        added = "  ".join(f"{part} {loss[part] - loss['']:+.4f}" for part in states if part)
        print(f"level {level:.2f}, first frame {hint:.2f}: loss {loss['']:.4f}  {added}", flush=True)


if __name__ == "__main__":
    main()
