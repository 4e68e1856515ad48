"""From an output's size in pixels and frames to its token layout, by a family's sizes alone."""

import math

from ..adapters.adapter import Family
from ..errors import ConfigError
from ..plan.layout import TokenLayout

MOST_STEPS = 10_000
"""Denoising steps beyond which a number is a slip: models know 1,000 levels of noise."""


def pixel_multiples(family: Family) -> tuple[int, int]:
    """Return what the output's height and width must be multiples of, in pixels."""
    height, width = (math.lcm(family.vae[1] * patch, family.size_multiple) for patch in family.patch[1:])
    return height, width


def rounded_frames(family: Family, num_frames: int) -> int:
    """Return the number of frames the pipeline makes of a request: t k + 1, as WanPipeline rounds.

    Raises:
        ConfigError: for a number under 1, or more than one frame of an image model.
    """
    if num_frames < 1:
        raise ConfigError(f"num_frames must be >= 1, got {num_frames}; 1 makes an image")
    step = family.vae[0]
    if step == 1:
        if num_frames != 1:
            raise ConfigError(f"{family.name} makes images, got num_frames {num_frames}; leave it out or set it to 1")
        return 1
    return num_frames if num_frames % step == 1 else num_frames // step * step + 1


def token_layout(family: Family, *, height: int, width: int, num_frames: int) -> TokenLayout:
    """Return the token layout of an output of so many pixels and (rounded) frames.

    Raises:
        ConfigError: for a size the model can't make, with the nearest one it can.
    """
    for name, value, multiple in zip(("height", "width"), (height, width), pixel_multiples(family), strict=True):
        check_multiple(name, value, multiple, family.name)
    (step, scale), (patch_frames, patch_height, patch_width) = family.vae, family.patch
    latent_frames = 1 + (num_frames - 1) // step
    return TokenLayout(
        frames=-(-latent_frames // patch_frames),  # models with a temporal patch pad the latents to whole patches
        height=height // (scale * patch_height),
        width=width // (scale * patch_width),
        text_after=family.text_tokens,
    )


def check_steps(count: int) -> None:
    """Raise `ConfigError` for a number of denoising steps that no run can have: below 1 or above `MOST_STEPS`."""
    if count < 1:
        raise ConfigError(f"num_inference_steps must be >= 1, got {count}")
    if count > MOST_STEPS:
        raise ConfigError(f"num_inference_steps must be at most {MOST_STEPS:,}, got {count:,}")


def check_multiple(name: str, value: int, multiple: int, model: str) -> None:
    """Raise `ConfigError` for a size in pixels that is no positive multiple of ``multiple``, with the nearest one."""
    if value < multiple or value % multiple:
        nearest = max(multiple, (value + multiple // 2) // multiple * multiple)
        raise ConfigError(f"{name} must be a multiple of {multiple} for {model}, got {value}; the nearest is {nearest}")
