"""Further tiny video pipelines: from pictures, from videos, with control; prompts come as embeddings."""

import inspect
from typing import Any

import diffusers
import tiny_pipelines
import tiny_video_models as models
import tiny_video_pipelines as video_pipelines
import torch
from tiny_flux_pipelines import assembled
from tiny_image_pipelines import assemble, vae
from tiny_models import COGVIDEOX, COGVIDEOX_TINY, HUNYUAN_TINY
from tiny_video_pipelines import EULER, Unguarded, _build, _prompts, _wan_vae
from tiny_wan_pipelines import Made, picture, video

SIZE = dict(height=64, width=128, num_frames=25, num_inference_steps=4)


def _cogvideox(cls: type, channels: int = 4, model: Any = None, **call: Any) -> Made:
    pipe, made = tiny_pipelines.cogvideox({**COGVIDEOX_TINY, "in_channels": channels})
    parts = {**pipe.components, "transformer": model or pipe.transformer}
    return assemble(cls, **parts), {**made, **call}


def cogvideox_image() -> Made:
    return _cogvideox(diffusers.CogVideoXImageToVideoPipeline, 8, image=picture(64, 128))


def cogvideox_video() -> Made:
    made = _cogvideox(diffusers.CogVideoXVideoToVideoPipeline, video=video(25, 64, 128), strength=1.0)
    del made[1]["num_frames"]
    return made


def cogvideox_control() -> Made:
    made = _cogvideox(diffusers.CogVideoXFunControlPipeline, 8, control_video=video(25, 64, 128))
    del made[1]["num_frames"]
    return made


def consisid() -> Made:
    config = {**COGVIDEOX[2].config, "in_channels": 8}
    identity = dict(id_cond=torch.randn(1, 4), id_vit_hidden=[torch.randn(1, 2, 4)])
    return _cogvideox(
        diffusers.ConsisIDPipeline, 8, _build(diffusers.ConsisIDTransformer3DModel, config), image=picture(64, 128),
        **identity,
    )  # fmt: skip


def cosmos_video() -> Made:
    pipe, call = video_pipelines.cosmos()
    model = _build(diffusers.CosmosTransformer3DModel, dict(models.COSMOS_TINY, in_channels=5))
    made = diffusers.CosmosVideoToWorldPipeline(**{**pipe.components, "transformer": model})
    return made, dict(call, image=picture(64, 128))


def _cosmos2(cls: type, channels: int = 4, parts: dict[str, Any] | None = None, **call: Any) -> Made:
    config = dict(models.COSMOS_TINY, in_channels=channels, max_size=(32, 16, 16))
    model = _build(diffusers.CosmosTransformer3DModel, config)
    pipe = cls(
        **{"text_encoder": None, "tokenizer": None, "vae": _wan_vae(4), "safety_checker": Unguarded()}
        | {"scheduler": EULER(use_karras_sigmas=True), "transformer": model} | (parts or {})
    )  # fmt: skip
    return pipe, {**SIZE, "guidance_scale": 3.0, **_prompts(), **call}


def cosmos2_image() -> Made:
    made = _cosmos2(diffusers.Cosmos2TextToImagePipeline)
    del made[1]["num_frames"]
    return made


def cosmos2_video() -> Made:
    return _cosmos2(diffusers.Cosmos2VideoToWorldPipeline, 5, image=picture(64, 128))


def _easyanimate(cls: type, channels: int, **call: Any) -> Made:
    pipe, made = video_pipelines.easyanimate()
    pipe.vae.register_to_config(cache_mag_vae=False)
    config = dict(models.EASYANIMATE_TINY, in_channels=channels)
    model = _build(diffusers.EasyAnimateTransformer3DModel, config)
    return cls(**{**pipe.components, "transformer": model}), {**made, **call}


def _frames(frames: int = 25) -> torch.Tensor:
    return torch.rand(1, 3, frames, 64, 128, generator=torch.Generator().manual_seed(4))


def easyanimate_inpaint() -> Made:
    mask = (_frames()[:, :1] > 0.5).float() * 255
    return _easyanimate(diffusers.EasyAnimateInpaintPipeline, 9, video=_frames(), mask_video=mask)


def helios_pyramid() -> Made:
    pipe = diffusers.HeliosPyramidPipeline(
        text_encoder=None, tokenizer=None, vae=_wan_vae(4), scheduler=diffusers.HeliosScheduler(gamma=0.25),
        transformer=_build(diffusers.HeliosTransformer3DModel, models.HELIOS_TINY),
    )  # fmt: skip
    call = dict(SIZE, guidance_scale=3.0, num_latent_frames_per_chunk=7, history_sizes=[4, 2, 1], **_prompts())
    del call["num_inference_steps"]
    return pipe, dict(call, pyramid_num_inference_steps_list=[4, 2, 1])


