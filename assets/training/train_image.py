"""Trains the image model on still scenes: `python assets/training/train_image.py`; first its autoencoder, then Flux.

One picture size alone, so that twice the size is plain extrapolation; or several, as released models are trained, by
`--set '{"start": "flux-tiny", "sizes": [[0.3, 96, 20], ...]}'`. Pictures are drawn and encoded when needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from build_image import IMAGE_VAE_CONFIG, TEXT_LENGTH, build_flux_pipeline
from common import RUNS, Averages, autocast, fast_dtype, last_checkpoint
from diffusers import AutoencoderKL, FluxPipeline
from dit_accel_assets import model_path, painter, prompts, world
from loop import Budget, Loss, read_arguments, run_training
from reading import Reader, coverage
from torch import Tensor
from train_transformer import FlowRecipe, begin, noise_levels
from train_vae import AutoencoderRecipe, reconstruction_loss

PLAIN = (
    "shared",
    "embed_tokens",
    "token_embedding",
    "position_embedding",
    "relative_attention_bias",
    "proj_out",
    "x_embedder",
)
TRAINED = ("transformer", "text_encoder", "text_encoder_2")
VAE_PLAIN = ("encoder.conv_in", "decoder.conv_out")
SHIFT_SIZE = 96
"""Picture size in pixels that a recipe's shift of the noise levels is meant for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageVaeTraining(AutoencoderRecipe):
    """The autoencoder's recipe; sizes in pixels."""

    seed: int = 7
    steps: int = 3000
    picture: int = 96
    crop: int = 48
    batch: int = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class FluxTraining(FlowRecipe):
    """The transformer's and text encoders' recipe."""

    seed: int = 8
    steps: int = 20_000
    shift: float = 3.0
    high_noise: float = 0.15
    sizes: tuple[tuple[float, int, int], ...] = ((1.0, 96, 20),)
    """(weight, pixels, batch); each step takes one of them."""
    reading: float = 0.3
    """Weight of the second question, what is seen at each token, put to the last block of both streams."""


