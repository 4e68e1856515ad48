"""Tiny models of the image families that `tiny_models` does not hold: configs and inputs, all sizes different."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import tiny_other_models as other
import torch
from tiny_inputs import COLUMNS, FLUX_LIKE, HEADS, ROWS, ids, image, packed, steps, text_mask

from dit_accel.testing.adapter_checks import TinyModel


def _flux2(batch: int, references: bool = False) -> Mapping[str, Any]:
    inputs = packed(batch, references, columns=4)
    for name in ("img_ids", "txt_ids"):
        inputs[name] = inputs[name].expand(batch, -1, -1)
    return dict(inputs, guidance=steps(batch, 3.5))


FLUX2_TINY = dict(FLUX_LIKE, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=8)
FLUX2 = tuple(
    TinyModel(transformer=diffusers.Flux2Transformer2DModel, config=FLUX2_TINY, inputs=partial(_flux2, references=more))
    for more in (False, True)
)


def _flux3(batch: int, references: bool = False) -> Mapping[str, Any]:
    inputs = packed(batch, columns=4)
    if references:
        inputs |= dict(image_cond_hidden_states=torch.randn(batch, 6, 4), image_cond_ids=ids(2, 3, 1, 4))
    return inputs


FLUX3_TINY = dict(FLUX_LIKE, cond_in_channels=4, axes_dims_rope=(4, 4, 4, 4), timestep_channels=8)
FLUX3 = tuple(
    TinyModel(
        transformer=diffusers.Flux3Transformer2DModel, config=FLUX3_TINY, inputs=partial(_flux3, references=more),
        left_alone=("txt_mode_blocks.*.attn", "mode_blocks.image_cond.*.attn"),
    )
    for more in (False, True)
)  # fmt: skip


def _chroma(batch: int) -> Mapping[str, Any]:
    image = torch.ones(batch, ROWS * COLUMNS, dtype=torch.bool)
    return dict(packed(batch), attention_mask=torch.cat([text_mask(batch), image], 1))


CHROMA_TINY = dict(FLUX_LIKE, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
CHROMA = (TinyModel(transformer=diffusers.ChromaTransformer2DModel, config=CHROMA_TINY, inputs=_chroma),)


def _z_image(batch: int) -> Mapping[str, Any]:
    return dict(
        x=list(torch.randn(batch, 4, 1, 16, 20)), t=steps(batch, 0.5),
        cap_feats=[torch.randn(6 + 30 * row, 16) for row in range(batch)],
    )  # fmt: skip


Z_IMAGE_TINY = dict(
    in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
    axes_dims=[4, 6, 6], axes_lens=[256, 16, 16],
)  # fmt: skip
Z_IMAGE = (
    TinyModel(
        transformer=diffusers.ZImageTransformer2DModel, config=Z_IMAGE_TINY, inputs=_z_image,
        left_alone=("*_refiner.*",),
    ),
)  # fmt: skip


def _krea2(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, ROWS * COLUMNS, 4), timestep=steps(batch, 0.5),
        encoder_hidden_states=torch.randn(batch, 6, 2, 16), encoder_attention_mask=text_mask(batch),
        position_ids=torch.cat([torch.zeros(6, 3), ids()]),
    )  # fmt: skip


KREA2_TINY = dict(
    HEADS, in_channels=4, num_layers=3, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8,
    text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
    text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
KREA2 = (
    TinyModel(
        transformer=diffusers.Krea2Transformer2DModel, config=KREA2_TINY, inputs=_krea2, left_alone=("text_fusion.*",)
    ),
)


def qwen_image_21(batch: int, references: bool = False) -> Mapping[str, Any]:
    """An image of 8 x 10 tokens, and one of 2 x 4 in the middle of the text or none."""
    shapes = [(1, 2, 4)] * references + [(1, ROWS, COLUMNS)]
    slots = torch.tensor([False] * 3 + [True, True] * references + [False] * 3 + [True] * 20)
    return dict(
        hidden_states=torch.randn(batch, 80 + 8 * references, 4), timestep=steps(batch, 0.5),
        encoder_hidden_states=torch.randn(batch, 6 + 2 * references, 16), img_shapes=[shapes] * batch,
        encoder_hidden_states_mask=text_mask(batch, 6 + 2 * references), img_mask=slots.expand(batch, -1),
    )  # fmt: skip


QWEN_IMAGE_21 = (
    TinyModel(
        transformer=diffusers.QwenImage21Transformer2DModel,
        config=dict(HEADS, in_channels=4, out_channels=4, num_layers=3, context_in_dim=16, axes_dims_rope=(4, 6, 6)),
        inputs=qwen_image_21,
    ),
)


def _hunyuan_image(batch: int, frames: bool = False) -> Mapping[str, Any]:
    inputs = dict(
        hidden_states=torch.randn(batch, 4, *[1] * frames, ROWS, COLUMNS), timestep=steps(batch),
        encoder_hidden_states=torch.randn(batch, 6, 16), encoder_attention_mask=text_mask(batch).long(),
    )  # fmt: skip
    if not frames:
        inputs |= dict(
            encoder_hidden_states_2=torch.randn(batch, 3, 12), encoder_attention_mask_2=text_mask(batch, 3).long()
        )
    return inputs


HUNYUAN_IMAGE_TINY = dict(
    HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=16,
    text_embed_2_dim=12, rope_axes_dim=(8, 8),
)  # fmt: skip
HUNYUAN_IMAGE = tuple(
    TinyModel(
        transformer=diffusers.HunyuanImageTransformer2DModel, config={**HUNYUAN_IMAGE_TINY, **extra},
        inputs=partial(_hunyuan_image, frames=bool(extra)), left_alone=("context_embedder.*",),
    )
    for extra in ({}, {"patch_size": (1, 1, 1), "rope_axes_dim": (4, 6, 6), "text_embed_2_dim": None})
)  # fmt: skip


def _hidream(batch: int, height: int = 16) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 4, height, 20), timesteps=steps(batch),
        encoder_hidden_states_t5=torch.randn(batch, 6, 16), pooled_embeds=torch.randn(batch, 8),
        encoder_hidden_states_llama3=torch.randn(4, batch, 7, 12),  # as many layers as the model has blocks
    )  # fmt: skip


HIDREAM_TINY = dict(
    HEADS, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, caption_channels=[16, 12],
    text_emb_dim=8, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(20, 22),
    llama_layers=[0, 1, 2, 3],
)  # fmt: skip
HIDREAM = tuple(
    TinyModel(
        transformer=diffusers.HiDreamImageTransformer2DModel, config=HIDREAM_TINY,
        inputs=partial(_hidream, height=height),
    )
    for height in (16, 20)
)  # fmt: skip


def _cogview(batch: int) -> Mapping[str, Any]:
    sizes = {name: torch.ones(batch, 2) for name in ("original_size", "target_size", "crop_coords")}
    return dict(
        sizes, hidden_states=torch.randn(batch, 4, 16, 20), timestep=steps(batch).long(),
        encoder_hidden_states=torch.randn(batch, 6, 16),
    )  # fmt: skip


def _glm_image(batch: int) -> Mapping[str, Any]:
    inputs = dict(_cogview(batch), prior_token_drop=torch.zeros(batch, 80, dtype=torch.bool))
    del inputs["original_size"]
    return dict(inputs, prior_token_id=(torch.arange(80) % 32).expand(batch, -1))


COGVIEW_TINY = dict(
    HEADS, in_channels=4, out_channels=4, num_layers=3, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
    pos_embed_max_size=12, sample_size=8,
)  # fmt: skip
COGVIEW4_TINY = dict(COGVIEW_TINY, rope_axes_dim=(16, 16))
COGVIEW = (
    TinyModel(transformer=diffusers.CogView3PlusTransformer2DModel, config=COGVIEW_TINY, inputs=_cogview),
    TinyModel(transformer=diffusers.CogView4Transformer2DModel, config=COGVIEW4_TINY, inputs=_cogview),
)
GLM_IMAGE_TINY = {
    **{name: value for name, value in COGVIEW_TINY.items() if name not in ("pos_embed_max_size", "sample_size")},
    "prior_vq_quantizer_codebook_size": 32,
}
GLM_IMAGE = (TinyModel(transformer=diffusers.GlmImageTransformer2DModel, config=GLM_IMAGE_TINY, inputs=_glm_image),)


def _lumina2(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 4, 16, 20), timestep=steps(batch, 0.5),
        encoder_hidden_states=torch.randn(batch, 6, 16), encoder_attention_mask=text_mask(1).expand(batch, -1),
    )  # fmt: skip


LUMINA2_TINY = dict(
    sample_size=8, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1, num_attention_heads=2,
    num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6), axes_lens=(32, 16, 16), cap_feat_dim=16,
)  # fmt: skip
LUMINA2 = (
    TinyModel(
        transformer=diffusers.Lumina2Transformer2DModel, config=LUMINA2_TINY, inputs=_lumina2,
        left_alone=("*_refiner.*",),
    ),
)  # fmt: skip


def ideogram4(batch: int, padding: int = 0) -> Mapping[str, Any]:
    """Ideogram's packed sequence: padding, 6 text tokens, the image."""
    image, length = ids() + 65536, padding + 6 + ROWS * COLUMNS
    image[:, 0] = 65536
    places = torch.cat([torch.zeros(padding, 3), torch.arange(6.0)[:, None].expand(-1, 3), image]).long()
    return dict(
        hidden_states=torch.randn(batch, length, 4), timestep=steps(batch, 0.5),
        encoder_hidden_states=torch.randn(batch, length, 16), position_ids=places.expand(batch, -1, -1),
        segment_ids=torch.tensor([-1] * padding + [1] * (length - padding)).expand(batch, -1),
        indicator=torch.tensor([0] * padding + [3] * 6 + [2] * ROWS * COLUMNS).expand(batch, -1),
    )  # fmt: skip


