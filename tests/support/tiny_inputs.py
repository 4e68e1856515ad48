"""What tiny models share: how one is described, and inputs of 7 x 4 x 8 or 8 x 10 tokens, no two sizes alike."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch

from dit_accel.testing.adapter_checks import TinyModel

ROWS, COLUMNS = 8, 10
HEADS = dict(attention_head_dim=16, num_attention_heads=2)
FOUR = dict(in_channels=4, out_channels=4)
FLUX_LIKE = dict(
    HEADS, in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
)


def model(
    cls: str, inputs: Callable[[int], Mapping[str, Any]], *left_alone: str, reference_frames: int = 0,
    max_batch: int = 2, **config: Any,
) -> TinyModel:  # fmt: skip
    """Describe a tiny model of a class of diffusers."""
    return TinyModel(
        transformer=getattr(diffusers, cls), config=config, inputs=inputs, left_alone=left_alone,
        reference_frames=reference_frames, max_batch=max_batch,
    )  # fmt: skip


def family(cls: str, inputs: Any, *left_alone: str, **config: Any) -> tuple[TinyModel, ...]:
    """Describe the tiny models of a family whose one class has one config, a model for each kind of inputs."""
    return tuple(model(cls, one, *left_alone, **config) for one in (inputs if isinstance(inputs, tuple) else (inputs,)))


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


def image(batch: int, height: int = 16, width: int = 20, **inputs: Any) -> dict[str, Any]:
    """Latents [B, C, H, W], a timestep and text."""
    return dict(
        hidden_states=torch.randn(batch, 4, height, width), timestep=steps(batch, 0.5),
        encoder_hidden_states=torch.randn(batch, 6, 16),
    ) | inputs  # fmt: skip


def video(batch: int, channels: int = 4, text: int = 16, **inputs: Any) -> dict[str, Any]:
    """Latents [B, C, 7, 8, 16], a timestep and text of so many channels."""
    return dict(
        hidden_states=torch.randn(batch, channels, 7, 8, 16), timestep=steps(batch),
        encoder_hidden_states=torch.randn(batch, 6, text),
    ) | inputs  # fmt: skip


def masked_video(batch: int, **inputs: Any) -> dict[str, Any]:
    """The same with a mask of the text, as numbers."""
    return video(batch, encoder_attention_mask=text_mask(batch).long(), **inputs)
