"""Trains the embedded model's video autoencoder on drawn clips: `python assets/training/train_vae.py`; resumes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import RUNS, Averages, autocast
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from dit_accel_assets import model_path, painter, world
from loop import Budget, Loss, Recipe, read_arguments, run_training
from torch import Tensor

VAE_CONFIG = {
    "base_dim": 24,
    "z_dim": 12,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 4,
    "scale_factor_temporal": 2,
    "latents_mean": [0.0] * 12,
    "latents_std": [1.0] * 12,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderRecipe(Recipe):
    """What the recipes of both autoencoders share."""

    lr: float = 2e-3
    adam_lr: float = 1e-3
    warmup: int = 50
    decay: float = 0.35
    ema: float = 0.997
    kl_weight: float = 5e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeTraining(AutoencoderRecipe):
    """The recipe. A stage is (share of the steps it ends at, ((weight, frames, picture, crop, batch), ...))."""

    seed: int = 3
    steps: int = 2000
    freeze_encoder_at: int = 900
    stages: tuple[tuple[float, tuple[tuple[float, int, int, int, int], ...]], ...] = (
        (0.4, ((0.6, 5, 64, 32, 8), (0.4, 9, 48, 32, 4))),
        (
            1.0,
            (
                (0.3, 5, 64, 32, 8),
                (0.2, 9, 48, 32, 4),
                (0.2, 17, 64, 32, 3),
                (0.2, 17, 48, 48, 1),
                (0.1, 17, 64, 64, 1),
            ),
        ),
    )


def draw_batch(rng: np.random.Generator, frames: int, picture: int, crop: int, batch: int) -> Tensor:
    """Draw windows of `frames` frames of clips of 17, cut to `crop` pixels around an object, [B, 3, F, crop, crop].

    Values are in [-1, 1]; corners are even.
    """
    out = []
    for _ in range(batch):
        scene = world.scene_of(int(rng.integers(2**40)), 0, height=picture, width=picture)
        first = int(rng.integers(0, world.FRAMES - frames + 1))
        video = painter.draw(scene, world.FRAMES)[first : first + frames]
        middle = world.centers(scene, world.FRAMES)[rng.integers(len(scene.things)), first + frames // 2]
        corner = np.clip(middle - crop / 2 + rng.uniform(-12, 12, 2), 0, picture - crop).astype(int) // 2 * 2
        out.append(video[:, corner[1] : corner[1] + crop, corner[0] : corner[0] + crop])
    return to_tensor(np.stack(out))


def to_tensor(videos: np.ndarray) -> Tensor:
    """Return uint8 clips [B, F, H, W, 3] as the autoencoder takes them, float [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1).contiguous()


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode as `vae.decode` does, latent frame by latent frame, but without its clamp, which would stop gradients."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    out = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        frame = hidden[:, :, index : index + 1]
        out.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(out, dim=2), patch_size=2)


def encode(vae: AutoencoderKLWan, video: Tensor) -> DiagonalGaussianDistribution:
    """Encode as `vae.encode` does, four frames at a time after the first one."""
    vae.clear_cache()
    patches = patchify(video, patch_size=2)
    out = []
    for first in [0, *range(1, video.shape[2], 4)]:
        vae._enc_conv_idx = [0]
        piece = patches[:, :, first : first + (4 if first else 1)]
        out.append(vae.encoder(piece, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    vae.clear_cache()
    return DiagonalGaussianDistribution(vae.quant_conv(torch.cat(out, dim=2)).float())


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR in dB of each clip of two batches with values in [-1, 1]."""
    return -10 * torch.log10(((a - b) / 2).pow(2).flatten(1).mean(1) + 1e-12)


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLWan, frames: int, picture: int, count: int) -> list[float]:
    """Return the PSNR of `count` held-out clips, reconstructed through the public encode and decode."""
    values = []
    for index in range(count):
        scene = world.scene_of(0, index, height=picture, width=picture, held_out=True)
        x = to_tensor(painter.draw(scene, frames)[None])
        values.append(psnr(vae.decode(vae.encode(x).latent_dist.mode()).sample, x).item())
    return values


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, count: int = 64) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of every latent channel over training clips."""
    videos = [painter.draw(world.scene_of(77, index, height=48, width=48)) for index in range(count)]
    latents = [vae.encode(to_tensor(video[None])).latent_dist.mode().transpose(0, 1).flatten(1) for video in videos]
    joined = torch.cat(latents, dim=1)
    return joined.mean(1).tolist(), joined.std(1).tolist()


def export(vae: AutoencoderKLWan, folder: Path) -> None:
    """Save the autoencoder in fp32 with its latent statistics."""
    mean, std = latent_statistics(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(folder)


@torch.no_grad()
def freeze_encoder(vae: AutoencoderKLWan, averages: Averages, folder: Path, first: bool) -> None:
    """Fix the encoder, so that latents no longer change while the decoder trains on.

    The `first` time the averaged weights become the present ones and are left in `folder`, for the transformer's
    training to start from.
    """
    if first:
        averages.swap()
        averages.values["vae"] = {name: param.detach().clone() for name, param in vae.named_parameters()}
        export(vae, folder)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


def first_autoencoder(start: Path | None) -> AutoencoderKLWan:
    """Return the autoencoder that training begins with: the packed one in `start`, or random weights if it is None."""
    vae = AutoencoderKLWan(**VAE_CONFIG) if start is None else AutoencoderKLWan.from_pretrained(start).float()
    for module in vae.modules():  # a fifth faster on a CPU
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    return vae


def reconstruction_loss(
    output: Tensor, target: Tensor, posterior: DiagonalGaussianDistribution, kl_weight: float
) -> Loss:
    """Return the loss of a reconstruction, and its parts: absolute error, squared error, KL a value."""
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    l1, mse = (output - target).abs().mean(), (output - target).pow(2).mean()
    return l1 + 2 * mse + kl_weight * kl, {"l1": l1.item(), "mse": mse.item(), "kl": kl.item()}


def train(config: VaeTraining, run: Path, start: Path | None, budget: Budget, change: bool = False) -> None:
    """Train, resuming exactly from the run's checkpoint where there is one; leaves `run/vae` at the end."""
    torch.manual_seed(config.seed)
    vae = first_autoencoder(start)

    def loss_at(step: int, rng: np.random.Generator, averages: Averages) -> Loss:
        if step >= config.freeze_encoder_at and vae.quant_conv.weight.requires_grad:
            freeze_encoder(vae, averages, run / "frozen", step == config.freeze_encoder_at)
        mix = next(mix for end, mix in config.stages if step < end * config.steps)
        video = draw_batch(rng, *mix[rng.choice(len(mix), p=[m[0] for m in mix])][1:])
        with autocast():
            posterior = encode(vae, video)
            output = decode(vae, posterior.sample()).float()
        return reconstruction_loss(output, video, posterior, config.kl_weight)

    step, averages, log = run_training(
        config, {"vae": vae}, loss_at, run=run, budget=budget, change=change, log_every=100, muon_dtype=torch.float32,
        plain_names=("encoder.conv_in", "decoder.conv_out", "quant_conv"),
    )  # fmt: skip
    if step == config.steps:
        averages.swap()
        export(vae, run / "vae")
        log.write(event="held-out", step=step, psnr=float(np.mean(held_out_psnr(vae, world.FRAMES, 64, 16))))


if __name__ == "__main__":
    args = read_arguments(__doc__, VaeTraining, RUNS / "vae", start=model_path("wan-plain") / "vae")
    train(args.config, args.run, args.start, args.budget, args.change)
