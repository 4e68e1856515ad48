"""A second question that training asks of the transformer: what is seen at each token, read from its middle block.

The world is drawn, so that shape, colour, texture and motion of what covers a token are known. To have a block tell
them makes words and places meet early, as aligning a block with an image encoder's features does (REPA, arXiv
2410.06940). The reader is left behind when a model is packed.
"""

from __future__ import annotations

import numpy as np
import torch
from dit_accel_assets import painter, world
from torch import Tensor, nn

TOKEN = 8
"""Side of a token in pixels: the autoencoder's four times the transformer's two."""
MOST = 3
"""Things in a scene at most."""
QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": world.SHAPES,
    "color": tuple(world.COLORS),
    "texture": world.TEXTURES,
    "motion": world.MOTIONS,
}
WIDTHS = tuple(len(words) + 1 for words in QUESTIONS.values())
"""Answers to each question, the last one being the background."""


def coverage(scene: world.Scene, frames: int) -> Tensor:
    """Return how much of each token each thing covers, uint8 [3, F', h, w] in 0..255, by latent frames."""
    seen = torch.from_numpy(painter.masks(scene, frames)).float()
    seen = torch.nn.functional.avg_pool2d(seen, TOKEN)
    later = seen[:, 1:].unflatten(1, (-1, 2)).mean(2)  # the autoencoder joins two frames, but for the first one
    seen = torch.cat([seen[:, :1], later], 1)
    padded = torch.zeros(MOST, *seen.shape[1:])
    padded[: len(seen)] = seen
    return (padded * 255).round().to(torch.uint8)


class Reader(nn.Module):
    """Answers every question for every token from a block's output [B, S, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.answer = nn.LayerNorm(width), nn.Linear(width, sum(WIDTHS))

    def loss(self, states: Tensor, scenes: list[world.Scene], seen: Tensor) -> Tensor:
        """Return the mean over questions and tokens of the cross-entropy with the shares that are seen there."""
        shares = seen.float().div(255).flatten(2)  # [B, 3, S]
        rest = 1 - shares.sum(1, keepdim=True)
        losses = []
        for (name, words), logits in zip(
            QUESTIONS.items(), self.answer(self.norm(states.float())).split(WIDTHS, -1), strict=True
        ):
            answers = np.zeros((len(scenes), MOST, len(words)), dtype=np.float32)
            for place, scene in enumerate(scenes):
                for index, thing in enumerate(scene.things):
                    answers[place, index, words.index(getattr(thing, name))] = 1.0
            wanted = torch.cat([shares.mT @ torch.from_numpy(answers), rest.mT], -1)
            losses.append(-(wanted * logits.log_softmax(-1)).sum(-1).mean())
        return torch.stack(losses).mean()