def draw_pictures(rng: np.random.Generator, picture: int, crop: int, batch: int) -> tuple[Tensor, list[world.Scene]]:
    """Draw still scenes and cut `crop` pixels at even places, [B, 3, crop, crop] in [-1, 1]."""
    out, scenes = [], []
    for _ in range(batch):
        scene = world.scene_of(int(rng.integers(2**40)), 1, height=picture, width=picture, still=True)
        top, left = rng.integers(0, (picture - crop) // 2 + 1, 2) * 2
        out.append(painter.draw(scene, 1)[0, top : top + crop, left : left + crop])
        scenes.append(scene)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(), scenes


def train_autoencoder(config: ImageVaeTraining, run: Path, budget: Budget, change: bool = False) -> bool:
    """Train the autoencoder, resuming exactly; leaves `run/vae` and returns True once its steps are done."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(**IMAGE_VAE_CONFIG)

    def loss_at(_step: int, rng: np.random.Generator, _averages: Averages) -> Loss:
        pictures, _ = draw_pictures(rng, config.picture, config.crop, config.batch)
        with autocast():
            posterior = vae.encode(pictures).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        return reconstruction_loss(output, pictures, posterior, config.kl_weight)

    step, averages, _ = run_training(
        config, {"vae": vae}, loss_at, run=run, budget=budget, change=change, log_every=100, muon_dtype=torch.float32,
        plain_names=VAE_PLAIN,
    )  # fmt: skip
    if step == config.steps:
        averages.swap()
        with torch.no_grad():
            pictures, _ = draw_pictures(np.random.default_rng(77), config.picture, config.picture, 64)
            latents = vae.encode(pictures).latent_dist.mode()
        vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
        vae.save_pretrained(run / "vae")
    return step == config.steps


def flux_loss(
    pipe: FluxPipeline, latents: Tensor, texts: list[str], rng: np.random.Generator, config: FluxTraining
) -> Tensor:
    """Return the squared error of the velocity, noise - picture, of packed latents at random noise levels."""
    clip = pipe.tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    t5 = pipe.tokenizer_2(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    pooled, states = pipe.text_encoder(clip).pooler_output, pipe.text_encoder_2(t5)[0]
    batch, channels, height, width = latents.shape
    shift = config.shift * height * 4 / SHIFT_SIZE  # a larger picture shows through more noise
    level = noise_levels(rng, batch, shift, config.high_noise)
    noise = torch.randn_like(latents)
    mixed = torch.lerp(latents, noise, level[:, None, None, None])
    with autocast():
        velocity = pipe.transformer(
            hidden_states=pipe._pack_latents(mixed, batch, channels, height, width),
            timestep=level,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(TEXT_LENGTH, 3),
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, torch.float32),
            return_dict=False,
        )[0]
    return (velocity.float() - pipe._pack_latents(noise - latents, batch, channels, height, width)).pow(2).mean()


def train_flux(config: FluxTraining, run: Path, vae_folder: Path, budget: Budget, change: bool = False) -> None:
    """Train transformer and text encoders, resuming exactly from the run's checkpoint where there is one."""
    torch.manual_seed(config.seed)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    pipe = build_flux_pipeline(vae)
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    begin(pipe, config, TRAINED)
    reader, states = Reader(pipe.transformer.inner_dim), {}
    pipe.transformer.transformer_blocks[-1].register_forward_hook(
        lambda _module, _args, output: states.update(read=output[1])
    )

    weights = np.array([weight for weight, *_ in config.sizes]) / sum(weight for weight, *_ in config.sizes)

    def loss_at(_step: int, rng: np.random.Generator, _averages: Averages) -> Loss:
        _, size, batch = config.sizes[rng.choice(len(config.sizes), p=weights) if len(weights) > 1 else 0]
        pictures, scenes = draw_pictures(rng, size, size, batch)
        with torch.no_grad(), autocast():
            latents = vae.encode(pictures).latent_dist.mode().float()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        texts = [prompts.prompt_of(scene, rng) for scene in scenes]
        texts = ["" if rng.random() < config.prompt_dropout else text for text in texts]
        loss = flux_loss(pipe, latents, texts, rng, config)
        read = reader.loss(states["read"], scenes, torch.stack([coverage(scene, 1) for scene in scenes]))
        name = f"_{size}" if len(weights) > 1 else ""
        return loss + config.reading * read, {f"loss{name}": loss.item(), f"read{name}": read.item()}

    modules = {name: getattr(pipe, name) for name in TRAINED} | {"reader": reader}
    run_training(
        config, modules, loss_at, run=run, budget=budget, change=change, log_every=25, muon_dtype=fast_dtype(),
        plain_names=PLAIN,
    )  # fmt: skip


def trained_flux(runs: Path) -> tuple[FluxPipeline, int]:
    """Return the pipeline with the averaged weights of the training in `runs`, fp32, and its step."""
    folder = runs / "image-vae" / "vae"
    vae = AutoencoderKL.from_pretrained(
        folder if folder.exists() else model_path("flux-tiny") / "vae", dtype=torch.float32
    )
    pipe = build_flux_pipeline(vae)
    state = last_checkpoint(runs / "flux")
    for name in TRAINED:
        getattr(pipe, name).load_state_dict(state["averages"][name], strict=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, state["step"]


def main() -> None:
    """Read the command line; train the autoencoder as far as it is not, then the rest."""
    args = read_arguments(__doc__, FluxTraining, RUNS / "flux", vae=RUNS / "image-vae")
    if not (args.vae / "vae" / "config.json").exists():
        print(json.dumps({"training": "autoencoder", "run": str(args.vae)}), flush=True)
        if not train_autoencoder(ImageVaeTraining(), args.vae, args.budget, args.change):
            return
    train_flux(args.config, args.run, args.vae / "vae", args.budget, args.change)


if __name__ == "__main__":
    main()
