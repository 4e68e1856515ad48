"""Measures how concentrated a Wan pipeline's self-attention is, from queries and keys as its processor sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.models.transformers import transformer_wan
from dit_accel_assets import prompts, world
from torch import Tensor

TILE = 64


def tile_mass(query: Tensor, key: Tensor) -> Tensor:
    """Return the mean attention mass [query tiles, key tiles] of one head's q, k [S, D], in tiles of 64 tokens."""
    tokens = len(key)
    tiles = -(-tokens // TILE)
    logits = query.float() @ key.float().mT * query.shape[-1] ** -0.5
    shares = torch.nn.functional.pad(torch.softmax(logits, -1), (0, tiles * TILE - tokens))
    by_key = shares.view(len(query), tiles, TILE).sum(-1)
    return torch.stack([rows.mean(0) for rows in by_key.split(TILE)])


def heaviest(mass: Tensor, share: float) -> float:
    """Return which mass the heaviest `share` of the key tiles holds, mean over query tiles."""
    kept = max(1, round(share * mass.shape[1]))
    return float(mass.topk(kept, dim=1).values.sum(1).mean())


@contextmanager
def recorded(record: Any) -> Iterator[None]:
    """Call `record(query, key)` ([B, S, H, D]) at every self-attention of a Wan transformer while inside."""
    plain = transformer_wan.dispatch_attention_fn

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[1] == key.shape[1]:
            record(query, key)
        return plain(query, key, value, *args, **kwargs)

    transformer_wan.dispatch_attention_fn = spy
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = plain


@torch.no_grad()
def heaviest_mass(
    pipe: WanPipeline, scene: world.Scene, frames: int, *, share: float, guidance: float, steps: int = 4
) -> tuple[np.ndarray, int]:
    """Return the mass of the heaviest tiles, [steps, layers, heads], in the prompt's branch, and the token count."""
    layers = pipe.transformer.config.num_layers
    found: list[list[float]] = []
    tokens, calls = 0, 0

    def record(query: Tensor, key: Tensor) -> None:
        nonlocal tokens, calls
        tokens, calls = query.shape[1], calls + 1
        if (calls - 1) // layers % 2 == 0:  # the prompt's branch runs first, the empty prompt's after it
            heads = range(query.shape[2])
            found.append([heaviest(tile_mass(query[0, :, head], key[0, :, head]), share) for head in heads])

    with recorded(record):
        pipe(
            prompts.prompt_of(scene),
            height=scene.height,
            width=scene.width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    return np.asarray(found).reshape(steps, layers, -1), tokens
