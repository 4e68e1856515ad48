"""Latents of drawn clips of one picture size, with what is seen at every place, encoded once and kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from common import autocast
from diffusers import AutoencoderKLWan
from dit_accel_assets import painter, prompts, world
from loop import all_of, process, save_atomic
from reading import coverage
from torch import Tensor
from train_vae import to_tensor

SHARD = 250


class Pool:
    """Clips of one size and length, encoded where they are not on disk yet; prompts are drawn anew at each use.

    Of one frame they are the first pictures of clips, with the clips' prompts.
    """

    def __init__(
        self, folder: Path, vae: AutoencoderKLWan, seed: int, height: int, width: int, frames: int, count: int
    ) -> None:
        if count % SHARD:
            raise ValueError(f"a pool of {count} clips is not a whole number of shards; use a multiple of {SHARD}")
        self.scenes = [world.scene_of(seed, index, height=height, width=width) for index in range(count)]
        folder.mkdir(parents=True, exist_ok=True)
        firsts = range(0, count, SHARD)
        paths = [folder / f"{seed}-{height}x{width}x{frames}-{first:05d}.pt" for first in firsts]
        rank, processes = process()
        for first, path in list(zip(firsts, paths, strict=True))[rank::processes]:
            if not path.exists():
                scenes = self.scenes[first : first + SHARD]
                seen = torch.stack([coverage(scene, frames) for scene in scenes])
                save_atomic({"latents": encode_clips(vae, scenes, frames), "seen": seen}, path)
        all_of(True)  # every process has written its shards
        shards = [torch.load(path) for path in paths]
        self.latents, self.seen = (torch.cat([shard[name] for shard in shards]) for name in ("latents", "seen"))
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean).view(shape)
        self.std = torch.tensor(vae.config.latents_std).view(shape)

    def batch(
        self, rng: np.random.Generator, count: int, dropout: float
    ) -> tuple[Tensor, list[str], list[world.Scene], Tensor]:
        """Return normalised latents [B, C, F, h, w], prompts, a share `dropout` of them empty, scenes and coverage."""
        picks = rng.integers(0, len(self.latents), count)
        scenes = [self.scenes[pick] for pick in picks]
        texts = [prompts.prompt_of(scene, rng) for scene in scenes]
        texts = ["" if rng.random() < dropout else text for text in texts]
        places = torch.from_numpy(picks)
        return (self.latents[places].float() - self.mean) / self.std, texts, scenes, self.seen[places]


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, scenes: list[world.Scene], frames: int = world.FRAMES) -> Tensor:
    """Draw scenes and return the means of their latents, float16 [N, C, F, h, w]."""
    out = []
    for scene in scenes:
        with autocast():
            clip = to_tensor(painter.draw(scene, frames)[None])
            out.append(vae.encode(clip).latent_dist.mode()[0].half())
    return torch.stack(out)
