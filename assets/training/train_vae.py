"""Trains the embedded model's video autoencoder on drawn clips: `python assets/training/train_vae.py`; resumes."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import RUNS, Averages, Log, Muon, restore, set_rates, split_parameters, store, trapezoid
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from dit_accel_assets import clips
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
class VaeTraining:
    """The recipe. A stage is (share of the steps it ends at, ((weight, frames, crop, batch), ...))."""

    seed: int = 1
    steps: int = 3300
    lr: float = 3e-3
    adam_lr: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.35
    ema: float = 0.998
    kl_weight: float = 3e-4
    bf16_until: float = 0.9
    freeze_encoder_at: int = 1930
    stages: tuple[tuple[float, tuple[tuple[float, int, int, int], ...]], ...] = (
        (0.3, ((1.0, 5, 32, 8),)),
        (0.55, ((0.5, 5, 32, 8), (0.4, 9, 32, 4), (0.1, 17, 64, 1))),
        (1.0, ((0.2, 5, 32, 8), (0.3, 9, 32, 4), (0.15, 17, 32, 3), (0.25, 17, 64, 1), (0.1, 33, 64, 1))),
    )


def draw_batch(rng: np.random.Generator, frames: int, crop: int, batch: int) -> Tensor:
    """Draw windows of `frames` frames, cut to `crop` pixels around the object, [B, 3, F, crop, crop] in [-1, 1]."""
    out = []
    for _ in range(batch):
        scene = clips.sample_scene(rng)
        whole = max(frames, int(rng.choice([17, 33])))
        first = int(rng.integers(0, whole - frames + 1))
        path = clips.centers(scene, whole)
        start = (float(path[first][0]), float(path[first][1]))
        window = replace(scene, start=start, travel=scene.travel * (frames - 1) / (whole - 1))
        video = clips.draw(window, frames)
        if crop < clips.SIZE:
            middle = clips.centers(window, frames)[frames // 2]
            corner = np.clip(middle - crop / 2 + rng.uniform(-12, 12, 2), 0, clips.SIZE - crop).astype(int) // 2 * 2
            video = video[:, corner[1] : corner[1] + crop, corner[0] : corner[0] + crop]
        out.append(video)
    return torch.from_numpy(np.stack(out)).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1).contiguous()


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
def held_out_psnr(vae: AutoencoderKLWan, frames: int, count: int) -> list[float]:
    """Return the PSNR of `count` held-out clips, reconstructed through the public encode and decode."""
    values = []
    for seed in range(count):
        _, _, video = clips.clip_of(seed, frames=frames, held_out=True)
        x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
        values.append(psnr(vae.decode(vae.encode(x).latent_dist.mode()).sample, x).item())
    return values


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, count: int = 48) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of every latent channel over training clips of 17 and 33 frames."""
    rng = np.random.default_rng(77)
    batches = [draw_batch(rng, 17 if index % 3 else 33, clips.SIZE, 1) for index in range(count)]
    latents = torch.cat([vae.encode(x).latent_dist.mode().transpose(0, 1).flatten(1) for x in batches], dim=1)
    return latents.mean(1).tolist(), latents.std(1).tolist()


def export(vae: AutoencoderKLWan, folder: Path) -> None:
    """Save the autoencoder in fp32 with its latent statistics."""
    mean, std = latent_statistics(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(folder)


@torch.no_grad()
def freeze_encoder(vae: AutoencoderKLWan, averages: Averages, folder: Path) -> None:
    """Fix the encoder at its averaged weights, so that latents no longer change while the decoder trains on.

    The first time it leaves that state in `folder`, for the transformer's training to start from.
    """
    if not folder.exists():
        averages.swap()
        averages.values["vae"] = {name: param.detach().clone() for name, param in vae.named_parameters()}
        export(vae, folder)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)


def train(config: VaeTraining, run: Path) -> None:
    """Train, resuming from the run's checkpoint where there is one; leaves `run/vae` at the end."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    for module in vae.modules():  # a fifth faster on a CPU
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    matrices, rest = split_parameters([vae], plain_names=("encoder.conv_in", "decoder.conv_out", "quant_conv"))
    optimizers = [
        Muon(matrices, lr=config.lr, dtype=torch.float32),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0),
    ]
    averages = Averages({"vae": vae}, config.ema)
    step, clock = restore(run / "checkpoint.pt", averages, optimizers)
    log = Log(run / "log.jsonl", **clock)
    log.write(event="start", step=step, threads=torch.get_num_threads(), config=asdict(config))
    saved_at, window = time.perf_counter(), []
    while step < config.steps:
        if step >= config.freeze_encoder_at and vae.quant_conv.weight.requires_grad:
            freeze_encoder(vae, averages, run / "frozen")
        rng = np.random.default_rng([config.seed, step])
        torch.manual_seed(config.seed * 1_000_003 + step)
        mix = next(mix for end, mix in config.stages if step < end * config.steps)
        _, frames, crop, batch = mix[rng.choice(len(mix), p=[m[0] for m in mix])]
        video = draw_batch(rng, frames, crop, batch)
        factor = trapezoid(step, config.steps, warmup=config.warmup, decay=config.decay)
        set_rates(optimizers, (config.lr, config.adam_lr), factor)
        with torch.autocast("cpu", torch.bfloat16, enabled=step < config.bf16_until * config.steps):
            posterior = encode(vae, video)
            output = decode(vae, posterior.sample()).float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        l1, mse = (output - video).abs().mean(), (output - video).pow(2).mean()
        (l1 + 2 * mse + config.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        vae.zero_grad()
        averages.update()
        step += 1
        window.append((l1.item(), mse.item(), kl.item()))
        if step % 100 == 0:
            means = np.mean(window, axis=0)
            log.write(step=step, l1=float(means[0]), train_psnr=float(10 * np.log10(4 / means[1])), kl=float(means[2]))
            window = []
        if step % 1000 == 0:
            averages.swap()
            figures = {f"psnr_{n}": float(np.mean(held_out_psnr(vae, n, 4))) for n in (17, 33)}
            averages.swap()
            log.write(event="held-out", step=step, **figures)
        if time.perf_counter() - saved_at > 120:
            store(run / "checkpoint.pt", averages, optimizers, step, log)
            saved_at = time.perf_counter()
    store(run / "checkpoint.pt", averages, optimizers, step, log)
    averages.swap()
    export(vae, run / "vae")
    figures = {f"psnr_{n}": float(np.mean(held_out_psnr(vae, n, 16))) for n in (17, 33)}
    log.write(event="end", step=step, **figures)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=RUNS / "vae")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", type=json.loads, default={}, help='changes to the recipe as JSON, e.g. {"steps": 100}')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(VaeTraining(**args.set), args.run)


if __name__ == "__main__":
    main()
