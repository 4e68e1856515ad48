"""Tiny models of further image families, in the manner of `tiny_image_models`."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from tiny_inputs import COLUMNS, HEADS, ROWS, image, steps, text_mask

from dit_accel.testing.adapter_checks import TinyModel


def _ernie_image(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 4, ROWS, COLUMNS), timestep=steps(batch), text_bth=torch.randn(batch, 6, 16),
        text_lens=text_mask(batch).sum(1),
    )  # fmt: skip


ERNIE_IMAGE_TINY = dict(
    hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=32, in_channels=4, out_channels=4,
    text_in_dim=16, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
ERNIE_IMAGE = (
    TinyModel(transformer=diffusers.ErnieImageTransformer2DModel, config=ERNIE_IMAGE_TINY, inputs=_ernie_image),
)


def _nucleus_image(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, ROWS * COLUMNS, 4), timestep=steps(batch, 0.5),
        encoder_hidden_states=torch.randn(batch, 6, 16), encoder_hidden_states_mask=text_mask(batch),
        img_shapes=[(1, ROWS, COLUMNS)] * batch,
    )  # fmt: skip


NUCLEUS_IMAGE_TINY = dict(
    HEADS, patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_key_value_heads=1, joint_attention_dim=16,
    axes_dims_rope=(4, 6, 6), moe_enabled=False,
)  # fmt: skip
NUCLEUS_IMAGE = (
    TinyModel(
        transformer=diffusers.NucleusMoEImageTransformer2DModel, config=NUCLEUS_IMAGE_TINY, inputs=_nucleus_image
    ),
)


def _prx(batch: int) -> Mapping[str, Any]:
    return dict(image(batch), attention_mask=text_mask(batch))


PRX_TINY = dict(in_channels=4, context_in_dim=16, hidden_size=32, num_heads=2, depth=3, axes_dim=[8, 8])
PRX = (TinyModel(transformer=diffusers.PRXTransformer2DModel, config=PRX_TINY, inputs=_prx),)


def joyimage(batch: int, items: int = 0) -> Mapping[str, Any]:
    """One image [B, C, T, H, W], or several items, of which the last is made."""
    latents = torch.randn(batch, *[items] * bool(items), 4, 1, 16, 20)
    return dict(image(batch), hidden_states=latents)


JOYIMAGE_TINY = dict(
    in_channels=4, out_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=3,
    rope_dim_list=[4, 6, 6],
)  # fmt: skip
JOYIMAGE_EDIT = (
    TinyModel(transformer=diffusers.JoyImageEditTransformer3DModel, config=JOYIMAGE_TINY, inputs=joyimage),
)


def _joyimage_plus(batch: int) -> Mapping[str, Any]:
    shapes = [[(1, ROWS, COLUMNS), (1, 2, 3 - row)] for row in range(batch)]
    return dict(
        hidden_states=torch.randn(batch, ROWS * COLUMNS + 6, 4, 1, 2, 2), timestep=steps(batch), shape_list=shapes,
        encoder_hidden_states=torch.randn(batch, 6, 16), encoder_hidden_states_mask=text_mask(batch),
    )  # fmt: skip


JOYIMAGE_EDIT_PLUS = (
    TinyModel(transformer=diffusers.JoyImageEditPlusTransformer3DModel, config=JOYIMAGE_TINY, inputs=_joyimage_plus),
)


def _pixart(batch: int) -> Mapping[str, Any]:
    return dict(
        image(batch),
        encoder_attention_mask=text_mask(batch),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
    )


PIXART_TINY = dict(
    HEADS, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=32, sample_size=8, caption_channels=16,
    use_additional_conditions=False,
)  # fmt: skip
PIXART = (
    TinyModel(
        transformer=diffusers.PixArtTransformer2DModel, config=PIXART_TINY, inputs=_pixart,
        left_alone=("transformer_blocks.*.attn2",),
    ),
)  # fmt: skip


def _hunyuan_dit(batch: int) -> Mapping[str, Any]:
    angles = torch.rand(ROWS * COLUMNS, 8).repeat_interleave(2, 1)
    return dict(
         image(batch), timestep=steps(batch), text_embedding_mask=text_mask(batch), style=torch.zeros(batch).long(),
        encoder_hidden_states_t5=torch.randn(batch, 7, 16), text_embedding_mask_t5=text_mask(batch, 7),
        image_meta_size=torch.ones(batch, 6), image_rotary_emb=(angles.cos(), angles.sin()),
    )  # fmt: skip


HUNYUAN_DIT_TINY = dict(
    HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=4, cross_attention_dim=16,
    cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=6, text_len_t5=7,
    use_style_cond_and_image_meta_size=True,
)  # fmt: skip
HUNYUAN_DIT = (
    TinyModel(
        transformer=diffusers.HunyuanDiT2DModel, config=HUNYUAN_DIT_TINY, inputs=_hunyuan_dit,
        left_alone=("blocks.*.attn2",),
    ),
)  # fmt: skip


def _lumina_next(batch: int) -> Mapping[str, Any]:
    angles = torch.rand(16, 16, 8)
    return dict(
         image(batch), encoder_mask=text_mask(batch), image_rotary_emb=torch.polar(torch.ones_like(angles), angles),
        cross_attention_kwargs={},
    )  # fmt: skip


LUMINA_NEXT_TINY = dict(
    sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
    cross_attention_dim=16,
)  # fmt: skip
LUMINA_NEXT = (
    TinyModel(
        transformer=diffusers.LuminaNextDiT2DModel, config=LUMINA_NEXT_TINY, inputs=_lumina_next,
        left_alone=("layers.*.attn2",),
    ),
)  # fmt: skip
