"""Builds the embedded pipeline's parts from their tiny configs, and saves and loads the whole in fp16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from dit_accel_assets import prompts
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_WIDTH = 96
TRANSFORMER_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 12,
    "out_channels": 12,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 12,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 256,
}
FLOW_SHIFT = 5.0
"""Shift of the sampling schedule towards high noise, as Wan's at 720p."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the world's vocabulary: lower case, hyphenated words whole, </s> at the end."""
    words = ["<pad>", "</s>", "<unk>", *prompts.world_vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s,.;:!?\"()]+"), behavior="removed")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def small_t5(vocabulary_size: int) -> dict[str, Any]:
    """Return the configuration of an encoder of two layers, T5's or UMT5's."""
    return {
        "vocab_size": vocabulary_size,
        "d_model": TEXT_WIDTH,
        "d_kv": 24,
        "d_ff": 192,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 32,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": True,
    }


def build_scheduler() -> UniPCMultistepScheduler:
    """Return the scheduler that Wan's pipelines ship with."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)


def build_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """Return a pipeline with an untrained transformer and text encoder around a given autoencoder."""
    tokenizer = build_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**small_t5(len(tokenizer)))),
        vae=vae,
        scheduler=build_scheduler(),
        transformer=WanTransformer3DModel(**TRANSFORMER_CONFIG),
    )


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in fp16 safetensors; `pipe` itself keeps its precision (weights are cast in a copy)."""
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in parts.items():
        part = type(part).from_pretrained(folder / name).to(torch.float16)
        part.save_pretrained(folder / name)
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text())
        values.pop("_name_or_path", None)
        text = json.dumps(values, indent=1 if file.name == "tokenizer.json" else 2)
        # the class name that transformers 4 and 5 both know
        file.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast") + "\n")
