"""Tiny models of the video families for `check_adapter`: 7 x 4 x 8 tokens and, where there is, text, sound, history."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from tiny_inputs import FOUR, HEADS, family, masked_video, model, steps, text_mask, video
from wan_tiny import TINY as WAN_TINY

CROSS, IMAGE_TEXT = "blocks.*.attn2", dict(image_dim=24, added_kv_proj_dim=32)
wan = partial(video, channels=12, text=64)


def _wan_image(batch: int, **inputs: Any) -> Mapping[str, Any]:
    text = dict(encoder_hidden_states=torch.randn(batch, 512, 64))
    return video(batch, 28, encoder_hidden_states_image=torch.randn(batch, 7, 24), **text | inputs)


def _wan_vace(batch: int) -> Mapping[str, Any]:
    return wan(batch, control_hidden_states=torch.randn(batch, 20, 7, 8, 16))


WAN = (
    model("WanTransformer3DModel", wan, CROSS, **WAN_TINY),
    model("WanTransformer3DModel", _wan_image, CROSS, **WAN_TINY | IMAGE_TEXT | dict(in_channels=28)),
    model("WanVACETransformer3DModel", _wan_vace, "*" + CROSS, **WAN_TINY, vace_layers=[0, 2], vace_in_channels=20),
    # its positions are whole only for heads of 6 n or 6 n + 2
    model("ChronoEditTransformer3DModel", wan, CROSS, **WAN_TINY | dict(attention_head_dim=18)),
)


WAN_ANIMATE_TINY = WAN_TINY | IMAGE_TEXT | dict(
    latent_channels=4, out_channels=4, motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4}, motion_encoder_size=16,
    motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
    inject_face_latents_blocks=3,
)  # fmt: skip
WAN_ANIMATE = family(
    "WanAnimateTransformer3DModel", lambda batch: _wan_image(
        batch, hidden_states=torch.randn(batch, 12, 8, 8, 16), face_pixel_values=torch.rand(batch, 3, 25, 16, 16),
        pose_hidden_states=torch.randn(batch, 4, 7, 8, 16),
    ), CROSS, "face_adapter.*", **WAN_ANIMATE_TINY, reference_frames=1,
)  # fmt: skip


def _skyreels(batch: int, forced: bool = False) -> Mapping[str, Any]:
    first = torch.tensor([0.0, 0, 0, 500, 500, 500, 500]).expand(batch, 7).contiguous()  # three frames are given
    return video(batch, 16, 64, **dict(timestep=first, enable_diffusion_forcing=True) if forced else {})


SKYREELS = family(
    "SkyReelsV2Transformer3DModel", (_skyreels, partial(_skyreels, forced=True)), CROSS,
    **WAN_TINY | dict(in_channels=16),
)  # fmt: skip


def _hunyuan(batch: int, channels: int = 4, **inputs: Any) -> Mapping[str, Any]:
    made = masked_video(batch, channels=channels, pooled_projections=torch.randn(batch, 8), **inputs)
    return made | dict(timestep=steps(batch).long(), guidance=steps(batch, 6000.0))


HUNYUAN_TINY = FOUR | HEADS | dict(
    num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
    rope_axes_dim=(4, 6, 6),
)  # fmt: skip
HUNYUAN = tuple(
    model(
        "HunyuanVideoTransformer3DModel", partial(_hunyuan, channels=channels), "context_embedder.*",
        **HUNYUAN_TINY | dict(in_channels=channels, image_condition_type=kind),
    )
    for kind, channels in ((None, 4), ("token_replace", 4), ("latent_concat", 9))
)  # fmt: skip


HUNYUAN15 = family(
    "HunyuanVideo15Transformer3DModel", lambda batch: masked_video(
        batch, encoder_hidden_states_2=torch.randn(batch, 5, 12), image_embeds=torch.randn(batch, 3, 8),
        encoder_attention_mask_2=text_mask(batch, 5).long(), hidden_states=torch.randn(batch, 4, 7, 4, 8),
    ), "context_embedder.*", **FOUR, **HEADS, num_layers=3,
    num_refiner_layers=1, patch_size=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8,
    rope_axes_dim=(4, 6, 6),
)  # fmt: skip


def _framepack(batch: int) -> Mapping[str, Any]:
    inputs: dict[str, Any] = dict(
        image_embeds=torch.randn(batch, 3, 8), indices_latents=torch.arange(20, 27),
        indices_latents_clean=torch.tensor([0, 18, 19]), latents_clean=torch.randn(batch, 4, 3, 8, 16),
        latents_history_2x=torch.randn(batch, 4, 3, 8, 16), indices_latents_history_2x=torch.arange(16, 19),
        latents_history_4x=torch.randn(batch, 4, 5, 8, 16), indices_latents_history_4x=torch.arange(11, 16),
    )  # fmt: skip
    return _hunyuan(batch, **inputs)


FRAMEPACK = family(
    "HunyuanVideoFramepackTransformer3DModel", _framepack, "context_embedder.*", **HUNYUAN_TINY, has_image_proj=True,
    image_proj_dim=8, has_clean_x_embedder=True,
)  # fmt: skip


MOCHI = family(
    "MochiTransformer3DModel", lambda batch: video(batch, encoder_attention_mask=text_mask(batch)), **HEADS,
    num_layers=3, pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=6,
)  # fmt: skip


def _cogvideox(batch: int, frames: int = 7, **inputs: Any) -> Mapping[str, Any]:
    latents = torch.randn(batch, frames, 4, 8, 16)
    return video(batch, hidden_states=latents, timestep=steps(batch).long(), **inputs)


def _rotary_cogvideox(batch: int) -> Mapping[str, Any]:
    angles = torch.rand(7 * 4 * 8, 8).repeat_interleave(2, 1)
    return _cogvideox(batch, 14, image_rotary_emb=(angles.cos(), angles.sin()))


COGVIDEOX_TINY = FOUR | HEADS | dict(
    time_embed_dim=8, text_embed_dim=16, num_layers=3, sample_width=16, sample_height=8, sample_frames=25,
    max_text_seq_length=6,
)  # fmt: skip
COGVIDEOX = (
    model("CogVideoXTransformer3DModel", _cogvideox, **COGVIDEOX_TINY),
    model(
        "CogVideoXTransformer3DModel", _rotary_cogvideox, **COGVIDEOX_TINY, patch_size_t=2,
        use_rotary_positional_embeddings=True,
    ),
    model(
        "ConsisIDTransformer3DModel",
        lambda batch: _cogvideox(batch, id_cond=torch.randn(batch, 4), id_vit_hidden=[torch.randn(batch, 2, 4)]),
        **COGVIDEOX_TINY, is_train_face=True, is_kps=False,
        cross_attn_interval=1, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=4, LFE_vit_dim=4, LFE_depth=5,
        LFE_dim_head=4, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=2, LFE_output_dim=21, LFE_ff_mult=1,
        LFE_num_scale=1,
    ),
)  # fmt: skip


def _ltx(batch: int, tokens: int = 7 * 4 * 8) -> dict[str, Any]:
    return masked_video(batch, hidden_states=torch.randn(batch, tokens, 4), num_frames=7, height=4, width=8)


def _ltx_conditioned(batch: int) -> Mapping[str, Any]:
    """As the condition pipeline passes it: a conditioning frame of other coordinates, then the video."""
    places = torch.cartesian_prod(torch.arange(7), torch.arange(4), torch.arange(8)).float()
    times = places * torch.tensor([0.32, 32.0, 32.0])
    front = times[:32] + torch.tensor([0.96, 0.0, 0.0])
    sizes = dict(num_frames=None, height=None, width=None)
    return {**_ltx(batch, 8 * 4 * 8), **sizes, "video_coords": torch.cat([front, times]).mT.expand(batch, -1, -1)}


LTX_TINY = FOUR | HEADS | dict(cross_attention_dim=32, num_layers=3, caption_channels=16)
LTX = family("LTXVideoTransformer3DModel", (_ltx_conditioned, _ltx), "transformer_blocks.*.attn2", **LTX_TINY)


def _ltx2(batch: int, reference: int = 0) -> Mapping[str, Any]:
    tokens = 7 * 4 * 8 + reference
    inputs = _ltx(batch, tokens) | dict(
        audio_hidden_states=torch.randn(batch, 9, 6), audio_encoder_hidden_states=torch.randn(batch, 6, 16),
        timestep=torch.full((batch, tokens), 500.0), audio_timestep=steps(batch),
        audio_encoder_attention_mask=text_mask(batch).long(), audio_num_frames=9,
    )  # fmt: skip
    if reference:
        axes = torch.meshgrid(*(torch.arange(float(size)) for size in (7, 4, 8)), indexing="ij")
        places = torch.cat([torch.stack(axes).flatten(1), torch.rand(3, reference) * 8], 1)
        inputs["video_coords"] = torch.stack([places, places + 1], -1).expand(batch, -1, -1, -1)
    return inputs


LTX2_TINY = LTX_TINY | dict(
    audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=2, audio_attention_head_dim=12,
    audio_cross_attention_dim=24,
)  # fmt: skip
GATED = dict(perturbed_attn=True, gated_attn=True, audio_gated_attn=True)
LTX2 = tuple(
    model(
        "LTX2VideoTransformer3DModel", inputs, "transformer_blocks.*.attn2", "*.audio_attn?", "*.audio_to_video_attn",
        "*.video_to_audio_attn", **LTX2_TINY | config,
    )
    for inputs, config in ((_ltx2, {}), (partial(_ltx2, reference=10), GATED))
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


MINIMAX = family(
    "MiniMaxH3Transformer3DModel", _minimax, "token_refiner.*", **HEADS, hidden_size=24, num_layers=3,
    num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=5, text_dim=16, freq_dim=8,
    time_embed_hidden_dim=16, time_embed_dim=8, rope_freq_dim=2,
)  # fmt: skip


def _kandinsky(batch: int, frames: int, channels: int, times: torch.Tensor, **inputs: Any) -> Mapping[str, Any]:
    latents, rope = torch.randn(batch, frames, 8, 16, channels), (times, torch.arange(4), torch.arange(8))
    pooled = torch.randn(batch, 8)
    return video(batch, hidden_states=latents, pooled_projections=pooled, visual_rope_pos=rope, **inputs)


def _kandinsky6(batch: int) -> Mapping[str, Any]:
    types, times = torch.zeros(batch, 8, dtype=torch.long), torch.tensor([*range(7), 0])
    types[:, -1] = 1
    sound, mask = torch.randn(batch, 9, 5), text_mask(batch)
    beside = dict(audio_hidden_states=sound, encoder_attention_mask=mask, visual_token_type_ids=types)
    return _kandinsky(batch, 8, 9, times, **beside)


KANDINSKY5_TINY = dict(
    in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, model_dim=32, ff_dim=32,
    num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
)  # fmt: skip
KANDINSKY5 = family(
    "Kandinsky5Transformer3DModel",
    lambda batch: _kandinsky(batch, 7, 4, torch.arange(7), text_rope_pos=torch.arange(6)), "text_transformer_blocks.*",
    "visual_transformer_blocks.*.cross_attention", **KANDINSKY5_TINY,
)  # fmt: skip
KANDINSKY6 = family(
    "Kandinsky6Transformer3DModel", _kandinsky6, "*_text_transformer_blocks.*", "*.cross_attention",
    "*.audio_dec_block.*", "*_cross_attention", **KANDINSKY5_TINY, in_audio_dim=5, out_audio_dim=5,
    visual_token_type_num_embeddings=2, ca_rope=True, cross_gates=True, reference_frames=1,
)  # fmt: skip


def _cosmos(batch: int, given: bool = False) -> Mapping[str, Any]:
    inputs = video(batch, fps=16)
    if given:
        time = torch.tensor([0.01, *[0.8] * 6]).view(1, 1, 7, 1, 1).expand(batch, 1, 7, 1, 1).contiguous()
        inputs |= dict(timestep=time, condition_mask=torch.ones(batch, 1, 7, 8, 16))
    return inputs


COSMOS = tuple(
    model(
        "CosmosTransformer3DModel", partial(_cosmos, given=channels > 4), "transformer_blocks.*.attn2",
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=18, num_layers=3,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 16, 16), mlp_ratio=1.0, concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    for channels in (4, 5)
)  # fmt: skip


def _mrope(items: list[tuple[int, int, int]], sound: int) -> torch.Tensor:
    """Text on all three axes alike, then, from time 20 on, vision by time, row and column, then sound by time."""
    shapes = [*items, (sound, 1, 1)]
    grids = [torch.meshgrid(*map(torch.arange, shape), indexing="ij") for shape in shapes]
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
        vision_mse_loss_indexes=torch.arange(start, start + 224), vision_timesteps=steps(224),
        vision_noisy_frame_indexes=[torch.arange(0)] * more + [torch.arange(7)],
    )  # fmt: skip
    if more:
        rows = torch.arange(length - sound, length)
        inputs |= dict(
            sound_tokens=[torch.randn(5, sound)], sound_token_shapes=[(sound, 1, 1)], sound_sequence_indexes=rows,
            sound_mse_loss_indexes=rows, sound_timesteps=steps(sound), sound_noisy_frame_indexes=[torch.arange(sound)],
        )  # fmt: skip
    return inputs


COSMOS3 = family(
    "Cosmos3OmniTransformer", (_cosmos3, partial(_cosmos3, more=True)), max_batch=1, head_dim=16, hidden_size=32,
    intermediate_size=32, latent_channel=4, patch_latent_dim=16, num_attention_heads=4, num_hidden_layers=3,
    num_key_value_heads=2, vocab_size=20, rope_axes_dim=(4, 2, 2), sound_gen=True, sound_dim=5,
)  # fmt: skip


MOTIF = family(
    "MotifVideoTransformer3DModel", lambda batch: masked_video(batch, image_embeds=torch.randn(batch, 3, 8)),
    "*.cross_attn", "single_transformer_blocks.2.attn", **FOUR, **HEADS, num_layers=2, num_single_layers=3,
    num_decoder_layers=1, text_embed_dim=16, image_embed_dim=8, mlp_ratio=1.0, rope_axes_dim=(4, 6, 6),
    enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
)  # fmt: skip


def _helios(batch: int) -> Mapping[str, Any]:
    inputs = video(batch, indices_hidden_states=torch.arange(20, 27).expand(batch, 7))
    for kind, places in (("short", [0, 19]), ("mid", [16, 17, 18]), ("long", [11, 12, 13, 14, 15])):
        inputs[f"latents_history_{kind}"] = torch.randn(batch, 4, len(places), 8, 16)
        inputs[f"indices_latents_history_{kind}"] = torch.tensor(places).expand(batch, -1)
    return inputs


ANYFLOW_TINY = FOUR | HEADS | dict(text_dim=16, freq_dim=8, ffn_dim=32)
HELIOS = tuple(
    model(
        "HeliosTransformer3DModel", inputs, CROSS, **ANYFLOW_TINY, num_layers=layers, rope_dim=(4, 6, 6),
        is_amplify_history=True,
    )
    for inputs, layers in ((_helios, 3), (video, 2))
)  # fmt: skip


def _anyflow(batch: int) -> Mapping[str, Any]:
    latents, time = torch.randn(batch, 7, 4, 8, 16), torch.full((batch, 7), 500.0)
    return video(batch, hidden_states=latents, timestep=time, r_timestep=time / 2)


ANYFLOW = family("AnyFlowTransformer3DModel", _anyflow, CROSS, **ANYFLOW_TINY, num_layers=3)


EASYANIMATE = family(
    "EasyAnimateTransformer3DModel", lambda batch: video(batch, encoder_hidden_states_t5=torch.randn(batch, 5, 12)),
    **FOUR, **HEADS, patch_size=2, num_layers=3, mmdit_layers=2, time_embed_dim=8, text_embed_dim=16,
    text_embed_dim_t5=12, sample_width=16, sample_height=8,
)  # fmt: skip


def _allegro(batch: int) -> Mapping[str, Any]:
    axes = [torch.arange(size) for size in (7, 4, 8)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2).T
    angles = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.1, 0.01] * 2)[None]
    mask = torch.ones(batch, 7, 8, 16)
    mask[:, :, 6:] = 0
    mask[1:, :, :, 14:] = 0
    rotary = [(angles.cos(), angles.sin())] * 3, [place[None] for place in places]
    return masked_video(batch, attention_mask=mask, timestep=steps(batch).long(), image_rotary_emb=rotary)


ALLEGRO = family(
    "AllegroTransformer3DModel", _allegro, "transformer_blocks.*.attn2", **FOUR, num_attention_heads=2,
    attention_head_dim=18, num_layers=3, cross_attention_dim=36, sample_height=8, sample_width=16, sample_frames=7,
    caption_channels=16,
)  # fmt: skip

VIDEO_MODELS = {
    "wan": WAN, "hunyuan-video": HUNYUAN, "mochi": MOCHI, "cogvideox": COGVIDEOX, "ltx": LTX,
    "hunyuan-video-1.5": HUNYUAN15, "ltx-2": LTX2, "minimax-h3": MINIMAX, "wan-animate": WAN_ANIMATE,
    "skyreels-v2": SKYREELS, "kandinsky-5": KANDINSKY5, "kandinsky-6": KANDINSKY6, "framepack": FRAMEPACK,
    "cosmos": COSMOS, "cosmos-3": COSMOS3, "motif-video": MOTIF, "helios": HELIOS, "easyanimate": EASYANIMATE,
    "allegro": ALLEGRO, "anyflow": ANYFLOW,
}  # fmt: skip
"""Adapter name -> its tiny models."""
