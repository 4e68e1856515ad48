"""Inputs that tiny image models share: position ids, masks, packed and unpacked latents; height and width different."""

from typing import Any

import torch

ROWS, COLUMNS = 8, 10
HEADS = dict(attention_head_dim=16, num_attention_heads=2)
FLUX_LIKE = dict(
    HEADS, in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
)


def steps(batch: int, value: float = 500.0) -> torch.Tensor:
    return torch.full((batch,), value)


def text_mask(batch: int, tokens: int = 6) -> torch.Tensor:
    """Row 0 has one padded token, every further row one more."""
    return torch.arange(tokens)[None] < tokens - 1 - torch.arange(batch)[:, None]


def ids(height: int = ROWS, width: int = COLUMNS, image: int = 0, columns: int = 3) -> torch.Tensor:
    """Position ids (image, row, column, 0 ...) of one image in raster order."""
    rows, places = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zeros = [torch.zeros_like(rows)] * (columns - 3)
    return torch.stack([torch.full_like(rows, image), rows, places, *zeros], -1).flatten(0, 1).float()


def packed(batch: int, references: bool = False, columns: int = 3) -> dict[str, Any]:
    """FLUX.1's inputs, with a reference image of 2 x 3 tokens behind the image or without."""
    places = [ids(columns=columns)] + [ids(2, 3, 1, columns)] * references
    return dict(
        hidden_states=torch.randn(batch, sum(map(len, places)), 4), timestep=steps(batch, 0.5),
        encoder_hidden_states=torch.randn(batch, 6, 16), txt_ids=torch.zeros(6, columns), img_ids=torch.cat(places),
    )  # fmt: skip


def image(batch: int, height: int = 16, width: int = 20) -> dict[str, Any]:
    """Latents [B, C, H, W], a timestep and text."""
    return dict(
        hidden_states=torch.randn(batch, 4, height, width), timestep=steps(batch, 0.5),
        encoder_hidden_states=torch.randn(batch, 6, 16),
    )  # fmt: skip