def _hunyuan(cls: type, channels: int, parts: dict[str, Any] | None = None, config: Any = None, **call: Any) -> Made:
    pipe, made = tiny_pipelines.hunyuan_video()
    model = _build(
        diffusers.HunyuanVideoTransformer3DModel, {**HUNYUAN_TINY, "in_channels": channels, **(config or {})}
    )
    made = {**made, **call}
    return cls(**{**pipe.components, "transformer": model, **(parts or {})}), made


def hunyuan_skyreels_image() -> Made:
    return _hunyuan(diffusers.HunyuanSkyreelsImageToVideoPipeline, 8, image=picture(64, 128))


def hunyuan_image() -> Made:
    return _hunyuan(
        diffusers.HunyuanVideoImageToVideoPipeline, 9, {"image_processor": None},
        {"image_condition_type": "latent_concat"}, image=picture(64, 128),
    )  # fmt: skip


def hunyuan_image_replaced() -> Made:
    return _hunyuan(
        diffusers.HunyuanVideoImageToVideoPipeline, 4, {"image_processor": None},
        {"image_condition_type": "token_replace"}, image=picture(64, 128),
    )  # fmt: skip


def hunyuan15_image() -> Made:
    pipe, call = video_pipelines.hunyuan_video15()
    made = diffusers.HunyuanVideo15ImageToVideoPipeline(**pipe.components, image_encoder=None, feature_extractor=None)
    made.vision_num_semantic_tokens, made.vision_states_dim = 3, 8
    made.target_size = 64
    made._get_image_embeds = lambda *args, **kwargs: torch.ones(1, 3, 8)
    call = {name: value for name, value in call.items() if name not in ("height", "width")}
    return made, dict(call, image=picture(64, 128))


def _kandinsky(cls: type, channels: int = 4, parts: dict[str, Any] | None = None, **call: Any) -> Made:
    pipe, made = video_pipelines.kandinsky5()
    config = dict(models.KANDINSKY5_TINY, in_visual_dim=channels, visual_cond=True)
    model = _build(diffusers.Kandinsky5Transformer3DModel, config)
    other = cls(**{**pipe.components, "transformer": model, **(parts or {})})
    return other, {**made, **call}


def kandinsky5_image_to_video() -> Made:
    return _kandinsky(diffusers.Kandinsky5I2VPipeline, image=picture(64, 128))


def kandinsky5_image() -> Made:
    pipe, made = video_pipelines.kandinsky5()
    other = diffusers.Kandinsky5T2IPipeline(**{**pipe.components, "vae": vae(4)})
    other.resolutions = [(64, 128), (128, 160)]
    del made["num_frames"]
    return other, dict(made, height=128, width=160)


def kandinsky5_edit() -> Made:
    made = _kandinsky(
        diffusers.Kandinsky5I2IPipeline, parts={"vae": vae(4)}, height=128, width=160, image=picture(128, 160)
    )
    made[0].resolutions = [(64, 128), (128, 160)]
    del made[1]["num_frames"]
    return made


def ltx_image() -> Made:
    return tiny_pipelines.ltx(diffusers.LTXImageToVideoPipeline, image=picture(32, 32))


def ltx_long() -> Made:
    pipe, call = tiny_pipelines.ltx(
        diffusers.LTXI2VLongMultiPromptPipeline, temporal_tile_size=16, temporal_overlap=8, seed=0, prompt="a",
        negative_prompt="b", num_frames=21,  # all windows of the same length
    )  # fmt: skip
    embeds = [call.pop(name) for name in ("prompt_embeds", "prompt_attention_mask")]
    negative = [call.pop(name) for name in ("negative_prompt_embeds", "negative_prompt_attention_mask")]
    pipe.encode_prompt = lambda **_: (*embeds, *negative)
    return pipe, call


def motif_image() -> Made:
    pipe, call = video_pipelines.motif_video()
    config = dict(models.MOTIF_TINY, in_channels=9)
    model = _build(diffusers.MotifVideoTransformer3DModel, config)
    made = diffusers.MotifVideoImage2VideoPipeline(
        **{**pipe.components, "transformer": model, "feature_extractor": None}
    )
    made._get_image_embeds = lambda *args, **kwargs: torch.ones(1, 3, 8)
    return made, dict(call, image=picture(64, 128), prompt=None)


def _ltx2(cls: type, **call: Any) -> Made:
    pipe, made = video_pipelines.ltx2()
    parts = {name: part for name, part in pipe.components.items() if name in assembled(cls)}
    taken = set(inspect.signature(cls.__call__).parameters)
    other = assemble(cls, **parts)
    return other, {name: value for name, value in {**made, **call}.items() if name in taken}


def ltx2_image() -> Made:
    return _ltx2(diffusers.LTX2ImageToVideoPipeline, image=picture(32, 64), image_crf=0)


def ltx2_condition() -> Made:
    return _ltx2(diffusers.LTX2ConditionPipeline)


def ltx2_in_context() -> Made:
    return _ltx2(diffusers.LTX2InContextPipeline)


def ltx2_hdr() -> Made:
    return _ltx2(diffusers.LTX2HDRPipeline)


def ltx2_dfr() -> Made:
    return _ltx2(diffusers.LTX2DFRPipeline, generate_slots=False)