IDEOGRAM4_TINY = dict(
    HEADS, in_channels=4, num_layers=3, intermediate_size=32, adaln_dim=8, llm_features_dim=16, mrope_section=(4, 2, 2)
)
IDEOGRAM4 = (TinyModel(transformer=diffusers.Ideogram4Transformer2DModel, config=IDEOGRAM4_TINY, inputs=ideogram4),)


AURA_FLOW_TINY = dict(
    HEADS, sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, joint_attention_dim=16,
    caption_projection_dim=32, pos_embed_max_size=144,
)  # fmt: skip
AURA_FLOW = (TinyModel(transformer=diffusers.AuraFlowTransformer2DModel, config=AURA_FLOW_TINY, inputs=image),)


def _bria_fibo(batch: int) -> Mapping[str, Any]:
    image = torch.ones(batch, ROWS * COLUMNS, dtype=torch.bool)
    mask = torch.cat([text_mask(batch), image], 1)[:, None, None]
    return dict(
        packed(batch), text_encoder_layers=[torch.randn(batch, 6, 12) for _ in range(4)],
        joint_attention_kwargs={"attention_mask": mask},
    )  # fmt: skip


BRIA_FIBO_TINY = dict(FLUX_LIKE, text_encoder_dim=12)
BRIA_FIBO = (TinyModel(transformer=diffusers.BriaFiboTransformer2DModel, config=BRIA_FIBO_TINY, inputs=_bria_fibo),)


