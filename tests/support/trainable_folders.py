"""Folders of tiny random models that `finetune` trains, of diffusers' own classes, with tiny text encoders."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import tiny_video_kits as video
import torch
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from dit_accel_assets import model_path
from tiny_parts import EULER, Kit, assemble, build, tiny_video
from tokenizers import Tokenizer, models, pre_tokenizers

WIDTH = 96
"""Of the embedded model's text embeddings, which Wan, Mochi and LTX take here."""


@dataclass(frozen=True, slots=True)
class Case:
    """A tiny model and the clips that it trains on: five frames of 4 x 4 tokens.

    Attributes:
        pipeline: its class.
        kit: makes what it is assembled of.
        frames: of a clip.
        size: height and width of a clip.
        modules: attention modules that a LoRA changes, four layers each.
        changes: of the recipe.
    """

    pipeline: type
    kit: Callable[[], Kit]
    frames: int
    size: int
    modules: int
    changes: Any = None


def _embedded() -> Any:
    return diffusers.WanPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.float32)


def _texts() -> dict[str, Any]:
    embedded = _embedded()
    return dict(text_encoder=embedded.text_encoder, tokenizer=embedded.tokenizer)


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
    return video.hunyuan_video().but(
        transformer=tiny_video("hunyuan-video", guidance_embeds=True), text_encoder=llama.eval(),
        tokenizer=llama_words, text_encoder_2=clip.eval(), tokenizer_2=clip_words,
    )  # fmt: skip


def mochi() -> Any:
    model = tiny_video("mochi", in_channels=12, text_embed_dim=WIDTH, max_sequence_length=256)
    return video.mochi().but(transformer=model, force_zeros_for_empty_prompt=True, **_texts())


def ltx() -> Any:
    sizes = video.LTX_VAE | video.ltx_scaling(True, True, True, False) | dict(patch_size=4)
    autoencoder = build("AutoencoderKLLTXVideo", sizes, 0.2, True)
    autoencoder.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    autoencoder.latents_std.copy_(torch.tensor([0.5, 2.0, 1.0, 1.5]))
    shifted = EULER(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    model = tiny_video("ltx", caption_channels=WIDTH)
    return video.ltx().but(transformer=model, vae=autoencoder, scheduler=shifted, **_texts())


def wan(**options: Any) -> Any:
    """The embedded autoencoder and text encoder around one tiny transformer, or two."""
    parts = {"transformer": tiny_video("wan", text_dim=WIDTH, in_channels=12, out_channels=12)}
    if "boundary_ratio" in options:
        second = parts["transformer_2"] = tiny_video("wan", text_dim=WIDTH, in_channels=12, out_channels=12)
        second.blocks[0].attn1.to_q.weight.data.mul_(-1)
    embedded = _embedded()
    return Kit(dict(**_texts(), vae=embedded.vae, scheduler=embedded.scheduler, **parts, **options))


def _two(expert: str) -> Case:
    kit = partial(wan, boundary_ratio=0.875)
    return Case(diffusers.WanPipeline, kit, frames=9, size=32, modules=3, changes={"expert": expert})


CASES = {
    "hunyuan-video": Case(diffusers.HunyuanVideoPipeline, hunyuan_video, frames=17, size=64, modules=4),
    "mochi": Case(diffusers.MochiPipeline, mochi, frames=25, size=64, modules=3),
    "ltx": Case(diffusers.LTXPipeline, ltx, frames=33, size=128, modules=3),
    "wan ti2v": Case(diffusers.WanPipeline, partial(wan, expand_timesteps=True), frames=9, size=32, modules=3),
    "wan a14b high": _two("high"),
    "wan a14b low": _two("low"),
}
"""Name of a model beyond Wan 2.1 -> how it is built and what it trains on."""


def pipeline_folder(case: Case, folder: Path) -> Path:
    """Save a case's pipeline."""
    assemble(case.pipeline, case.kit())[0].save_pretrained(folder)
    return folder


def changed_index(folder: Path, **entries: Any) -> Path:
    """Put other entries into a saved pipeline's index."""
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))
    return folder
