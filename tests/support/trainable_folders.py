"""Folders of tiny random models that `finetune` trains, of diffusers' own classes, with tiny text encoders."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from dit_accel_assets import model_path
from tiny_models import HUNYUAN_TINY, LTX_TINY, MOCHI
from tokenizers import Tokenizer, models, pre_tokenizers

WIDTH = 96
"""Of the embedded model's text embeddings, which Wan, Mochi and LTX take here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tiny model and the clips that it trains on: five frames of 4 x 4 tokens.

    Attributes:
        make: builds the pipeline.
        frames: of a clip.
        size: height and width of a clip.
        modules: attention modules that a LoRA changes, four layers each.
        changes: of the recipe.
    """

    make: Callable[[], Any]
    frames: int
    size: int
    modules: int
    changes: Any = None


def _built(cls: type, config: dict[str, Any], seed: int = 0) -> Any:
    """A model from a seed, its gates opened: some start at zero, which would hide all that attention does."""
    torch.manual_seed(seed)
    model = cls(**config).eval()
    for parameter in model.parameters():
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _embedded() -> Any:
    return diffusers.WanPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.float32)


def _words(template: str = "") -> Any:
    """A tokenizer of words, which knows those of the embedded model and of a template."""
    split = pre_tokenizers.Whitespace()
    seen = [word for word, _ in split.pre_tokenize_str(template)]
    known = [*("<pad>", "</s>", "<unk>"), *_embedded().tokenizer.get_vocab(), *seen]
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(dict.fromkeys(known))}, "<unk>"))
    words.pre_tokenizer = split
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def hunyuan_video() -> Any:
    vae = dict(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    llama_words, clip_words = _words(DEFAULT_PROMPT_TEMPLATE["template"]), _words()
    torch.manual_seed(1)
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=len(llama_words), hidden_size=16, intermediate_size=16, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
        )
    )  # fmt: skip
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(clip_words), hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        text_encoder=llama.eval(), tokenizer=llama_words, text_encoder_2=clip.eval(), tokenizer_2=clip_words,
        transformer=_built(diffusers.HunyuanVideoTransformer3DModel, dict(HUNYUAN_TINY, guidance_embeds=True)),
        vae=_built(diffusers.AutoencoderKLHunyuanVideo, vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def mochi() -> Any:
    embedded = _embedded()
    vae = dict(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    transformer = dict(MOCHI[0].config, in_channels=12, text_embed_dim=WIDTH, max_sequence_length=256)
    return diffusers.MochiPipeline(
        text_encoder=embedded.text_encoder, tokenizer=embedded.tokenizer, force_zeros_for_empty_prompt=True,
        transformer=_built(diffusers.MochiTransformer3DModel, transformer),
        vae=_built(diffusers.AutoencoderKLMochi, vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )  # fmt: skip


def ltx() -> Any:
    embedded = _embedded()
    vae = dict(
        latent_channels=4, block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, True, False), patch_size=4,
        decoder_spatio_temporal_scaling=(True, True, True, False), patch_size_t=1,
    )  # fmt: skip
    autoencoder = _built(diffusers.AutoencoderKLLTXVideo, vae)
    autoencoder.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    autoencoder.latents_std.copy_(torch.tensor([0.5, 2.0, 1.0, 1.5]))
    return diffusers.LTXPipeline(
        text_encoder=embedded.text_encoder, tokenizer=embedded.tokenizer,
        transformer=_built(diffusers.LTXVideoTransformer3DModel, dict(LTX_TINY, caption_channels=WIDTH)),
        vae=autoencoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
    )  # fmt: skip


def wan(**options: Any) -> Any:
    """The embedded autoencoder and text encoder around one tiny transformer, or two."""
    embedded = _embedded()
    config = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=12, out_channels=12,
        text_dim=WIDTH, freq_dim=32, ffn_dim=48, num_layers=3, rope_max_seq_len=64,
    )  # fmt: skip
    parts = {"transformer": _built(diffusers.WanTransformer3DModel, config)}
    if "boundary_ratio" in options:
        parts["transformer_2"] = _built(diffusers.WanTransformer3DModel, config, seed=1)
    given = {name: getattr(embedded, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return diffusers.WanPipeline(**given, **parts, **options)


CASES = {
    "hunyuan-video": Case(make=hunyuan_video, frames=17, size=64, modules=4),
    "mochi": Case(make=mochi, frames=25, size=64, modules=3),
    "ltx": Case(make=ltx, frames=33, size=128, modules=3),
    "wan ti2v": Case(make=lambda: wan(expand_timesteps=True), frames=9, size=32, modules=3),
    "wan a14b high": Case(
        make=lambda: wan(boundary_ratio=0.875), frames=9, size=32, modules=3, changes={"expert": "high"}
    ),
    "wan a14b low": Case(
        make=lambda: wan(boundary_ratio=0.875), frames=9, size=32, modules=3, changes={"expert": "low"}
    ),
}  # fmt: skip
"""Name of a model beyond Wan 2.1 -> how it is built and what it trains on."""


def pipeline_folder(case: Case, folder: Path) -> Path:
    """Save a case's pipeline."""
    case.make().save_pretrained(folder)
    return folder


def changed_index(folder: Path, **entries: Any) -> Path:
    """Put other entries into a saved pipeline's index."""
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))
    return folder
