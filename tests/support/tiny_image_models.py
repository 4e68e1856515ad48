"""Tiny models of the image families for `check_adapter`: configs and inputs, all sizes different."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tiny_inputs import COLUMNS, FLUX_LIKE, FOUR, HEADS, ROWS, family, ids, image, model, packed, steps, text_mask


def _flux(batch: int) -> Mapping[str, Any]:
    return packed(batch) | dict(pooled_projections=torch.randn(batch, 8), guidance=steps(batch, 3.5))


FLUX = family("FluxTransformer2DModel", _flux, **FLUX_LIKE, pooled_projection_dim=8, guidance_embeds=True)
FLUX_KIN = (
    model("BriaTransformer2DModel", packed, **FLUX_LIKE, pooled_projection_dim=8),
    model("LongCatImageTransformer2DModel", packed, **FLUX_LIKE, pooled_projection_dim=8),
    model("OvisImageTransformer2DModel", packed, **FLUX_LIKE, out_channels=4),
)


def _flux2(batch: int, references: bool = False) -> Mapping[str, Any]:
    inputs = packed(batch, references, columns=4)
    for name in ("img_ids", "txt_ids"):
        inputs[name] = inputs[name].expand(batch, -1, -1)
    return dict(inputs, guidance=steps(batch, 3.5))


FLUX2_TINY = FLUX_LIKE | dict(axes_dims_rope=(4, 4, 4, 4))
FLUX2 = family(
    "Flux2Transformer2DModel", (_flux2, partial(_flux2, references=True)), **FLUX2_TINY, timestep_guidance_channels=8,
)  # fmt: skip


def _flux3(batch: int, references: bool = False) -> Mapping[str, Any]:
    inputs = packed(batch, columns=4)
    if references:
        inputs |= dict(image_cond_hidden_states=torch.randn(batch, 6, 4), image_cond_ids=ids(2, 3, 1, 4))
    return inputs


FLUX3 = family(
    "Flux3Transformer2DModel", (_flux3, partial(_flux3, references=True)), "txt_mode_blocks.*.attn",
    "mode_blocks.image_cond.*.attn", **FLUX2_TINY, cond_in_channels=4, timestep_channels=8,
)  # fmt: skip


def _joined_mask(batch: int) -> torch.Tensor:
    return torch.cat([text_mask(batch), torch.ones(batch, ROWS * COLUMNS, dtype=torch.bool)], 1)


CHROMA = family(
    "ChromaTransformer2DModel", lambda batch: dict(packed(batch), attention_mask=_joined_mask(batch)), **FLUX_LIKE,
    approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
)  # fmt: skip


SD3 = tuple(
    model(
        "SD3Transformer2DModel",
        lambda batch: image(batch, timestep=steps(batch), pooled_projections=torch.randn(batch, 8)), **HEADS, **FOUR,
        **config, sample_size=12, num_layers=3, joint_attention_dim=16, caption_projection_dim=32,
        pooled_projection_dim=8, pos_embed_max_size=12,
    )
    for config in ({}, {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"})
)  # fmt: skip


def _masked(batch: int, **inputs: Any) -> dict[str, Any]:
    """A packed image and text with a mask."""
    made = image(batch, hidden_states=torch.randn(batch, ROWS * COLUMNS, 4))
    return made | dict(encoder_hidden_states_mask=text_mask(batch)) | inputs


def _qwen_image(batch: int, further: int = 0) -> Mapping[str, Any]:
    shapes = [(1, ROWS, COLUMNS)] + [(1, 2, further // 2)] * bool(further)
    return _masked(batch, hidden_states=torch.randn(batch, 80 + further, 4), img_shapes=[shapes] * batch)


QWEN_IMAGE = tuple(
    model(
        "QwenImageTransformer2DModel", partial(_qwen_image, further=further), **HEADS, in_channels=4, out_channels=1,
        num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6), zero_cond_t=bool(further),
    )
    for further in (0, 6)
)  # fmt: skip


def qwen_image_21(batch: int, references: bool = False) -> Mapping[str, Any]:
    """An image of 8 x 10 tokens, and one of 2 x 4 in the middle of the text or none."""
    shapes, tokens = [(1, 2, 4)] * references + [(1, ROWS, COLUMNS)], 6 + 2 * references
    slots = torch.tensor([False] * 3 + [True, True] * references + [False] * 3 + [True] * 20)
    return image(
        batch, hidden_states=torch.randn(batch, 80 + 8 * references, 4), img_shapes=[shapes] * batch,
        encoder_hidden_states=torch.randn(batch, tokens, 16), img_mask=slots.expand(batch, -1),
        encoder_hidden_states_mask=text_mask(batch, tokens),
    )  # fmt: skip


QWEN_IMAGE_21 = family(
    "QwenImage21Transformer2DModel", qwen_image_21, **HEADS, **FOUR, num_layers=3, context_in_dim=16,
    axes_dims_rope=(4, 6, 6),
)  # fmt: skip


def _z_image(batch: int) -> Mapping[str, Any]:
    texts = [torch.randn(6 + 30 * row, 16) for row in range(batch)]
    return dict(x=list(torch.randn(batch, 4, 1, 16, 20)), t=steps(batch, 0.5), cap_feats=texts)


Z_IMAGE = family(
    "ZImageTransformer2DModel", _z_image, "*_refiner.*", in_channels=4, dim=32, n_layers=3, n_refiner_layers=1,
    n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[256, 16, 16],
)  # fmt: skip


KREA2 = family(
    "Krea2Transformer2DModel", lambda batch: image(
        batch, hidden_states=torch.randn(batch, ROWS * COLUMNS, 4), encoder_attention_mask=text_mask(batch),
        encoder_hidden_states=torch.randn(batch, 6, 2, 16), position_ids=torch.cat([torch.zeros(6, 3), ids()]),
    ), "text_fusion.*", **HEADS, in_channels=4, num_layers=3, num_key_value_heads=1,
    intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
    text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
    axes_dims_rope=(4, 6, 6),
)  # fmt: skip


def _hunyuan_image(batch: int, frames: bool = False) -> Mapping[str, Any]:
    inputs = image(
        batch, hidden_states=torch.randn(batch, 4, *[1] * frames, ROWS, COLUMNS), timestep=steps(batch),
        encoder_attention_mask=text_mask(batch).long(),
    )  # fmt: skip
    text = dict(encoder_hidden_states_2=torch.randn(batch, 3, 12), encoder_attention_mask_2=text_mask(batch, 3).long())
    return inputs if frames else inputs | text


HUNYUAN_IMAGE = tuple(
    model(
        "HunyuanImageTransformer2DModel", partial(_hunyuan_image, frames=len(axes) > 2), "context_embedder.*", **HEADS,
        **FOUR, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=width,
        rope_axes_dim=axes, patch_size=(1,) * len(axes),
    )
    for axes, width in (((8, 8), 12), ((4, 6, 6), None))
)  # fmt: skip


def _hidream(batch: int, height: int = 16) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 4, height, 20), timesteps=steps(batch),
        encoder_hidden_states_t5=torch.randn(batch, 6, 16), pooled_embeds=torch.randn(batch, 8),
        encoder_hidden_states_llama3=torch.randn(4, batch, 7, 12),  # as many layers as the model has blocks
    )  # fmt: skip


HIDREAM = tuple(
    model(
        "HiDreamImageTransformer2DModel", partial(_hidream, height=height), **HEADS, **FOUR, patch_size=2,
        num_layers=2, num_single_layers=2, caption_channels=[16, 12], text_emb_dim=8, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(20, 22), llama_layers=[0, 1, 2, 3],
    )
    for height in (16, 20)
)  # fmt: skip


def _cogview(batch: int, sizes: tuple[str, ...] = ("original_size", "target_size", "crop_coords")) -> dict[str, Any]:
    return image(batch, timestep=steps(batch).long(), **{name: torch.ones(batch, 2) for name in sizes})


def _glm_image(batch: int) -> Mapping[str, Any]:
    prior = (torch.arange(80) % 32).expand(batch, -1)
    inputs = _cogview(batch, ("target_size", "crop_coords"))
    return inputs | dict(prior_token_drop=torch.zeros(batch, 80, dtype=torch.bool), prior_token_id=prior)


GLM_IMAGE_TINY = HEADS | FOUR | dict(num_layers=3, text_embed_dim=16, time_embed_dim=8, condition_dim=4)
COGVIEW_TINY = GLM_IMAGE_TINY | dict(pos_embed_max_size=12, sample_size=8)
GLM_IMAGE = family("GlmImageTransformer2DModel", _glm_image, **GLM_IMAGE_TINY, prior_vq_quantizer_codebook_size=32)
COGVIEW = (
    model("CogView3PlusTransformer2DModel", _cogview, **COGVIEW_TINY),
    model("CogView4Transformer2DModel", _cogview, **COGVIEW_TINY, rope_axes_dim=(16, 16)),
)

LUMINA_TINY = dict(
    sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_attention_heads=2, num_kv_heads=1, multiple_of=8
)
LUMINA2 = family(
    "Lumina2Transformer2DModel", lambda batch: image(batch, encoder_attention_mask=text_mask(1).expand(batch, -1)),
    "*_refiner.*", **LUMINA_TINY, num_refiner_layers=1, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16),
    cap_feat_dim=16,
)  # fmt: skip


def _lumina_next(batch: int) -> Mapping[str, Any]:
    rotary = torch.polar(torch.ones(16, 16, 8), torch.rand(16, 16, 8))
    return image(batch, encoder_mask=text_mask(batch), image_rotary_emb=rotary, cross_attention_kwargs={})


LUMINA_NEXT = family("LuminaNextDiT2DModel", _lumina_next, "layers.*.attn2", **LUMINA_TINY, cross_attention_dim=16)


def ideogram4(batch: int, padding: int = 0) -> Mapping[str, Any]:
    """Ideogram's packed sequence: padding, 6 text tokens, the image."""
    pixels, length = ids() + 65536, padding + 6 + ROWS * COLUMNS
    pixels[:, 0] = 65536
    places = torch.cat([torch.zeros(padding, 3), torch.arange(6.0)[:, None].expand(-1, 3), pixels]).long()
    return image(
        batch, hidden_states=torch.randn(batch, length, 4), encoder_hidden_states=torch.randn(batch, length, 16),
        position_ids=places.expand(batch, -1, -1),
        segment_ids=torch.tensor([-1] * padding + [1] * (length - padding)).expand(batch, -1),
        indicator=torch.tensor([0] * padding + [3] * 6 + [2] * ROWS * COLUMNS).expand(batch, -1),
    )  # fmt: skip


