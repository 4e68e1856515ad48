"""From an output's size in pixels and frames to its token layout, and which axes of that are longer than trained."""

import math
from collections.abc import Sequence

from ..adapters.adapter import Adapter, Family
from ..errors import ConfigError
from ..methods.base import Model
from ..methods.compose import make_handlers
from ..methods.config import MethodConfig
from ..methods.registry import handler_of, methods
from ..plan.layout import TokenLayout

MOST_STEPS = 10_000
"""Denoising steps beyond which a number is a slip: models know 1,000 levels of noise."""

WHAT_HAPPENS = {"frames": "clips repeat themselves or fall apart", "height": "pictures repeat themselves"}
WHAT_HAPPENS["width"] = WHAT_HAPPENS["height"]


def pixel_multiples(family: Family) -> tuple[int, int]:
    """Return the pixels that the output's height and width must be multiples of."""
    height, width = (math.lcm(family.vae[1] * patch, family.size_multiple) for patch in family.patch[1:])
    return height, width


def rounded_frames(family: Family, num_frames: int) -> int:
    """Return the number of frames the pipeline makes of a request: t k + 1, as WanPipeline rounds."""
    if num_frames < 1:
        raise ConfigError(f"num_frames must be >= 1, got {num_frames}; 1 makes an image")
    step = family.vae[0]
    if step == 1:
        if num_frames != 1:
            raise ConfigError(f"{family.name} makes images, got num_frames {num_frames}; leave it out or set it to 1")
        return 1
    return num_frames if num_frames % step == 1 else num_frames // step * step + 1


def token_layout(family: Family, *, height: int, width: int, num_frames: int) -> TokenLayout:
    """Return the token layout of an output of so many pixels and (rounded) frames."""
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


def beyond_trained(family: Family, layout: TokenLayout) -> dict[str, tuple[int, int]]:
    """Return axis -> (tokens, trained tokens) of the axes along which a layout is longer than trained, as is known."""
    lengths = layout.lengths
    return {axis: (lengths[axis], most) for axis, most in family.trained.items() if lengths[axis] > most}


def methods_for_axis(adapter: Adapter, family: Family, axis: str) -> list[str]:
    """Return the methods that help along an axis and work on a model with nothing but their defaults.

    Those that change attention stand before those that change positions.
    """
    model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)
    names = []
    for name, config_type in methods().items():
        config = config_type()
        if name in family.not_advised or axis not in handler_of(config).extends:
            continue
        try:
            make_handlers([config], model, alone=False)
        except ConfigError:
            continue
        names.append(name)
    return names[::-1]  # the registry has those of the first phase, positions, first


def advice(adapter: Adapter, family: Family, layout: TokenLayout, attached: Sequence[MethodConfig]) -> list[str]:
    """Return advice to a user who makes more than the model was trained on without a method for that."""
    served = {axis for config in attached for axis in handler_of(config).extends}
    texts = []
    for axis, (tokens, trained) in beyond_trained(family, layout).items():
        if axis in served or (axis == "width" and texts and "height" in beyond_trained(family, layout)):
            continue
        unit = {"frames": "latent frames", "height": "rows of tokens", "width": "columns of tokens"}[axis]
        flags = [f"--{name}" for name in methods_for_axis(adapter, family, axis)]
        hint = f"; attach {' or '.join(flags)}" if flags else "; no method for that works on it with its defaults"
        texts.append(
            f"{tokens} {unit} are {tokens / trained:.2f} times the {trained} that {family.name} was trained on, beyond "
            f"which {WHAT_HAPPENS[axis]}{hint}"
        )
    return texts
