"""Distils a LoRA that samples in few steps without guidance: `python assets/training/distill.py --steps 4`; resumes.

Trajectory distillation: the teacher, with guidance, is followed along its ordinary differential equation from each
noise level at which the student will stop to the next (as PeRFlow divides it, arXiv 2405.07510), and the student
learns the mean velocity of each piece, half of the time from where its own last step led it. The student is sampled by
Euler steps on the same noise levels with guidance switched off.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RUNS, Averages, autocast, fast_dtype
from dit_accel_assets import load, model_defaults, prompts, world
from loop import Budget, Loss, Recipe, run_training, save_atomic
from torch import Tensor

SHARD = 50
EMPTY = 0.03
"""Steps no longer than this stay as they are: they change next to nothing, and can't mend what those before did."""
TARGETS = {"to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"}
FLUX_TARGETS = {
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation(Recipe):
    """The recipe; noise levels are those of FlowMatchEulerDiscreteScheduler."""

    model: str = "wan-tiny"
    student_steps: int = 4
    flow_shift: float = 5.0
    inner_steps: int = 24
    """Steps of the teacher along the whole path, at least two a piece."""
    clips: int = 1500
    rank: int = 16
    batch: int = 8
    seed: int = 31
    steps: int = 2400
    lr: float = 0.0
    adam_lr: float = 1e-3
    warmup: int = 40
    decay: float = 0.5
    ema: float = 0.99
    own_path: float = 0.5
    """Share of the pieces that begin where the student's own last step led."""


class Video:
    """The Wan model: latents [B, C, F, h, w]."""

    def __init__(self, name: str) -> None:
        self.pipe = load(name)
        self.guidance = float(model_defaults(name)["guidance_scale"])

    def levels(self, steps: int, shift: float) -> tuple[Tensor, Tensor]:
        """Return the noise levels [steps + 1], which end at 0, and the timesteps [steps] that the model is given."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.clone(), scheduler.timesteps.clone()

    def scene(self, seed: int, place: int) -> world.Scene:
        """Return a scene that is not held out."""
        return world.scene_of(seed, place, height=64, width=64)

    def noise(self, count: int) -> Tensor:
        """Return noise for so many clips."""
        vae = self.pipe.vae.config
        return torch.randn(count, self.pipe.transformer.config.in_channels, *self.grid(vae))

    def grid(self, _vae: Any) -> tuple[int, int, int]:
        """Return the frames, rows and columns of the latents."""
        down = self.pipe.vae_scale_factor_spatial
        return (world.FRAMES - 1) // self.pipe.vae_scale_factor_temporal + 1, 64 // down, 64 // down

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Return what the transformer is given of the prompts."""
        return {"encoder_hidden_states": self.pipe.encode_prompt(texts, do_classifier_free_guidance=False,
                                                                 max_sequence_length=512)[0]}  # fmt: skip

    def velocity(self, latents: Tensor, time: Tensor, states: dict[str, Tensor]) -> Tensor:
        """Return the velocity at timesteps [B]."""
        return self.pipe.transformer(latents, time, **states, return_dict=False)[0]


class Image(Video):
    """The Flux model: latents are packed, [B, tokens, C]."""

    size = 96

    def __init__(self, name: str) -> None:
        self.pipe = load(name)
        self.guidance = float(model_defaults(name)["true_cfg_scale"])
        self.length = int(model_defaults(name)["max_sequence_length"])

    def levels(self, steps: int, shift: float) -> tuple[Tensor, Tensor]:
        """Return the levels that the pipeline's own call takes for its size; a shift of its own is left out."""
        self.pipe("", num_inference_steps=steps, true_cfg_scale=1.0, output_type="latent")
        return self.pipe.scheduler.sigmas.clone(), self.pipe.scheduler.timesteps.clone()

    def scene(self, seed: int, place: int) -> world.Scene:
        """Return a still scene that is not held out."""
        return world.scene_of(seed, place, height=self.size, width=self.size, still=True)

    def noise(self, count: int) -> Tensor:
        """Return noise for so many pictures."""
        return torch.randn(count, (self.size // 8) ** 2, self.pipe.transformer.config.in_channels)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Return what the transformer is given of the prompts."""
        states, pooled, text_ids = self.pipe.encode_prompt(texts, None, max_sequence_length=self.length)
        side = self.size // 8
        places = self.pipe._prepare_latent_image_ids(len(texts), side, side, states.device, states.dtype)
        return {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": text_ids, "img_ids": places}

    def velocity(self, latents: Tensor, time: Tensor, states: dict[str, Tensor]) -> Tensor:
        """Return the velocity at timesteps [B]."""
        return self.pipe.transformer(latents, timestep=time / 1000, **states, return_dict=False)[0]


def subject_of(name: str) -> Video:
    """Return an embedded model to distil."""
    return Image(name) if "flux" in name else Video(name)


def inner_levels(high: float, low: float, steps: int, shift: float) -> np.ndarray:
    """Return noise levels from high to low, even in the time before the shift."""
    first, last = (level / (shift - (shift - 1) * level) for level in (high, low))
    time = np.linspace(first, last, steps + 1)
    return shift * time / (1 + (shift - 1) * time)


@torch.no_grad()
def path_of(subject: Video, config: Distillation, places: range) -> dict[str, Any]:
    """Return the teacher's path for some scenes: latents [levels, B, ...] in float16, and the prompts."""
    rng = np.random.default_rng([config.seed, places.start])
    torch.manual_seed(config.seed * 100_003 + places.start)
    texts = [prompts.prompt_of(subject.scene(config.seed, place), rng) for place in places]
    levels, _ = subject.levels(config.student_steps, config.flow_shift)
    count = len(texts)
    text, empty = subject.encode(texts), subject.encode([""] * count)

    def guided(latents: Tensor, level: float) -> Tensor:
        time = torch.full((count,), level * 1000)
        with autocast():
            towards, away = (subject.velocity(latents, time, states).float() for states in (text, empty))
        return away + subject.guidance * (towards - away)

    latents = subject.noise(count)
    path, last, length = [latents.half()], None, 0.0
    starts = inner_levels(1.0, 0.0, config.inner_steps, config.flow_shift)
    for high, low in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        inner = max(2, int(((starts < high) & (starts > low)).sum()) + 1)
        for a, b in np.lib.stride_tricks.sliding_window_view(inner_levels(high, low, inner, config.flow_shift), 2):
            here, step = guided(latents, float(a)), float(b - a)
            ratio = step / (2 * length) if last is not None else 0.0  # Adams and Bashforth's second order
            latents = latents + step * ((1 + ratio) * here - ratio * (here if last is None else last))
            last, length = here, step
        path.append(latents.half())
    return {"path": torch.stack(path), "texts": texts}


def paths_on_disk(subject: Video, config: Distillation, run: Path, budget: Budget) -> list[Path] | None:
    """Follow the teacher where a file is missing; None if the budget ended first."""
    paths = []
    for first in range(0, config.clips, SHARD):
        path = run / "paths" / f"{first:05d}.pt"
        if not path.exists():
            if not budget.left():
                return None
            parts = [path_of(subject, config, range(k, k + 10)) for k in range(first, first + SHARD, 10)]
            save_atomic({"path": torch.cat([part["path"] for part in parts], dim=1),
                         "texts": [text for part in parts for text in part["texts"]]}, path)  # fmt: skip
        paths.append(path)
    return paths


def add_lora(subject: Video, rank: int) -> None:
    """Give the transformer a LoRA, alone to be trained."""
    from peft import LoraConfig

    transformer = subject.pipe.transformer
    transformer.requires_grad_(False)
    targets = FLUX_TARGETS if isinstance(subject, Image) else TARGETS
    named = [name for name, module in transformer.named_modules()
             if isinstance(module, torch.nn.Linear) and "blocks" in name
             and any(name.endswith(f".{end}") for end in targets)]  # fmt: skip
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=named))


def step_loss(subject: Video, config: Distillation, shards: list[dict[str, Any]]) -> Callable[..., Loss]:
    """Return the loss of a step: squared distance of the student's next latents from the teacher's."""
    levels, times = subject.levels(config.student_steps, config.flow_shift)
    texts = [text for shard in shards for text in shard["texts"]]
    path = torch.cat([shard["path"] for shard in shards], dim=1)
    lengths = (levels[:-1] - levels[1:]).numpy()
    weights = lengths * (lengths > EMPTY)

    def next_latents(latents: Tensor, place: int, states: dict[str, Tensor]) -> Tensor:
        with autocast():
            velocity = subject.velocity(latents, times[place].expand(len(latents)), states).float()
        return latents + (levels[place + 1] - levels[place]) * velocity

    def loss_at(_step: int, rng: np.random.Generator, _averages: Averages) -> Loss:
        place = int(rng.choice(config.student_steps, p=weights / weights.sum()))
        picks = rng.integers(0, len(texts), config.batch)
        with torch.no_grad():
            states = subject.encode([texts[pick] for pick in picks])
            own = place > 0 and rng.random() < config.own_path
            first = int(rng.integers(0, place)) if own else place
            latents = path[first, picks].float()
            for before in range(first, place):
                latents = next_latents(latents, before, states)
        error = next_latents(latents, place, states) - path[place + 1, picks].float()
        loss = error.pow(2).mean() / (levels[place] - levels[place + 1]) ** 2
        return loss, {f"loss_{place}": loss.item()}

    return loss_at


def main() -> None:
    """Follow the teacher and train; `export_lora.py` packs what the checkpoint holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=RUNS / "distill")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--set", type=json.loads, default={}, help="changes to the recipe as JSON")
    parser.add_argument("--change", action="store_true", help="go on from a checkpoint of another recipe")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, budget = Distillation(**args.set), Budget(args.minutes)
    subject = subject_of(config.model)
    subject.pipe.set_progress_bar_config(disable=True)
    paths = paths_on_disk(subject, config, args.run, budget)
    if paths is None:
        return
    torch.manual_seed(config.seed)
    add_lora(subject, config.rank)
    loss_at = step_loss(subject, config, [torch.load(path) for path in paths])
    run_training(
        config, {"transformer": subject.pipe.transformer}, loss_at, run=args.run, budget=budget, change=args.change,
        plain_names=("",), muon_dtype=fast_dtype(), log_every=25,
    )  # fmt: skip


if __name__ == "__main__":
    main()