def bria_fibo_2(batch: int, references: bool = False) -> Mapping[str, Any]:
    """Fibo 2's inputs, prompts equally long, with an image to edit or without."""
    inputs = dict(
        image(batch), encoder_hidden_states=torch.randn(batch, 2, 6, 16),
        encoder_attention_mask=text_mask(1).expand(batch, -1),
    )  # fmt: skip
    if references:
        inputs |= dict(context_latents=[torch.randn(batch, 4, 4, 6)], encoder_attention_mask=None)
    return inputs


BRIA_FIBO_2_TINY = dict(
    in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, injection_layer_ids=(1,),
    perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=6, gist_step=1, gist_min_text_len=2,
    gist_max_text_len=8, axes_dims=(4, 6, 6), axes_lens=(64, 16, 16),
)  # fmt: skip
BRIA_FIBO_2 = tuple(
    TinyModel(
        transformer=diffusers.BriaFibo2Transformer2DModel, config=BRIA_FIBO_2_TINY,
        inputs=partial(bria_fibo_2, references=references),
        left_alone=("noise_refiner.*", "perceiver.*", "layers.*.cross_attention"),
    )
    for references in (False, True)
)  # fmt: skip


IMAGE_MODELS = {
    "flux2": FLUX2, "flux3": FLUX3, "chroma": CHROMA, "z-image": Z_IMAGE, "krea2": KREA2,
    "qwen-image-2.1": QWEN_IMAGE_21, "hunyuan-image": HUNYUAN_IMAGE, "hidream": HIDREAM, "cogview": COGVIEW,
    "glm-image": GLM_IMAGE, "lumina2": LUMINA2, "ideogram4": IDEOGRAM4, "aura-flow": AURA_FLOW, "bria-fibo": BRIA_FIBO,
    "bria-fibo-2": BRIA_FIBO_2, "ernie-image": other.ERNIE_IMAGE, "nucleus-image": other.NUCLEUS_IMAGE,
    "prx": other.PRX,
    "joyimage-edit": other.JOYIMAGE_EDIT, "joyimage-edit-plus": other.JOYIMAGE_EDIT_PLUS, "pixart": other.PIXART,
    "hunyuan-dit": other.HUNYUAN_DIT, "lumina-next": other.LUMINA_NEXT,
}  # fmt: skip
"""Adapter name -> its tiny models."""
