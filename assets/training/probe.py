"""Shows at which noise levels the video model heeds which words: `python assets/training/probe.py`.

A word that is learned lowers the loss against the same prompt with that word exchanged.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from common import RUNS
from dit_accel_assets import clips, prompts, world
from pool import encode_clips
from subjects import Video

PARTS = ("", "color", "shape", "texture", "motion", "ground")


def swapped(scene: world.Scene, part: str) -> str:
    """Return the scene's prompt with one of its words exchanged for another one (or none, for "")."""
    thing, change = scene.things[0], {}
    for name, words in (("color", tuple(world.COLORS)), ("shape", world.SHAPES), ("texture", world.TEXTURES)):
        if part == name:
            change = {name: words[(words.index(getattr(thing, name)) + 2) % len(words)]}
    if part == "motion":
        x, y = clips.DIRECTIONS[thing.motion.split()[1]]
        change = {"motion": "moving " + next(name for name, step in clips.DIRECTIONS.items() if step == (-x, -y))}
    if part == "ground":
        names = tuple(world.GROUNDS)
        scene = replace(scene, ground=names[(names.index(scene.ground) + 2) % len(names)])
    return prompts.prompt_of(replace(scene, things=(replace(thing, **change), *scene.things[1:])))


@torch.no_grad()
def main() -> None:
    """Print the loss per noise level with the right words, and what each kind of exchanged word adds to it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="packed model; without it the checkpoints in --runs")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--count", type=int, default=24, help="clips (default %(default)s)")
    parser.add_argument("--size", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, name = Video().load(args.model, args.runs)
    drawn = (world.scene_of(91, index, height=args.size, width=args.size) for index in range(100 * args.count))
    scenes = [scene for scene in drawn if scene.things[0].motion.startswith("moving")][: args.count]
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{part}"]).view(shape) for part in ("mean", "std"))
    latents = (encode_clips(pipe.vae, scenes).float() - mean) / std
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    states = {
        part: pipe.encode_prompt([swapped(scene, part) for scene in scenes], do_classifier_free_guidance=False)[0]
        for part in PARTS
    }
    print(name)
    for level in (1.0, 0.97, 0.93, 0.85, 0.7, 0.5):
        mixed, time = torch.lerp(latents, noise, level), torch.full((len(scenes),), level * 1000)
        loss = {
            part: (pipe.transformer(mixed, time, text, return_dict=False)[0] - (noise - latents)).square().mean().item()
            for part, text in states.items()
        }
        added = "  ".join(f"{part} {loss[part] - loss['']:+.4f}" for part in PARTS if part)
        print(f"level {level:.2f}: loss {loss['']:.4f}  {added}", flush=True)


if __name__ == "__main__":
    main()
