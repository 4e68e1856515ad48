"""Tiny models of the video families for `check_adapter`: 7 x 4 x 8 tokens and, where there is, text, sound, history."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from wan_tiny import TINY as WAN_TINY

from dit_accel.testing.adapter_checks import TinyModel

LATENTS = (4, 7, 8, 16)


def _video(batch: int, channels: int = 4, **inputs: Any) -> dict[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, channels, *LATENTS[1:]), timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=torch.randn(batch, 6, 16), **inputs,
    )  # fmt: skip


def _mask(batch: int, tokens: int) -> torch.Tensor:
    """Row 0 has one padded token, every further row one more."""
    return torch.arange(tokens)[None] < tokens - 1 - torch.arange(batch)[:, None]


def _hunyuan15(batch: int) -> Mapping[str, Any]:
    inputs = _video(
        batch, encoder_attention_mask=_mask(batch, 6).long(), encoder_hidden_states_2=torch.randn(batch, 5, 12),
        encoder_attention_mask_2=_mask(batch, 5).long(), image_embeds=torch.randn(batch, 3, 8),
    )  # fmt: skip
    return dict(inputs, hidden_states=torch.randn(batch, 4, 7, 4, 8))


HUNYUAN15_TINY = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=3, num_refiner_layers=1,
    patch_size=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
HUNYUAN15 = (
    TinyModel(
        transformer=diffusers.HunyuanVideo15Transformer3DModel, config=HUNYUAN15_TINY, inputs=_hunyuan15,
        left_alone=("context_embedder.*",),
    ),
)  # fmt: skip


def _ltx2(batch: int, reference: int = 0) -> Mapping[str, Any]:
    tokens = 7 * 4 * 8 + reference
    inputs = dict(
        hidden_states=torch.randn(batch, tokens, 4), audio_hidden_states=torch.randn(batch, 9, 6),
        encoder_hidden_states=torch.randn(batch, 6, 16), audio_encoder_hidden_states=torch.randn(batch, 6, 16),
        timestep=torch.full((batch, tokens), 500.0), audio_timestep=torch.full((batch,), 500.0),
        encoder_attention_mask=_mask(batch, 6).long(), audio_encoder_attention_mask=_mask(batch, 6).long(),
        num_frames=7, height=4, width=8, audio_num_frames=9,
    )  # fmt: skip
    if reference:
        axes = torch.meshgrid(*(torch.arange(float(size)) for size in (7, 4, 8)), indexing="ij")
        places = torch.cat([torch.stack(axes).flatten(1), torch.rand(3, reference) * 8], 1)
        inputs["video_coords"] = torch.stack([places, places + 1], -1).expand(batch, -1, -1, -1)
    return inputs


LTX2_TINY = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
    audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=2, audio_attention_head_dim=12,
    audio_cross_attention_dim=24, num_layers=3, caption_channels=16,
)  # fmt: skip
LTX2 = (
    TinyModel(
        transformer=diffusers.LTX2VideoTransformer3DModel, config=LTX2_TINY, inputs=_ltx2,
        left_alone=("transformer_blocks.*.attn2", "*.audio_attn?", "*.audio_to_video_attn", "*.video_to_audio_attn"),
    ),
    TinyModel(
        transformer=diffusers.LTX2VideoTransformer3DModel, inputs=partial(_ltx2, reference=10),
        config=dict(LTX2_TINY, perturbed_attn=True, gated_attn=True, audio_gated_attn=True),
        left_alone=("transformer_blocks.*.attn2", "*.audio_attn?", "*.audio_to_video_attn", "*.video_to_audio_attn"),
    ),
)  # fmt: skip


def _grid(frames: int, height: int, width: int, start: float) -> torch.Tensor:
    axes = (torch.arange(float(frames)) + start, torch.linspace(-1, 1, height), torch.linspace(-2, 2, width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2).double()


def _minimax(batch: int) -> Mapping[str, Any]:
    """Six text tokens, a keyframe, ten rows of sound, seven frames."""
    sound = torch.stack([torch.arange(10) % 5 + 6.0, torch.zeros(10), torch.full((10,), -2.0)], 1).double()
    text = torch.stack([torch.arange(6.0), torch.zeros(6), torch.zeros(6)], 1).double()
    places = torch.cat([text, _grid(1, 4, 8, 6), sound, _grid(7, 4, 8, 6)])
    tags = torch.tensor([1] * 6 + [0] * 32 + [2] * 10 + [0] * 224)
    return dict(
        hidden_states=torch.randn(batch, 256, 16), audio_hidden_states=torch.randn(batch, 10, 5),
        encoder_hidden_states=torch.randn(batch, 6, 16), timestep=torch.tensor([0.3, 0.6, 0.9]),
        timestep_indices=torch.tensor([0] * 6 + [2] * 32 + [1] * 10 + [0] * 224), token_tags=tags,
        position_ids=places, video_indices=(tags == 0).nonzero()[:, 0], audio_indices=(tags == 2).nonzero()[:, 0],
        text_indices=torch.arange(6),
    )  # fmt: skip


MINIMAX_TINY = dict(
    num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=3, num_refiner_layers=1, ffn_dim=32,
    in_channels=4, audio_in_channels=5, text_dim=16, freq_dim=8, time_embed_hidden_dim=16, time_embed_dim=8,
    rope_freq_dim=2,
)  # fmt: skip
MINIMAX = (
    TinyModel(
        transformer=diffusers.MiniMaxH3Transformer3DModel, config=MINIMAX_TINY, inputs=_minimax,
        left_alone=("token_refiner.*",),
    ),
)  # fmt: skip


def _wan_animate(batch: int) -> Mapping[str, Any]:
    return dict(
        hidden_states=torch.randn(batch, 12, 8, 8, 16), timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=torch.randn(batch, 512, 64), encoder_hidden_states_image=torch.randn(batch, 7, 24),
        pose_hidden_states=torch.randn(batch, 4, 7, 8, 16), face_pixel_values=torch.rand(batch, 3, 25, 16, 16),
    )  # fmt: skip


WAN_ANIMATE = (
    TinyModel(
        transformer=diffusers.WanAnimateTransformer3DModel, inputs=_wan_animate, reference_frames=1,
        config={
            **WAN_TINY, "in_channels": 12, "latent_channels": 4, "out_channels": 4, "image_dim": 24,
            "added_kv_proj_dim": 32, "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
            "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 3,
        },
        left_alone=("blocks.*.attn2", "face_adapter.*"),
    ),
)  # fmt: skip


def _skyreels(batch: int, forced: bool = False) -> Mapping[str, Any]:
    inputs = dict(_video(batch, 16), encoder_hidden_states=torch.randn(batch, 6, 64))
    if forced:  # the first frames are given
        inputs |= dict(timestep=torch.tensor([0.0, 0, 0, 500, 500, 500, 500]).expand(batch, 7).contiguous())
        inputs |= dict(enable_diffusion_forcing=True)
    return inputs


SKYREELS = tuple(
    TinyModel(
        transformer=diffusers.SkyReelsV2Transformer3DModel, config={**WAN_TINY, "in_channels": 16},
        inputs=partial(_skyreels, forced=forced), left_alone=("blocks.*.attn2",),
    )
    for forced in (False, True)
)  # fmt: skip


def _kandinsky5(batch: int) -> Mapping[str, Any]:
    return dict(
        _video(batch), hidden_states=torch.randn(batch, 7, 8, 16, 4), pooled_projections=torch.randn(batch, 8),
        visual_rope_pos=[torch.arange(size) for size in (7, 4, 8)], text_rope_pos=torch.arange(6),
    )  # fmt: skip


KANDINSKY5_TINY = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, model_dim=32, ff_dim=32,
    num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
)  # fmt: skip
KANDINSKY5 = (
    TinyModel(
        transformer=diffusers.Kandinsky5Transformer3DModel, config=KANDINSKY5_TINY, inputs=_kandinsky5,
        left_alone=("text_transformer_blocks.*", "visual_transformer_blocks.*.cross_attention"),
    ),
)  # fmt: skip


def _kandinsky6(batch: int) -> Mapping[str, Any]:
    types = torch.zeros(batch, 8, dtype=torch.long)
    types[:, -1] = 1
    return dict(
        _video(batch), hidden_states=torch.randn(batch, 8, 8, 16, 9), pooled_projections=torch.randn(batch, 8),
        audio_hidden_states=torch.randn(batch, 9, 5), encoder_attention_mask=_mask(batch, 6),
        visual_token_type_ids=types,
        visual_rope_pos=(torch.tensor([*range(7), 0]), torch.arange(4), torch.arange(8)),
    )  # fmt: skip


KANDINSKY6_TINY = dict(KANDINSKY5_TINY, in_audio_dim=5, out_audio_dim=5, visual_token_type_num_embeddings=2)
KANDINSKY6 = (
    TinyModel(
        transformer=diffusers.Kandinsky6Transformer3DModel, inputs=_kandinsky6, reference_frames=1,
        config=dict(KANDINSKY6_TINY, ca_rope=True, cross_gates=True),
        left_alone=("*_text_transformer_blocks.*", "*.cross_attention", "*.audio_dec_block.*", "*_cross_attention"),
    ),
)  # fmt: skip


def _framepack(batch: int) -> Mapping[str, Any]:
    inputs = _video(
        batch, encoder_attention_mask=_mask(batch, 6).long(), pooled_projections=torch.randn(batch, 8),
        image_embeds=torch.randn(batch, 3, 8), guidance=torch.full((batch,), 6000.0),
        indices_latents=torch.arange(20, 27), indices_latents_clean=torch.tensor([0, 18, 19]),
        latents_clean=torch.randn(batch, 4, 3, 8, 16),
    )  # fmt: skip
    inputs |= dict(
        latents_history_2x=torch.randn(batch, 4, 3, 8, 16), indices_latents_history_2x=torch.arange(16, 19),
        latents_history_4x=torch.randn(batch, 4, 5, 8, 16), indices_latents_history_4x=torch.arange(11, 16),
    )  # fmt: skip
    return dict(inputs, timestep=inputs["timestep"].long())


FRAMEPACK_TINY = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
    num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), has_image_proj=True,
    image_proj_dim=8, has_clean_x_embedder=True,
)  # fmt: skip
FRAMEPACK = (
    TinyModel(
        transformer=diffusers.HunyuanVideoFramepackTransformer3DModel, config=FRAMEPACK_TINY, inputs=_framepack,
        left_alone=("context_embedder.*",),
    ),
)  # fmt: skip


def _cosmos(batch: int, given: bool = False) -> Mapping[str, Any]:
    inputs = _video(batch, fps=16)
    if given:
        time = torch.tensor([0.01, *[0.8] * 6]).view(1, 1, 7, 1, 1).expand(batch, 1, 7, 1, 1).contiguous()
        inputs |= dict(timestep=time, condition_mask=torch.ones(batch, 1, 7, 8, 16))
    return inputs


COSMOS_TINY = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=18, num_layers=3, text_embed_dim=16,
    adaln_lora_dim=4, max_size=(8, 16, 16), mlp_ratio=1.0, concat_padding_mask=False,
    extra_pos_embed_type=None,
)  # fmt: skip
COSMOS = (
    TinyModel(
        transformer=diffusers.CosmosTransformer3DModel, config=COSMOS_TINY, inputs=_cosmos,
        left_alone=("transformer_blocks.*.attn2",),
    ),
    TinyModel(
        transformer=diffusers.CosmosTransformer3DModel, inputs=partial(_cosmos, given=True),
        config=dict(COSMOS_TINY, in_channels=5),
        left_alone=("transformer_blocks.*.attn2",),
    ),
)  # fmt: skip


def _mrope(items: list[tuple[int, int, int]], sound: int) -> torch.Tensor:
    """Text on all three axes alike, then, from time 20 on, vision by time, row and column, then sound by time."""
    grids = [
        torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij") for shape in [*items, (sound, 1, 1)]
    ]
    places = [torch.stack([20 + time, row, column]).flatten(1) for time, row, column in grids]
    return torch.cat([torch.arange(6).expand(3, 6), *places], 1)


def _cosmos3(batch: int, more: bool = False) -> Mapping[str, Any]:
    """Six text tokens; an image that is given, and sound behind the video, if there is ``more``."""
    items, sound = ([(1, 3, 5)] if more else []) + [(7, 4, 8)], 9 * more
    counts = [frames * height * width for frames, height, width in items]
    length = 6 + sum(counts) + sound
    start = 6 + sum(counts[:-1])
    inputs = dict(
        input_ids=torch.randint(0, 20, (6,)), text_indexes=torch.arange(6), und_len=6, sequence_length=length,
        position_ids=_mrope(items, sound),
        vision_tokens=[torch.randn(1, 4, frames, 2 * height, 2 * width) for frames, height, width in items],
        vision_token_shapes=items, vision_sequence_indexes=torch.arange(6, 6 + sum(counts)),
        vision_mse_loss_indexes=torch.arange(start, start + 224), vision_timesteps=torch.full((224,), 500.0),
        vision_noisy_frame_indexes=[torch.arange(0)] * more + [torch.arange(7)],
    )  # fmt: skip
    if more:
        rows = torch.arange(length - sound, length)
        inputs |= dict(
            sound_tokens=[torch.randn(5, sound)], sound_token_shapes=[(sound, 1, 1)], sound_sequence_indexes=rows,
            sound_mse_loss_indexes=rows, sound_timesteps=torch.full((sound,), 500.0),
            sound_noisy_frame_indexes=[torch.arange(sound)],
        )  # fmt: skip
    return inputs


COSMOS3_TINY = dict(
    head_dim=16, hidden_size=32, intermediate_size=32, latent_channel=4, patch_latent_dim=16, num_attention_heads=4,
    num_hidden_layers=3, num_key_value_heads=2, vocab_size=20, rope_axes_dim=(4, 2, 2), sound_gen=True, sound_dim=5,
)  # fmt: skip
COSMOS3 = tuple(
    TinyModel(
        transformer=diffusers.Cosmos3OmniTransformer, config=COSMOS3_TINY, inputs=partial(_cosmos3, more=more),
        max_batch=1,
    )
    for more in (False, True)
)  # fmt: skip


def _motif(batch: int) -> Mapping[str, Any]:
    return _video(
        batch, encoder_attention_mask=_mask(batch, 6).long(), image_embeds=torch.randn(batch, 3, 8)
    )  # fmt: skip


MOTIF_TINY = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=3,
    num_decoder_layers=1, text_embed_dim=16, image_embed_dim=8, rope_axes_dim=(4, 6, 6), mlp_ratio=1.0,
    enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
)  # fmt: skip
MOTIF = (
    TinyModel(
        transformer=diffusers.MotifVideoTransformer3DModel, config=MOTIF_TINY, inputs=_motif,
        left_alone=("*.cross_attn", "single_transformer_blocks.2.attn"),
    ),
)  # fmt: skip


def _helios(batch: int) -> Mapping[str, Any]:
    return dict(
        _video(batch), indices_hidden_states=torch.arange(20, 27).expand(batch, 7),
        latents_history_short=torch.randn(batch, 4, 2, 8, 16), latents_history_mid=torch.randn(batch, 4, 3, 8, 16),
        latents_history_long=torch.randn(batch, 4, 5, 8, 16),
        indices_latents_history_short=torch.tensor([0, 19]).expand(batch, 2),
        indices_latents_history_mid=torch.arange(16, 19).expand(batch, 3),
        indices_latents_history_long=torch.arange(11, 16).expand(batch, 5),
    )  # fmt: skip


HELIOS_TINY = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=32,
    num_layers=3, rope_dim=(4, 6, 6), is_amplify_history=True,
)  # fmt: skip
HELIOS = (
    TinyModel(
        transformer=diffusers.HeliosTransformer3DModel, config=HELIOS_TINY, inputs=_helios,
        left_alone=("blocks.*.attn2",),
    ),
    TinyModel(
        transformer=diffusers.HeliosTransformer3DModel, inputs=_video, config=dict(HELIOS_TINY, num_layers=2),
        left_alone=("blocks.*.attn2",),
    ),
)  # fmt: skip


def _easyanimate(batch: int) -> Mapping[str, Any]:
    return _video(batch, encoder_hidden_states_t5=torch.randn(batch, 5, 12))


EASYANIMATE_TINY = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=3,
    mmdit_layers=2, time_embed_dim=8, text_embed_dim=16, sample_width=16, sample_height=8,
)  # fmt: skip
EASYANIMATE = (
    TinyModel(
        transformer=diffusers.EasyAnimateTransformer3DModel, config=dict(EASYANIMATE_TINY, text_embed_dim_t5=12),
        inputs=_easyanimate,
    ),
)  # fmt: skip


def _allegro(batch: int) -> Mapping[str, Any]:
    axes = [torch.arange(size) for size in (7, 4, 8)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2).T
    angles = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.1, 0.01] * 2)[None]
    mask = torch.ones(batch, 7, 8, 16)
    mask[:, :, 6:] = 0
    mask[1:, :, :, 14:] = 0
    return dict(
        _video(batch), attention_mask=mask, encoder_attention_mask=_mask(batch, 6).long(),
        timestep=torch.full((batch,), 500),
        image_rotary_emb=([(angles.cos(), angles.sin())] * 3, [place[None] for place in places]),
    )  # fmt: skip


ALLEGRO_TINY = dict(
    num_attention_heads=2, attention_head_dim=18, in_channels=4, out_channels=4, num_layers=3, cross_attention_dim=36,
    sample_height=8, sample_width=16, sample_frames=7, caption_channels=16,
)  # fmt: skip


def _anyflow(batch: int) -> Mapping[str, Any]:
    time = torch.full((batch, 7), 500.0)
    return dict(
        _video(batch), hidden_states=torch.randn(batch, 7, 4, 8, 16), timestep=time, r_timestep=time / 2
    )  # fmt: skip


ANYFLOW_TINY = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=32,
    num_layers=3,
)  # fmt: skip
ANYFLOW = (
    TinyModel(
        transformer=diffusers.AnyFlowTransformer3DModel, config=ANYFLOW_TINY, inputs=_anyflow,
        left_alone=("blocks.*.attn2",),
    ),
)  # fmt: skip

ALLEGRO = (
    TinyModel(
        transformer=diffusers.AllegroTransformer3DModel, config=ALLEGRO_TINY, inputs=_allegro,
        left_alone=("transformer_blocks.*.attn2",),
    ),
)  # fmt: skip

MODELS = {
    "hunyuan-video-1.5": HUNYUAN15, "ltx-2": LTX2, "minimax-h3": MINIMAX, "wan-animate": WAN_ANIMATE,
    "skyreels-v2": SKYREELS, "kandinsky-5": KANDINSKY5, "kandinsky-6": KANDINSKY6, "framepack": FRAMEPACK,
    "cosmos": COSMOS, "cosmos-3": COSMOS3, "motif-video": MOTIF, "helios": HELIOS, "easyanimate": EASYANIMATE,
    "allegro": ALLEGRO, "anyflow": ANYFLOW,
}  # fmt: skip
"""Adapter name -> its tiny models."""
