"""Tiny models of every family for `check_adapter`: configs and inputs with all three grid sizes different."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import tiny_video_models
import torch
from tiny_image_models import IMAGE_MODELS
from wan_tiny import TINY as WAN_TINY

from dit_accel.testing.adapter_checks import TinyModel


def _steps(batch: int, value: float = 500.0) -> torch.Tensor:
    return torch.full((batch,), value)


def _wan(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 12, 7, 8, 16), timestep=_steps(batch),
        encoder_hidden_states=torch.randn(batch, 6, 64),
    )  # fmt: skip


def _wan_image(batch: int) -> Mapping[str, Any]:
    return dict(
        _wan(batch), hidden_states=torch.randn(batch, 28, 7, 8, 16),
        encoder_hidden_states=torch.randn(batch, 512, 64), encoder_hidden_states_image=torch.randn(batch, 7, 24),
    )  # fmt: skip


def _wan_vace(batch: int) -> Mapping[str, Any]:
    return dict(_wan(batch), control_hidden_states=torch.randn(batch, 20, 7, 8, 16))


WAN = (
    TinyModel(
        transformer=diffusers.WanTransformer3DModel, config=WAN_TINY, inputs=_wan, left_alone=("blocks.*.attn2",)
    ),
    TinyModel(
        transformer=diffusers.WanTransformer3DModel,
        config={**WAN_TINY, "in_channels": 28, "image_dim": 24, "added_kv_proj_dim": 32},
        inputs=_wan_image,
        left_alone=("blocks.*.attn2",),
    ),
    TinyModel(
        transformer=diffusers.WanVACETransformer3DModel,
        config={**WAN_TINY, "vace_layers": [0, 2], "vace_in_channels": 20},
        inputs=_wan_vace,
        left_alone=("*blocks.*.attn2",),
    ),
    TinyModel(
        transformer=diffusers.ChronoEditTransformer3DModel,
        config={**WAN_TINY, "attention_head_dim": 18},  # its positions are whole only for heads of 6 n or 6 n + 2
        inputs=_wan,
        left_alone=("blocks.*.attn2",),
    ),
)


def _text_mask(batch: int, tokens: int) -> torch.Tensor:
    """Row 0 has one padded token, every further row one more."""
    return torch.arange(tokens)[None] < tokens - 1 - torch.arange(batch)[:, None]


def _hunyuan(batch: int, channels: int = 4) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, channels, 7, 8, 16), timestep=_steps(batch).long(),
        encoder_hidden_states=torch.randn(batch, 6, 16), encoder_attention_mask=_text_mask(batch, 6).long(),
        pooled_projections=torch.randn(batch, 8), guidance=_steps(batch, 6000.0),
    )  # fmt: skip


HUNYUAN_TINY = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
    num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
HUNYUAN = tuple(
    TinyModel(
        transformer=diffusers.HunyuanVideoTransformer3DModel,
        config={**HUNYUAN_TINY, "in_channels": channels, "image_condition_type": kind},
        inputs=partial(_hunyuan, channels=channels),
        left_alone=("context_embedder.*",),
    )
    for kind, channels in ((None, 4), ("token_replace", 4), ("latent_concat", 9))
)


def _mochi(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 4, 7, 8, 16), timestep=_steps(batch),
        encoder_hidden_states=torch.randn(batch, 6, 16), encoder_attention_mask=_text_mask(batch, 6),
    )  # fmt: skip


MOCHI = (
    TinyModel(
        transformer=diffusers.MochiTransformer3DModel,
        config=dict(
            num_attention_heads=2, attention_head_dim=16, num_layers=3, pooled_projection_dim=16, in_channels=4,
            text_embed_dim=16, time_embed_dim=8, max_sequence_length=6,
        ),
        inputs=_mochi,
    ),
)  # fmt: skip


def _cogvideox(batch: int, rotary: bool = False) -> Mapping[str, Any]:
    frames = 14 if rotary else 7
    inputs = dict(
        hidden_states=torch.randn(batch, frames, 4, 8, 16), timestep=_steps(batch).long(),
        encoder_hidden_states=torch.randn(batch, 6, 16),
    )  # fmt: skip
    if rotary:
        angles = torch.rand(7 * 4 * 8, 8).repeat_interleave(2, 1)
        inputs["image_rotary_emb"] = (angles.cos(), angles.sin())
    return inputs


def _consisid(batch: int) -> Mapping[str, Any]:
    return dict(
        _cogvideox(batch), id_cond=torch.randn(batch, 4), id_vit_hidden=[torch.randn(batch, 2, 4)],
    )  # fmt: skip


COGVIDEOX_TINY = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
    num_layers=3, sample_width=16, sample_height=8, sample_frames=25, max_text_seq_length=6,
)  # fmt: skip
COGVIDEOX = (
    TinyModel(transformer=diffusers.CogVideoXTransformer3DModel, config=COGVIDEOX_TINY, inputs=_cogvideox),
    TinyModel(
        transformer=diffusers.CogVideoXTransformer3DModel,
        config={**COGVIDEOX_TINY, "patch_size_t": 2, "use_rotary_positional_embeddings": True},
        inputs=partial(_cogvideox, rotary=True),
    ),
    TinyModel(
        transformer=diffusers.ConsisIDTransformer3DModel,
        config={
            **COGVIDEOX_TINY,
            "is_train_face": True,
            "is_kps": False,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 4,
            "LFE_vit_dim": 4,
            "LFE_depth": 5,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 2,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        inputs=_consisid,
    ),
)


def _ltx(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 7 * 4 * 8, 4), timestep=_steps(batch), num_frames=7, height=4, width=8,
        encoder_hidden_states=torch.randn(batch, 6, 16), encoder_attention_mask=_text_mask(batch, 6).long(),
    )  # fmt: skip


def _ltx_conditioned(batch: int) -> Mapping[str, Any]:
    """As the condition pipeline passes it: a conditioning frame of other coordinates, then the video."""
    inputs = {**_ltx(batch), "hidden_states": torch.randn(batch, 8 * 4 * 8, 4)}
    places = torch.cartesian_prod(torch.arange(7), torch.arange(4), torch.arange(8)).float()
    times = places * torch.tensor([0.32, 32.0, 32.0])
    front = times[:32] + torch.tensor([0.96, 0.0, 0.0])
    sizes = dict(num_frames=None, height=None, width=None)
    return {**inputs, **sizes, "video_coords": torch.cat([front, times]).mT.expand(batch, -1, -1)}


LTX_TINY = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=3,
    caption_channels=16,
)  # fmt: skip
LTX = (
    TinyModel(
        transformer=diffusers.LTXVideoTransformer3DModel,
        config=LTX_TINY,
        inputs=_ltx_conditioned,
        left_alone=("transformer_blocks.*.attn2",),
    ),
    TinyModel(
        transformer=diffusers.LTXVideoTransformer3DModel,
        config=LTX_TINY,
        inputs=_ltx,
        left_alone=("transformer_blocks.*.attn2",),
    ),
)  # fmt: skip


def _flux(batch: int) -> Mapping[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(10), indexing="ij")
    return dict(
        hidden_states=torch.randn(batch, 80, 4), timestep=_steps(batch, 0.5), pooled_projections=torch.randn(batch, 8),
        encoder_hidden_states=torch.randn(batch, 6, 16), txt_ids=torch.zeros(6, 3), guidance=_steps(batch, 3.5),
        img_ids=torch.stack([rows * 0, rows, columns], -1).flatten(0, 1).float(),
    )  # fmt: skip


FLUX = (
    TinyModel(
        transformer=diffusers.FluxTransformer2DModel,
        config=dict(
            in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ),
        inputs=_flux,
    ),
)  # fmt: skip


def _flux_kin(batch: int) -> Mapping[str, Any]:
    names = {"hidden_states", "timestep", "encoder_hidden_states", "txt_ids", "img_ids"}
    return {name: value for name, value in _flux(batch).items() if name in names}


FLUX_KIN_TINY = {key: FLUX[0].config[key] for key in FLUX[0].config if key not in ("guidance_embeds", "in_channels")}
FLUX_KIN = (
    TinyModel(
        transformer=diffusers.BriaTransformer2DModel,
        config={**FLUX_KIN_TINY, "in_channels": 4},
        inputs=_flux_kin,
    ),
    TinyModel(
        transformer=diffusers.LongCatImageTransformer2DModel,
        config={**FLUX_KIN_TINY, "in_channels": 4},
        inputs=_flux_kin,
    ),
    TinyModel(
        transformer=diffusers.OvisImageTransformer2DModel,
        config={key: value for key, value in FLUX_KIN_TINY.items() if key != "pooled_projection_dim"}
        | {"in_channels": 4, "out_channels": 4},
        inputs=_flux_kin,
    ),
)


def _sd3(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 4, 16, 20), timestep=_steps(batch),
        encoder_hidden_states=torch.randn(batch, 6, 16), pooled_projections=torch.randn(batch, 8),
    )  # fmt: skip


SD3_TINY = dict(
    sample_size=12, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
    caption_projection_dim=32, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=12,
)  # fmt: skip
SD3 = tuple(
    TinyModel(transformer=diffusers.SD3Transformer2DModel, config={**SD3_TINY, **extra}, inputs=_sd3)
    for extra in ({}, {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"})
)


def _qwen_image(batch: int, further: int = 0) -> Mapping[str, Any]:
    shapes = [(1, 8, 10)] + [(1, 2, further // 2)] * bool(further)
    return dict(
        hidden_states=torch.randn(batch, 80 + further, 4), timestep=_steps(batch, 0.5), img_shapes=[shapes] * batch,
        encoder_hidden_states=torch.randn(batch, 6, 16), encoder_hidden_states_mask=_text_mask(batch, 6),
    )  # fmt: skip


QWEN_IMAGE = tuple(
    TinyModel(
        transformer=diffusers.QwenImageTransformer2DModel,
        config=dict(
            in_channels=4, out_channels=1, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6), zero_cond_t=bool(further),
        ),
        inputs=partial(_qwen_image, further=further),
    )
    for further in (0, 6)
)  # fmt: skip

MODELS = {
    "wan": WAN, "hunyuan-video": HUNYUAN, "mochi": MOCHI, "cogvideox": COGVIDEOX, "ltx": LTX, "flux": FLUX,
    "flux-kin": FLUX_KIN, "sd3": SD3, "qwen-image": QWEN_IMAGE, **IMAGE_MODELS, **tiny_video_models.MODELS,
}  # fmt: skip
"""Adapter name -> its tiny models."""
