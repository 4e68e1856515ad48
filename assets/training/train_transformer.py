"""Trains the video model's transformer and text encoder: `python assets/training/train_transformer.py`; resumes.

In two processes, each with half of every batch: `torchrun --nproc-per-node 2 -- assets/training/train_transformer.py`.

Flow matching (arXiv 2210.02747, 2403.03206) on latents, first of single pictures, then of clips of one length, each in
several sizes; the clips of a size are encoded once into a pool on disk, when a stage first asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build import build_pipeline
from common import RUNS, Averages, autocast, fast_dtype, packed_folder
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from dit_accel_assets import model_path, world
from fast_attention import TrainingCrossAttention, TrainingSelfAttention
from loop import Budget, Loss, Recipe, process, read_arguments, run_training
from pool import Pool
from reading import Reader
from torch import Tensor

LATENT_FRAMES = (world.FRAMES + 1) // 2
PLAIN = ("shared", "embed_tokens", "relative_attention_bias", "proj_out", "patch_embedding", "scale_shift_table")
"""Weights that AdamW takes: embeddings, the output layer and what is no matrix."""
QUERIES_AND_KEYS = {"to_q", "to_k", "add_q_proj", "add_k_proj", "norm_q", "norm_k", "norm_added_q", "norm_added_k"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowRecipe(Recipe):
    """What the recipes of both transformers share."""

    lr: float = 2.5e-3
    adam_lr: float = 2e-3
    warmup: int = 60
    decay: float = 0.1
    ema: float = 0.997
    shift: float
    """Shift of the noise levels towards high noise."""
    high_noise: float
    """Share of the clips trained at noise levels of 0.9 to 1, where motion is decided."""
    prompt_dropout: float = 0.1
    start: str = ""
    """Embedded model whose weights the training goes on from, without its optimizer's memory; "" begins anew."""
    sharpen: float = 1.0
    """What the gains of self-attention's queries are multiplied by at the start: attention to fewer places, as large
    models have it, takes trainings far longer than these. Unless 1, queries and keys stay as they start and the rest
    learns around them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerTraining(FlowRecipe):
    """The recipe. Sizes are height, width, frames.

    A stage is (the step it ends at, ((weight, *size, batch), ...)), a pool (*size, clips).
    """

    seed: int = 5
    steps: int = 3600
    decay: float = 0.15
    shift: float = 5.0
    high_noise: float = 0.2
    hint: float = 0.2
    """Share of the batches in which one latent frame is less noisy than the rest: from one position on, the motion
    words decide all others, which teaches what they mean long before a path can be seen in the noise."""
    first_frame: float = 4.0
    """Weight of a clip's first latent frame, which the autoencoder makes of one picture and the others of two, so that
    its code is another one of less than half the variance; which frame is the first one is learned late."""
    reading: float = 0.3
    """Weight of the second question, what is seen at each token."""
    reads: int = 5
    """Block whose output answers it."""
    pools: tuple[tuple[int, int, int, int], ...] = (
        (64, 64, 1, 20_000), (48, 48, 17, 4000), (64, 64, 17, 4000), (64, 96, 17, 500), (96, 96, 17, 500)
    )  # fmt: skip
    stages: tuple[tuple[int, tuple[tuple[float, int, int, int, int], ...]], ...] = (
        (1200, ((1.0, 64, 64, 1, 128),)),
        (1800, ((1.0, 48, 48, 17, 24),)),
        (3600, ((0.3, 48, 48, 17, 24), (0.55, 64, 64, 17, 14), (0.08, 64, 96, 17, 8), (0.07, 96, 96, 17, 4))),
    )


def encode_text(pipe: WanPipeline, texts: list[str], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return embeddings [B, L + 1, D], last one a pad, and the bias of cross-attention for a random number of pads."""
    tokens = pipe.tokenizer(texts, padding=True, return_tensors="pt")
    mask = tokens.attention_mask.bool()
    states = pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * mask[..., None]
    total = rng.choice([64, 128, 226, 512], len(texts), p=[0.2, 0.2, 0.2, 0.4])
    pads = torch.from_numpy(total) - mask.sum(1)
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    bias = torch.cat([bias, pads.float().log()[:, None]], dim=1)[:, None, None]
    return torch.nn.functional.pad(states, (0, 0, 0, 1)), bias


def noise_levels(rng: np.random.Generator, count: int, shift: float, high_noise: float) -> Tensor:
    """Return noise levels [B] in 0..1: logit-normal and shifted, a share `high_noise` of them even in 0.9 to 1."""
    level = torch.from_numpy(1 / (1 + np.exp(-rng.standard_normal(count)))).float()
    level = shift * level / (1 + (shift - 1) * level)
    high = torch.from_numpy(rng.random(count) < high_noise)
    return torch.where(high, torch.from_numpy(rng.uniform(0.9, 1.0, count)).float(), level)