IDEOGRAM4 = family(
    "Ideogram4Transformer2DModel", ideogram4, **HEADS, in_channels=4, num_layers=3, intermediate_size=32, adaln_dim=8,
    llm_features_dim=16, mrope_section=(4, 2, 2),
)  # fmt: skip
AURA_FLOW = family(
    "AuraFlowTransformer2DModel", image, **HEADS, sample_size=8, in_channels=4, num_mmdit_layers=2,
    num_single_dit_layers=2, joint_attention_dim=16, caption_projection_dim=32, pos_embed_max_size=144,
)  # fmt: skip


def _bria_fibo(batch: int) -> Mapping[str, Any]:
    mask, layers = _joined_mask(batch)[:, None, None], [torch.randn(batch, 6, 12) for _ in range(4)]
    return dict(packed(batch), text_encoder_layers=layers, joint_attention_kwargs={"attention_mask": mask})


BRIA_FIBO = family("BriaFiboTransformer2DModel", _bria_fibo, **FLUX_LIKE, text_encoder_dim=12)


def bria_fibo_2(batch: int, references: bool = False) -> Mapping[str, Any]:
    """Fibo 2's inputs, prompts equally long, with an image to edit or without."""
    edited = dict(context_latents=[torch.randn(batch, 4, 4, 6)], encoder_attention_mask=None)
    mask = dict(encoder_attention_mask=text_mask(1).expand(batch, -1))
    return image(batch, encoder_hidden_states=torch.randn(batch, 2, 6, 16), **edited if references else mask)


