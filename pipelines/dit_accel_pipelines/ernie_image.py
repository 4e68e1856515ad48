"""Ernie-Image: the image first, then text; padded text is masked."""

from functools import partial

from dit_accel.adapters.adapter import IMAGE_REFUSED, Adapter, latents_grid

ERNIE_IMAGE = Adapter(
    name="ernie-image",
    transformers=("ErnieImageTransformer2DModel",),
    self_attention=("layers.*.self_attention",),
    grid=partial(latents_grid, frames_axis=None, text="after", joined=("text_bth",)),
    refused=IMAGE_REFUSED,
)
