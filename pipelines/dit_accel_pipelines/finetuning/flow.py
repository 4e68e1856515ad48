"""Flow matching (arXiv 2210.02747, 2403.03206): what one clip of a training is mixed with, drawn by its number alone.

So a training gives the same whatever number of processes share its steps, and goes on exactly where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .encoded import Encoded
from .experts import ALL_LEVELS
from .recipe import FineTuning
from .trainable import Text, Trainable


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Clips of one forward."""

    latents: Tensor  # [B, C, F, h, w], float32
    noise: Tensor  # the same shape, normal
    levels: Tensor  # noise levels [B] in 0..1
    text: Text  # the captions, encoded


def order(seed: int, clips: int, number: int) -> int:
    """Return the clip that stands at a place of the training, which goes through all clips again and again."""
    rounds, place = divmod(number, clips)
    return int(np.random.default_rng([seed, rounds]).permutation(clips)[place])


def batch_of(
    numbers: Sequence[int], encoded: Encoded, recipe: FineTuning, shift: float, span: tuple[float, float] = ALL_LEVELS
) -> Batch:
    """Return the clips at some places of a training, with noise and noise levels that depend on the place alone.

    Args:
        numbers: the places, counted from the training's beginning.
        shift: of the noise levels towards noise.
        span: the least and the highest noise level.
    """
    clips = [_one(number, encoded, recipe, shift, span) for number in numbers]
    *parts, texts = zip(*clips, strict=True)
    latents, noise, levels = (torch.stack(part) for part in parts)
    text = {name: torch.stack([embeddings[name] for embeddings in texts]) for name in texts[0]}
    return Batch(latents=latents, noise=noise, levels=levels, text=text)


def _one(
    number: int, encoded: Encoded, recipe: FineTuning, shift: float, span: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Text]:
    place = order(recipe.seed, len(encoded), number)
    drawn = int(np.random.SeedSequence([recipe.seed, number]).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(drawn)
    level = level_within(generator, shift, span)
    dropped = float(torch.rand((), generator=generator)) < recipe.caption_dropout
    latents = encoded.latents(place)
    noise = torch.randn(latents.shape, generator=generator)
    return latents, noise, level, encoded.no_caption() if dropped else encoded.text(place)


def level_within(generator: torch.Generator, shift: float, span: tuple[float, float]) -> Tensor:
    """Return a noise level, logit-normal and shifted, of those within the span."""
    if span == ALL_LEVELS:
        return shifted(torch.sigmoid(torch.randn((), generator=generator)), shift)
    ends = torch.special.ndtr(torch.logit(shifted(torch.tensor(span, dtype=torch.float64), 1 / shift), eps=1e-12))
    share = torch.rand((), generator=generator, dtype=torch.float64)
    level = shifted(torch.sigmoid(torch.special.ndtri(torch.lerp(ends[0], ends[1], share))), shift)
    return level.clamp(*span).float()


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Return noise levels moved towards noise, as flow matching's schedulers shift theirs."""
    return shift * levels / (1 + (shift - 1) * levels)


def batch_loss(
    transformer: Any, pipe: Any, trainable: Trainable, batch: Batch, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the mean squared error of the velocity, noise less clip, in float32."""
    mixed = torch.lerp(batch.latents, batch.noise, batch.levels.view(-1, 1, 1, 1, 1))
    text = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)  # masks stay what they are
        for name, value in batch.text.items()
    }
    velocity = trainable.velocity(transformer, pipe, mixed.to(device, dtype), batch.levels.to(device), text)
    wanted = (batch.noise - batch.latents).to(device)
    return (velocity.float() - wanted).square().mean()
