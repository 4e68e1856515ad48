"""What is sampled and judged: the video model or the image model, by one set of calls."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RUNS, packed_folder
from dit_accel_assets import catalog, painter, prompts, world
from export import trained_pipeline
from train_image import trained_flux
from train_vae import to_tensor

TOGETHER = 4
"""Prompts that are sampled in one call."""


class Subject(ABC):
    """A kind of model: how its pipeline is loaded, called, reconstructed, and made to go beyond what it was trained on.

    Attributes:
        name: its name in the catalog.
        size: picture size in pixels it is judged at.
        frames: frames of a clip; 1 for pictures.
        beyond: (size, frames) of plain extrapolation.
        crowded: (size, frames) at which there are 4,000 tokens and more.
        guidance: guidance scale.
        dispatch: the diffusers module whose `dispatch_attention_fn` all of its attention goes through.
    """

    name: str
    size: int
    frames: int
    beyond: tuple[int, int]
    crowded: tuple[int, int]
    guidance = 4.0
    dispatch: str

    @abstractmethod
    def trained(self, runs: Path) -> tuple[Any, int]:
        """Return the pipeline of the trainings in `runs` and their step."""

    @abstractmethod
    def arguments(self, count: int, frames: int, guidance: float) -> dict[str, Any]:
        """Return the call arguments that only this pipeline takes, for so many prompts."""

    @abstractmethod
    def videos(self, output: Any) -> Iterator[np.ndarray]:
        """Yield float32 [F, H, W, 3] in 0..1 for each prompt of a call."""

    @abstractmethod
    def reconstruct(self, pipe: Any, scene: world.Scene) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a drawn scene and what the autoencoder makes of it, [1, 3, F, H, W] in -1..1."""

    def load(self, model: Path | None, runs: Path) -> tuple[Any, str]:
        """Return a packed model's pipeline in fp32, or that of the trainings in `runs` if none is given, and a name."""
        if model is None:
            pipe, step = self.trained(runs)
            return pipe, f"step {step}"
        kind = getattr(import_module("diffusers"), catalog.KNOWN[self.name].pipeline)
        pipe = kind.from_pretrained(
            packed_folder(model, "model_index.json"), dtype=torch.float32, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe, model.name

    def scenes(self, count: int, size: int | tuple[int, int], first: int = 0) -> list[world.Scene]:
        """Return the first held-out scenes at a picture size; their prompts at the judged size are the catalog's."""
        height, width = (size, size) if isinstance(size, int) else size
        still = self.frames == 1
        places = range(first, first + count)
        return [world.scene_of(0, k, height=height, width=width, held_out=True, still=still) for k in places]

    def generate(
        self, pipe: Any, scenes: list[world.Scene], frames: int, steps: int, guidance: float, **more: Any
    ) -> Iterator[np.ndarray]:
        """Yield a clip for each scene's prompt, its number being the seed."""
        for first in range(0, len(scenes), TOGETHER):
            part = scenes[first : first + TOGETHER]
            output = pipe(
                [prompts.prompt_of(scene) for scene in part],
                height=part[0].height,
                width=part[0].width,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(first + index) for index in range(len(part))],
                **self.arguments(len(part), frames, guidance) | more,
            )
            if more.get("output_type") != "latent":
                yield from self.videos(output)


class Video(Subject):
    """The Wan model: 17 frames; three times the length is beyond it."""

    name = "wan-tiny"
    size, frames = 64, world.FRAMES
    beyond = (64, 3 * (world.FRAMES - 1) + 1)
    crowded = (128, 33)
    dispatch = "diffusers.models.transformers.transformer_wan"
    trained: Callable[..., Any] = staticmethod(trained_pipeline)

    def arguments(self, count: int, frames: int, guidance: float) -> dict[str, Any]:
        """Return length and guidance."""
        return {"num_frames": frames, "guidance_scale": guidance}

    def videos(self, output: Any) -> Iterator[np.ndarray]:
        """Yield the clips."""
        yield from output.frames

    @torch.no_grad()
    def reconstruct(self, pipe: Any, scene: world.Scene) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a drawn clip and its reconstruction."""
        x = to_tensor(painter.draw(scene, self.frames)[None])
        return x, pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample


class Image(Subject):
    """The Flux model: 96 pixels square; twice the size is beyond it."""

    name = "flux-tiny"
    size, frames = 96, 1
    beyond = (192, 1)
    crowded = (512, 1)
    dispatch = "diffusers.models.transformers.transformer_flux"
    trained: Callable[..., Any] = staticmethod(trained_flux)

    def arguments(self, count: int, frames: int, guidance: float) -> dict[str, Any]:
        """Return guidance against the empty prompt, and the text length that was trained."""
        length = catalog.KNOWN[self.name].defaults["max_sequence_length"]
        empty = {"negative_prompt": [""] * count, "true_cfg_scale": guidance}
        return empty | {"max_sequence_length": length, "output_type": "np"}

    def videos(self, output: Any) -> Iterator[np.ndarray]:
        """Yield the pictures."""
        for picture in output.images:
            yield picture[None]

    @torch.no_grad()
    def reconstruct(self, pipe: Any, scene: world.Scene) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a drawn picture and its reconstruction."""
        x = to_tensor(painter.draw(scene, self.frames)[None])
        return x, pipe.vae.decode(pipe.vae.encode(x[:, :, 0]).latent_dist.mode()).sample[:, :, None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is meant; `chosen` reads them."""
    parser.add_argument("--image", action="store_true", help="the image model instead of the video model")
    parser.add_argument("--model", type=Path, help="packed model; without it the checkpoints in --runs")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--threads", type=int, default=1)


def chosen(args: argparse.Namespace) -> tuple[Subject, Any, str]:
    """Return the kind of model requested, its pipeline and its name, and set the threads."""
    torch.set_num_threads(args.threads)
    subject = Image() if args.image else Video()
    return subject, *subject.load(args.model, args.runs)
