"""Trains the embedded model's transformer and text encoder: `python assets/training/train_transformer.py`; resumes.

Flow matching (arXiv 2210.02747, 2403.03206) on latents of drawn clips, encoded once into a pool on disk.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from build import build_pipeline, build_scheduler
from common import RUNS, Averages, Log, Muon, restore, save_atomic, set_rates, split_parameters, store, trapezoid
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from dit_accel_assets import checker, clips
from fast_attention import TrainingCrossAttention, TrainingSelfAttention
from torch import Tensor

SHARD = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerTraining:
    """The recipe. A stage is (share of the steps it ends at, ((weight, pool, latent frames, batch), ...))."""

    seed: int = 2
    steps: int = 2700
    lr: float = 3e-3
    adam_lr: float = 2e-3
    warmup: int = 50
    decay: float = 0.3
    ema: float = 0.995
    shift: float = 12.0
    high_noise: float = 0.3
    """Share of the clips trained at noise levels of 0.9 to 1, where directions are decided."""
    hint: float = 0.5
    """Share of the batches in which one latent frame is less noisy than the rest: from one position on, the direction
    word decides all others, which teaches what it means long before a path can be seen in the noise."""
    prompt_dropout: float = 0.1
    bf16: bool = True
    pool_17: int = 3000
    pool_33: int = 1500
    sample_every: int = 1000
    stages: tuple[tuple[float, tuple[tuple[float, int, int, int], ...]], ...] = (
        (0.35, ((1.0, 17, 9, 8),)),
        (1.0, ((0.5, 17, 9, 8), (0.5, 33, 17, 4))),
    )


@torch.no_grad()
def fill_pool(vae_folder: Path, folder: Path, frames: int, count: int, first: int = 0) -> None:
    """Encode training clips into shards of float16 latents [500, C, F, h, w], means of the posterior."""
    folder.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKLWan.from_pretrained(vae_folder)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    for shard in range(first, count // SHARD):
        path = folder / f"{frames}-{shard:03d}.pt"
        if path.exists():
            continue
        latents, seeds = [], range(shard * SHARD, (shard + 1) * SHARD)
        for seed in seeds:
            _, _, video = clips.clip_of(seed + 1_000_000 * frames, frames=frames)
            x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float().div(127.5).sub(1)
            latents.append(vae.encode(x).latent_dist.mode()[0].half())
        save_atomic({"latents": torch.stack(latents)}, path)


class Pool:
    """Latents of one clip length, normalised; prompts are drawn anew each time a clip is used."""

    def __init__(self, folder: Path, frames: int, vae: AutoencoderKLWan) -> None:
        self.frames, self.folder, self.vae = frames, folder, vae
        paths = sorted(folder.glob(f"{frames}-*.pt"))
        self.latents = torch.cat([torch.load(path)["latents"] for path in paths])
        firsts = [int(path.stem.split("-")[1]) * SHARD + 1_000_000 * frames for path in paths]
        seeds = [first + index for first in firsts for index in range(SHARD)]
        self.scenes = [clips.sample_scene(np.random.default_rng([seed, 0])) for seed in seeds]
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(vae.config.latents_mean).view(shape)
        self.std = torch.tensor(vae.config.latents_std).view(shape)

    def batch(self, rng: np.random.Generator, latent_frames: int, count: int) -> tuple[Tensor, list[str]]:
        """Return normalised latents [B, C, F, h, w], cut to their first frames (the encoder is causal), and prompts."""
        picks = rng.integers(0, len(self.latents), count)
        latents = self.latents[torch.from_numpy(picks), :, :latent_frames].float()
        return (latents - self.mean) / self.std, [clips.prompt_of(self.scenes[pick], rng) for pick in picks]


def encode_text(pipe: WanPipeline, prompts: list[str], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return embeddings [B, L + 1, D], last one a pad, and the bias of cross-attention for a random number of pads."""
    tokens = pipe.tokenizer(prompts, padding=True, return_tensors="pt")
    mask = tokens.attention_mask.bool()
    states = pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state * mask[..., None]
    total = rng.choice([16, 32, 64, 128, 226, 512], len(prompts), p=[0.15, 0.15, 0.15, 0.15, 0.15, 0.25])
    pads = torch.from_numpy(total) - mask.sum(1)
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    bias = torch.cat([bias, pads.float().log()[:, None]], dim=1)[:, None, None]
    return torch.nn.functional.pad(states, (0, 0, 0, 1)), bias