BRIA_FIBO_2 = family(
    "BriaFibo2Transformer2DModel", (bria_fibo_2, partial(bria_fibo_2, references=True)), "noise_refiner.*",
    "perceiver.*", "layers.*.cross_attention", in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2,
    cap_feat_dim=16, injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=6,
    gist_step=1, gist_min_text_len=2, gist_max_text_len=8, axes_dims=(4, 6, 6), axes_lens=(64, 16, 16),
)  # fmt: skip


def _ernie_image(batch: int) -> Mapping[str, Any]:
    text = dict(text_bth=torch.randn(batch, 6, 16), text_lens=text_mask(batch).sum(1))
    return dict(hidden_states=torch.randn(batch, 4, ROWS, COLUMNS), timestep=steps(batch), **text)


ERNIE_IMAGE = family(
    "ErnieImageTransformer2DModel", _ernie_image, **FOUR, hidden_size=32, num_attention_heads=2, num_layers=3,
    ffn_hidden_size=32, text_in_dim=16, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
NUCLEUS_IMAGE = family(
    "NucleusMoEImageTransformer2DModel", lambda batch: _masked(batch, img_shapes=[(1, ROWS, COLUMNS)] * batch), **HEADS,
    **FOUR, patch_size=1, num_layers=3, num_key_value_heads=1, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    moe_enabled=False,
)  # fmt: skip
PRX = family(
    "PRXTransformer2DModel", lambda batch: image(batch, attention_mask=text_mask(batch)), in_channels=4,
    context_in_dim=16, hidden_size=32, num_heads=2, depth=3, axes_dim=[8, 8],
)  # fmt: skip


def joyimage(batch: int, items: int = 0) -> Mapping[str, Any]:
    """One image [B, C, T, H, W], or several items, of which the last is made."""
    return image(batch, hidden_states=torch.randn(batch, *[items] * bool(items), 4, 1, 16, 20))


def _joyimage_plus(batch: int) -> Mapping[str, Any]:
    shapes = [[(1, ROWS, COLUMNS), (1, 2, 3 - row)] for row in range(batch)]
    latents = torch.randn(batch, ROWS * COLUMNS + 6, 4, 1, 2, 2)
    return _masked(batch, hidden_states=latents, timestep=steps(batch), shape_list=shapes)


JOYIMAGE_TINY = FOUR | dict(
    hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=3, rope_dim_list=[4, 6, 6]
)  # fmt: skip
JOYIMAGE_EDIT = family("JoyImageEditTransformer3DModel", joyimage, **JOYIMAGE_TINY)
JOYIMAGE_EDIT_PLUS = family("JoyImageEditPlusTransformer3DModel", _joyimage_plus, **JOYIMAGE_TINY)


def _pixart(batch: int) -> Mapping[str, Any]:
    sizes = dict(resolution=None, aspect_ratio=None)
    return image(batch, encoder_attention_mask=text_mask(batch), added_cond_kwargs=sizes)


PIXART = family(
    "PixArtTransformer2DModel", _pixart, "transformer_blocks.*.attn2", **HEADS, in_channels=4, out_channels=8,
    num_layers=3, cross_attention_dim=32, sample_size=8, caption_channels=16, use_additional_conditions=False,
)  # fmt: skip


def _hunyuan_dit(batch: int) -> Mapping[str, Any]:
    angles = torch.rand(ROWS * COLUMNS, 8).repeat_interleave(2, 1)
    return image(
        batch, timestep=steps(batch), text_embedding_mask=text_mask(batch), style=torch.zeros(batch).long(),
        encoder_hidden_states_t5=torch.randn(batch, 7, 16), text_embedding_mask_t5=text_mask(batch, 7),
        image_meta_size=torch.ones(batch, 6), image_rotary_emb=(angles.cos(), angles.sin()),
    )  # fmt: skip


HUNYUAN_DIT = family(
    "HunyuanDiT2DModel", _hunyuan_dit, "blocks.*.attn2", **HEADS, in_channels=4, patch_size=2, sample_size=8,
    hidden_size=32, num_layers=4, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8,
    text_len=6, text_len_t5=7, use_style_cond_and_image_meta_size=True,
)  # fmt: skip

IMAGE_MODELS = {
    "flux": FLUX, "flux-kin": FLUX_KIN, "sd3": SD3, "qwen-image": QWEN_IMAGE, "flux2": FLUX2, "flux3": FLUX3,
    "chroma": CHROMA, "z-image": Z_IMAGE, "krea2": KREA2, "qwen-image-2.1": QWEN_IMAGE_21,
    "hunyuan-image": HUNYUAN_IMAGE, "hidream": HIDREAM, "cogview": COGVIEW, "glm-image": GLM_IMAGE, "lumina2": LUMINA2,
    "ideogram4": IDEOGRAM4, "aura-flow": AURA_FLOW, "bria-fibo": BRIA_FIBO, "bria-fibo-2": BRIA_FIBO_2,
    "ernie-image": ERNIE_IMAGE, "nucleus-image": NUCLEUS_IMAGE, "prx": PRX, "joyimage-edit": JOYIMAGE_EDIT,
    "joyimage-edit-plus": JOYIMAGE_EDIT_PLUS, "pixart": PIXART, "hunyuan-dit": HUNYUAN_DIT, "lumina-next": LUMINA_NEXT,
}  # fmt: skip
"""Adapter name -> its tiny models."""
