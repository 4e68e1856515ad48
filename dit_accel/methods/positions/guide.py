"""A small picture that leads a larger one of the same prompt, while the larger one is still mostly noise.

A model of flows predicts noise - clean of latents (1 - sigma) clean + sigma noise. So the prediction (latents - clean)
/ sigma takes latents on to that clean picture and their own noise, by any solver and through any guidance: a step in
which it is given instead of the model's is the small picture noised to the next level, and costs nothing.

Source: the guided and the view mode of UltraImage's code (arXiv 2512.04504), the first after I-Max (2410.07536). Where
we depart from them: noise levels say how long the small picture is followed, not numbers of steps; by default the large
picture begins from the noised small one (as image-to-image does), and the pull of its low frequencies is an option, of
the means over what a token of the small picture covers, not of a Haar wavelet; nothing is shifted by a latent in turn.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ..site import ForwardContext, Site, sample_of, with_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallPicture:
    """What a finished small picture says of the larger one's latents."""

    clean: Tensor  # latents as the transformer takes them, [B, tokens, C] or [B, C, height, width], of the large size
    inside: Tensor | None  # where they hold, of a shape that broadcasts to theirs; None: everywhere
    grid: tuple[int, int]  # rows and columns of the small picture's tokens


class Guide:
    """Lets a transformer's forwards follow a small picture.

    Args:
        above: noise level above which its latents are followed and not predicted.
        pull: how far, below that, the low frequencies are pulled to it at the highest noise.
    """

    def __init__(self, above: float, pull: float) -> None:
        self._above, self._pull = above, pull
        self.picture: SmallPicture | None = None  # the small picture that is followed now
        self.making = False  # the small picture is being made, and follows none
        self.followed: set[int] = set()  # steps that took no forward, or in which the middle was set
        self.pulled: set[int] = set()  # steps in which the low frequencies were

    @contextlib.contextmanager
    def small(self) -> Iterator[None]:
        """Let the small picture be made inside the block."""
        self.making = True
        try:
            yield
        finally:
            self.making = False

    @contextlib.contextmanager
    def following(self, picture: SmallPicture) -> Iterator[None]:
        """Let what runs inside the block follow a small picture."""
        self.picture = picture
        try:
            yield
        finally:
            self.picture = None

    def follows(self, sigma: float | None) -> bool:
        """Tell whether a step is one in which the small picture is followed."""
        return self.picture is not None and sigma is not None and sigma > self._above

    def around(self, site: Site, context: ForwardContext, run: Callable[..., Any]) -> Any:
        """Run a forward of the larger picture, or give the small one's prediction in its place."""
        picture, sigma = self.picture, context.sigma
        assert picture is not None
        if sigma is None:
            raise ConfigError(
                "ultraimage.guided and ultraimage.view need the noise level, which this pipeline does not tell; leave "
                "them out"
            )
        latents = context.inputs[site.adapter.latents]
        if not isinstance(latents, Tensor) or latents.shape[1:] != picture.clean.shape[1:]:
            shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ConfigError(
                f"ultraimage's small picture was enlarged to latents {tuple(picture.clean.shape)}, and the forward has "
                f"{shape}; call a pipeline that makes one picture of text, without reference images"
            )
        clean = picture.clean.to(latents.device, torch.float32)
        clean = clean.repeat(len(latents) // len(clean), *(1 for _ in clean.shape[1:]))
        toward = (latents.float() - clean) / max(sigma, 1e-4)
        if sigma > self._above:
            self.followed.add(context.step_index)
            if picture.inside is None:
                return given(context, toward.to(latents.dtype))
        output = run()  # the model paints what the small picture does not cover
        sample = sample_of(output)
        if sigma > self._above:
            inside = picture.inside.to(latents.device) if picture.inside is not None else None
            return with_sample(output, torch.where(inside, toward.to(sample.dtype), sample))  # type: ignore[arg-type]
        # The less noise is left, the more the model is trusted: the pull falls from its full weight to 0.
        weight = 0.0 if picture.inside is not None else self._pull * (1 + math.cos(math.pi * (1 - sigma))) / 2
        if not weight:
            return output
        self.pulled.add(context.step_index)
        assert context.layout is not None
        away = low_band(toward - sample.float(), (context.layout.height, context.layout.width), picture.grid)
        return with_sample(output, sample + (weight * away).to(sample.dtype))


def given(context: ForwardContext, sample: Tensor) -> Any:
    """Return a prediction as the forward that is not run would have: a tuple, or diffusers' output object."""
    if context.inputs.get("return_dict", True) is False:
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


def low_band(values: Tensor, grid: tuple[int, int], small: tuple[int, int]) -> Tensor:
    """Average a picture over what each token of a smaller one covers, at the larger one's size.

    Args:
        values: [B, tokens, C] of a grid, or [B, C, height, width].
        grid: rows and columns of its tokens.
    """
    if values.dim() == 3:
        return low_band(values.transpose(1, 2).unflatten(2, grid), grid, small).flatten(2).transpose(1, 2)
    size = tuple(side * less // whole for side, less, whole in zip(values.shape[-2:], small, grid, strict=True))
    return F.interpolate(F.interpolate(values, size=size, mode="area"), size=values.shape[-2:], mode="nearest")