def flow_loss(
    pipe: WanPipeline, latents: Tensor, texts: list[str], rng: np.random.Generator, config: TransformerTraining
) -> Tensor:
    """Return the squared error of the velocity, noise - clip, at random noise levels (logit-normal, shifted).

    The shift falls with the square root of the length, since fewer pictures tell less of what is behind the noise.
    """
    states, bias = encode_text(pipe, texts, rng)
    for block in pipe.transformer.blocks:
        block.attn2.processor.bias = bias
    noise, frames = torch.randn_like(latents), latents.shape[2]
    shift = config.shift * (frames / LATENT_FRAMES) ** 0.5
    level = noise_levels(rng, len(texts), shift, config.high_noise)
    levels, time = level[:, None].repeat(1, frames), level * 1000
    if rng.random() < config.hint and frames > 1:
        hinted = torch.from_numpy(rng.integers(0, frames, len(texts)))[:, None]
        levels.scatter_(1, hinted, level[:, None] * torch.from_numpy(rng.random((len(texts), 1))).float())
        time = (levels * 1000).repeat_interleave(latents[0, 0, 0].numel() // 4, 1)  # one for each token
    mixed = torch.lerp(latents, noise, levels[:, None, :, None, None])
    with autocast():
        velocity = pipe.transformer(mixed, time, states, return_dict=False)[0]
    errors = (velocity.float() - (noise - latents)).pow(2).mean((0, 1, 3, 4))
    errors[0] *= config.first_frame if frames > 1 else 1.0
    return errors.mean()


def use_training_attention(pipe: WanPipeline, training: bool) -> None:
    """Switch between the processors of training and the plain ones, which compute the same."""
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(TrainingSelfAttention() if training else WanAttnProcessor())
        block.attn2.set_processor(TrainingCrossAttention() if training else WanAttnProcessor())


def prepare(config: TransformerTraining, vae: AutoencoderKLWan) -> WanPipeline:
    """Return an untrained pipeline with training's attention."""
    torch.manual_seed(config.seed)
    pipe = build_pipeline(vae)
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    begin(pipe, config, ("transformer", "text_encoder"))
    use_training_attention(pipe, True)
    return pipe


@torch.no_grad()
def begin(pipe: Any, config: FlowRecipe, parts: tuple[str, ...]) -> None:
    """Load what the recipe starts from into an untrained pipeline, and sharpen its self-attention."""
    for name in parts if config.start else ():
        part = getattr(pipe, name)
        folder = model_path(config.start) / name
        part.load_state_dict(type(part).from_pretrained(folder, dtype=torch.float32).state_dict())
    for name, weight in pipe.transformer.named_parameters() if config.sharpen != 1 else ():
        path = set(name.split("."))
        if path & QUERIES_AND_KEYS and "attn2" not in path:
            weight.mul_(config.sharpen if path & {"norm_q", "norm_added_q"} else 1.0)
            weight.requires_grad_(False)


def train(config: TransformerTraining, run: Path, vae_folder: Path, budget: Budget, change: bool = False) -> None:
    """Train, resuming exactly from the run's checkpoint where there is one."""
    vae = AutoencoderKLWan.from_pretrained(packed_folder(vae_folder, "config.json"))
    pipe = prepare(config, vae)
    reader, states = Reader(pipe.transformer.patch_embedding.out_channels), {}
    counts = {tuple(size): count for *size, count in config.pools}
    pools: dict[tuple[int, ...], Pool] = {}
    block = pipe.transformer.blocks[min(config.reads, len(pipe.transformer.blocks) - 1)]
    block.register_forward_hook(lambda _module, _args, output: states.update(read=output))

    def loss_at(step: int, rng: np.random.Generator, _averages: Averages) -> Loss:
        mix = next(mix for end, mix in config.stages if step < end)
        size = np.random.default_rng([config.seed, step]).choice(len(mix), p=[m[0] for m in mix])  # one for all
        _, height, width, frames, count = mix[size]
        key = (height, width, frames)
        if key not in pools:
            pools[key] = Pool(run / "pool", vae, config.seed, *key, counts[key])
        latents, texts, scenes, seen = pools[key].batch(rng, -(-count // process()[1]), config.prompt_dropout)
        loss = flow_loss(pipe, latents, texts, rng, config)
        read = reader.loss(states["read"], scenes, seen)
        name = f"{height}x{width}x{frames}"
        return loss + config.reading * read, {f"loss_{name}": loss.item(), f"read_{name}": read.item()}

    run_training(
        config, {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "reader": reader}, loss_at,
        run=run, budget=budget, change=change, log_every=25, muon_dtype=fast_dtype(), plain_names=PLAIN,
    )  # fmt: skip


if __name__ == "__main__":
    args = read_arguments(__doc__, TransformerTraining, RUNS / "transformer", vae=RUNS / "vae" / "frozen")
    train(args.config, args.run, args.vae, args.budget, args.change)
