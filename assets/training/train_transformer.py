"""Trains the video model's transformer and text encoder: `python assets/training/train_transformer.py`; resumes.

In two processes, each with half of every batch: `torchrun --nproc-per-node 2 assets/training/train_transformer.py`.

Flow matching (arXiv 2210.02747, 2403.03206) on latents of drawn clips of one length and several sizes; the clips of a
size are encoded once into a pool on disk, when a stage first asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build import build_pipeline
from common import RUNS, Averages, autocast, fast_dtype
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from dit_accel_assets import model_path, painter, prompts, world
from fast_attention import TrainingCrossAttention, TrainingSelfAttention
from loop import Budget, Loss, Recipe, all_of, process, read_arguments, run_training, save_atomic
from torch import Tensor
from train_vae import to_tensor

SHARD = 250
PLAIN = ("shared", "embed_tokens", "relative_attention_bias", "proj_out", "patch_embedding", "scale_shift_table")
"""Weights that AdamW takes: embeddings, the output layer and what is no matrix."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerTraining(FlowRecipe):
    """The recipe. A stage is (the step it ends at, ((weight, height, width, batch), ...)); pools are (h, w, clips)."""

    seed: int = 5
    steps: int = 40_000
    shift: float = 5.0
    high_noise: float = 0.2
    hint: float = 0.2
    """Share of the batches in which one latent frame is less noisy than the rest: from one position on, the motion
    words decide all others, which teaches what they mean long before a path can be seen in the noise."""
    pools: tuple[tuple[int, int, int], ...] = (
        (40, 40, 4000), (48, 48, 6000), (64, 64, 3000), (64, 96, 1000), (96, 96, 1000)
    )  # fmt: skip
    stages: tuple[tuple[int, tuple[tuple[float, int, int, int], ...]], ...] = (
        (800, ((1.0, 40, 40, 20),)),
        (2000, ((1.0, 48, 48, 24),)),
        (40_000, ((0.4, 48, 48, 24), (0.4, 64, 64, 14), (0.1, 64, 96, 8), (0.1, 96, 96, 4))),
    )


class Pool:
    """Latents of one picture size, encoded where they are not on disk yet; prompts are drawn anew at each use."""

    def __init__(self, folder: Path, vae: AutoencoderKLWan, seed: int, height: int, width: int, count: int) -> None:
        if count % SHARD:
            raise ValueError(f"a pool of {count} clips is not a whole number of shards; use a multiple of {SHARD}")
        self.scenes = [world.scene_of(seed, index, height=height, width=width) for index in range(count)]
        folder.mkdir(parents=True, exist_ok=True)
        firsts = range(0, count, SHARD)
        paths = [folder / f"{seed}-{height}x{width}-{first:05d}.pt" for first in firsts]
        rank, processes = process()
        for first, path in list(zip(firsts, paths, strict=True))[rank::processes]:
            if not path.exists():
                save_atomic({"latents": encode_clips(vae, self.scenes[first : first + SHARD])}, path)
        all_of(True)  # every process has written its shards
        self.latents = torch.cat([torch.load(path)["latents"] for path in paths])
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean).view(shape)
        self.std = torch.tensor(vae.config.latents_std).view(shape)

    def batch(self, rng: np.random.Generator, count: int, dropout: float) -> tuple[Tensor, list[str]]:
        """Return normalised latents [B, C, F, h, w] and prompts, a share `dropout` of them empty."""
        picks = rng.integers(0, len(self.latents), count)
        texts = [prompts.prompt_of(self.scenes[pick], rng) for pick in picks]
        texts = ["" if rng.random() < dropout else text for text in texts]
        return (self.latents[torch.from_numpy(picks)].float() - self.mean) / self.std, texts


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, scenes: list[world.Scene]) -> Tensor:
    """Draw scenes and return the means of their latents, float16 [N, C, F, h, w]."""
    out = []
    for scene in scenes:
        with autocast():
            out.append(vae.encode(to_tensor(painter.draw(scene)[None])).latent_dist.mode()[0].half())
    return torch.stack(out)


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
    """Return the squared error of the velocity, noise - clip, at random noise levels (logit-normal, shifted)."""
    states, bias = encode_text(pipe, texts, rng)
    for block in pipe.transformer.blocks:
        block.attn2.processor.bias = bias
    level = noise_levels(rng, len(texts), config.shift, config.high_noise)
    noise, frames = torch.randn_like(latents), latents.shape[2]
    levels, time = level[:, None].repeat(1, frames), level * 1000
    if rng.random() < config.hint:
        hinted = torch.from_numpy(rng.integers(0, frames, len(texts)))[:, None]
        levels.scatter_(1, hinted, level[:, None] * torch.from_numpy(rng.random((len(texts), 1))).float())
        time = (levels * 1000).repeat_interleave(latents[0, 0, 0].numel() // 4, 1)  # one for each token
    mixed = torch.lerp(latents, noise, levels[:, None, :, None, None])
    with autocast():
        velocity = pipe.transformer(mixed, time, states, return_dict=False)[0]
    return (velocity.float() - (noise - latents)).pow(2).mean()


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
    begin(pipe, config.start, ("transformer", "text_encoder"))
    use_training_attention(pipe, True)
    return pipe


def begin(pipe: Any, start: str, parts: tuple[str, ...]) -> None:
    """Load the weights of an embedded model's parts into an untrained pipeline; nothing for ""."""
    for name in parts if start else ():
        part = getattr(pipe, name)
        part.load_state_dict(type(part).from_pretrained(model_path(start) / name, dtype=torch.float32).state_dict())


def train(config: TransformerTraining, run: Path, vae_folder: Path, budget: Budget, change: bool = False) -> None:
    """Train, resuming exactly from the run's checkpoint where there is one."""
    vae = AutoencoderKLWan.from_pretrained(vae_folder)
    pipe = prepare(config, vae)
    counts = {(height, width): count for height, width, count in config.pools}
    pools: dict[tuple[int, int], Pool] = {}

    def loss_at(step: int, rng: np.random.Generator, _averages: Averages) -> Loss:
        mix = next(mix for end, mix in config.stages if step < end)
        size = np.random.default_rng([config.seed, step]).choice(len(mix), p=[m[0] for m in mix])  # one for all
        _, height, width, count = mix[size]
        if (height, width) not in pools:
            pools[height, width] = Pool(run / "pool", vae, config.seed, height, width, counts[height, width])
        latents, texts = pools[height, width].batch(rng, -(-count // process()[1]), config.prompt_dropout)
        loss = flow_loss(pipe, latents, texts, rng, config)
        return loss, {f"loss_{height}x{width}": loss.item()}

    run_training(
        config, {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}, loss_at,
        run=run, budget=budget, change=change, log_every=25, muon_dtype=fast_dtype(), plain_names=PLAIN,
    )  # fmt: skip


if __name__ == "__main__":
    args = read_arguments(__doc__, TransformerTraining, RUNS / "transformer", vae=RUNS / "vae" / "frozen")
    train(args.config, args.run, args.vae, args.budget, args.change)