def flow_loss(
    pipe: WanPipeline, latents: Tensor, prompts: list[str], rng: np.random.Generator, config: TransformerTraining
) -> Tensor:
    """Return the squared error of the velocity, noise - clip, at random noise levels (logit-normal, shifted)."""
    states, bias = encode_text(pipe, prompts, rng)
    for block in pipe.transformer.blocks:
        block.attn2.processor.bias = bias
    level = torch.from_numpy(1 / (1 + np.exp(-rng.standard_normal(len(prompts))))).float()
    level = config.shift * level / (1 + (config.shift - 1) * level)
    high = torch.from_numpy(rng.random(len(prompts)) < config.high_noise)
    level = torch.where(high, torch.from_numpy(rng.uniform(0.9, 1.0, len(prompts))).float(), level)
    noise, frames = torch.randn_like(latents), latents.shape[2]
    levels, time = level[:, None].repeat(1, frames), level * 1000
    if rng.random() < config.hint:
        hinted = torch.from_numpy(rng.integers(0, frames, len(prompts)))[:, None]
        levels.scatter_(1, hinted, level[:, None] * torch.from_numpy(rng.random((len(prompts), 1))).float())
        time = (levels * 1000).repeat_interleave(latents[0, 0, 0].numel() // 4, 1)  # one for each token
    mixed = torch.lerp(latents, noise, levels[:, None, :, None, None])
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        velocity = pipe.transformer(mixed, time, states, return_dict=False)[0]
    return (velocity.float() - (noise - latents)).pow(2).mean()


def generate(pipe: WanPipeline, prompts: list[str], seeds: list[int], frames: int, guidance: float = 4.0) -> np.ndarray:
    """Generate clips float32 [B, F, 64, 64, 3] in 20 steps through the public pipeline, eight at a time."""
    out = []
    for first in range(0, len(prompts), 8):
        part = slice(first, first + 8)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        out.append(
            pipe(prompts[part], height=64, width=64, num_frames=frames, num_inference_steps=20,
                 guidance_scale=guidance, generator=generators).frames)  # fmt: skip
    return np.concatenate(out)


def score(pipe: WanPipeline, count: int, frames: int, guidance: float = 4.0) -> dict[str, float]:
    """Return the checker's accuracies on the first `count` held-out (prompt, seed) pairs."""
    pairs = [clips.clip_of(seed, frames=1, held_out=True)[:2] for seed in range(count)]
    videos = generate(pipe, [prompt for prompt, _ in pairs], list(range(count)), frames, guidance)
    found = [checker.check(video) for video in videos]
    scenes = [scene for _, scene in pairs]
    return {
        name: float(np.mean([getattr(a, name) == getattr(b, name) for a, b in zip(found, scenes, strict=True)]))
        for name in ("color", "shape", "direction", "background")
    }


def use_training_attention(pipe: WanPipeline, training: bool) -> None:
    """Switch between the processors of training and the plain ones, which compute the same."""
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(TrainingSelfAttention() if training else WanAttnProcessor())
        block.attn2.set_processor(TrainingCrossAttention() if training else WanAttnProcessor())


def average_gradients(params: list[Tensor], ranks: int) -> None:
    """Average the gradients of all processes (parameters without one count as zero)."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    torch.distributed.all_reduce(flat)
    for param, grad in zip(params, flat.div_(ranks).split([p.numel() for p in params]), strict=True):
        param.grad = grad.view_as(param)


def first_pipeline(vae: AutoencoderKLWan, start: Path | None) -> WanPipeline:
    """Return the pipeline that training begins with: the packed model ``start``, or random weights if it is None."""
    if start is None:
        pipe = build_pipeline(vae)
        torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    else:
        pipe = WanPipeline.from_pretrained(start, vae=vae, dtype=torch.float32, local_files_only=True)
        pipe.scheduler = build_scheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def log_samples(pipe: WanPipeline, averages: Averages, log: Log, step: int) -> None:
    """Log the checker's accuracies of the averaged weights, with the attention that the pipeline will use."""
    averages.swap()
    use_training_attention(pipe, False)
    log.write(event="samples", step=step, **score(pipe, 16, 17))
    use_training_attention(pipe, True)
    averages.swap()


def train(
    config: TransformerTraining, run: Path, vae_folder: Path, rank: int, ranks: int, start: Path | None = None
) -> None:
    """Train, resuming from the run's checkpoint where there is one; rank 0 keeps log and checkpoint.

    Without a checkpoint the weights of the packed model ``start`` are the first ones, or random ones if it is None.
    """
    torch.manual_seed(config.seed)
    vae = AutoencoderKLWan.from_pretrained(vae_folder)
    pipe = first_pipeline(vae, start)
    modules = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    plain = ("shared", "embed_tokens", "relative_attention_bias", "proj_out", "patch_embedding", "scale_shift_table")
    matrices, rest = split_parameters(modules.values(), plain_names=plain)
    optimizers = [
        Muon(matrices, lr=config.lr, dtype=torch.bfloat16),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0),
    ]
    averages = Averages(modules, config.ema)
    step, clock = restore(run / "checkpoint.pt", averages, optimizers)
    log = Log(run / ("log.jsonl" if rank == 0 else f"rank{rank}.jsonl"), **clock)
    log.write(event="start", step=step, processes=ranks, config=asdict(config))
    pools: dict[int, Pool] = {}
    use_training_attention(pipe, True)
    saved_at, window = time.perf_counter(), []
    while step < config.steps:
        rng = np.random.default_rng([config.seed, step])
        mix = next(mix for end, mix in config.stages if step < end * config.steps)
        _, frames, latent_frames, count = mix[rng.choice(len(mix), p=[m[0] for m in mix])]
        rng = np.random.default_rng([config.seed, step, rank])
        torch.manual_seed((config.seed * 1_000_003 + step) * 64 + rank)
        if frames not in pools or step % 200 == 0:  # takes in shards that were encoded meanwhile
            pools[frames] = Pool(RUNS / "pool", frames, vae)
        latents, prompts = pools[frames].batch(rng, latent_frames, count)
        prompts = ["" if rng.random() < config.prompt_dropout else prompt for prompt in prompts]
        factor = trapezoid(step, config.steps, warmup=config.warmup, decay=config.decay)
        set_rates(optimizers, (config.lr, config.adam_lr), factor)
        loss = flow_loss(pipe, latents, prompts, rng, config)
        loss.backward()
        if ranks > 1:
            average_gradients([*matrices, *rest], ranks)
        torch.nn.utils.clip_grad_norm_([*matrices, *rest], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        averages.update()
        step += 1
        window.append(loss.item())
        if step % 50 == 0:
            log.write(step=step, loss=float(np.mean(window)), latent_frames=latent_frames)
            window = []
        if rank == 0 and step % config.sample_every == 0:
            log_samples(pipe, averages, log, step)
        if rank == 0 and time.perf_counter() - saved_at > 120:
            store(run / "checkpoint.pt", averages, optimizers, step, log)
            saved_at = time.perf_counter()
    if rank == 0:
        store(run / "checkpoint.pt", averages, optimizers, step, log)
    log.write(event="end", step=step)


def main() -> None:
    """Read the command line, fill the pool and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=RUNS / "transformer")
    parser.add_argument("--vae", type=Path, default=RUNS / "vae" / "frozen")
    parser.add_argument("--start", type=Path, help="packed model to go on from, where the run has no checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0, help="number of this process, where several train together")
    parser.add_argument("--ranks", type=int, default=1, help="how many processes train together; batches add up")
    parser.add_argument("--pool-only", type=int, help="only encode the clips of this many frames")
    parser.add_argument("--pool-from", type=int, default=0, help="first shard to encode, to share the work out")
    parser.add_argument("--set", type=json.loads, default={}, help='changes to the recipe as JSON, e.g. {"steps": 100}')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TransformerTraining(**args.set)
    for frames, count in ((17, config.pool_17), (33, config.pool_33)):
        if args.ranks == 1 and args.pool_only in (None, frames):
            fill_pool(args.vae, RUNS / "pool", frames, count, args.pool_from)
    if args.pool_only is None:
        if args.ranks > 1:
            meeting = f"file://{args.run.resolve()}.meeting"
            torch.distributed.init_process_group("gloo", init_method=meeting, rank=args.rank, world_size=args.ranks)
        train(config, args.run, args.vae, args.rank, args.ranks, args.start)


if __name__ == "__main__":
    main()
