"""Small trainings for the tests: folders of videos, a tiny model in a folder, what one of several processes runs."""

import os
import signal
import traceback
from pathlib import Path
from typing import Any

import parallel_ranks
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from dit_accel_assets.clips import clip_of
from dit_accel_pipelines.finetuning.recipe import FineTuning
from dit_accel_pipelines.finetuning.run import finetune
from dit_accel_pipelines.finetuning.trainer import Trainer
from dit_accel_pipelines.generation.lora import FILE
from dit_accel_pipelines.generation.media import upscale, write_media
from safetensors.torch import load_file
from wan_tiny import tiny_transformer

from dit_accel import ConfigError, ProcessLost, RadialAttention

RADIAL = RadialAttention(block_size=16, decay_factor=0.2, near="half", sink=False, dense_layers=1, dense_steps=0)


def video_folder(folder: Path, count: int = 3, frames: int = 9, size: int = 32) -> Path:
    """A folder of lossy videos, each with its caption; beyond 64 pixels every pixel is repeated."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        caption, _, pictures = clip_of(number, frames=frames)
        write_media(folder / f"{number}.mp4", upscale(pictures, -(-size // 64))[:, :size, :size], fps=8)
        (folder / f"{number}.txt").write_text(caption + "\n")
    return folder


def model_folder(folder: Path, seed: int = 0, **config: Any) -> Path:
    """The embedded pipeline around a tiny random transformer of two heads, saved."""
    pipe = WanPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.float32)
    pipe.transformer = tiny_transformer(seed, text_dim=pipe.text_encoder.config.d_model, **config)
    pipe.save_pretrained(folder)
    return folder


def recipe(tmp_path: Path, **changes: Any) -> FineTuning:
    """Two steps on three videos of 9 frames of 32 x 32: 5 x 4 x 4 tokens."""
    values: dict[str, Any] = {
        "data": tmp_path / "videos", "output": tmp_path / "out", "model": str(tmp_path / "model"), "height": 32,
        "width": 32, "num_frames": 9, "rank": 2, "steps": 2, "learning_rate": 1e-2, "methods": (RADIAL,),
        "device": "cpu", "cache": tmp_path / "cache",
    }  # fmt: skip
    return FineTuning(**{**values, **changes})


def base_folder(folder: Path) -> Path:
    """A folder with the model and the videos of `recipe`."""
    model_folder(folder / "model")
    video_folder(folder / "videos")
    return folder


def trained(base: Path, output: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The LoRA that a training leaves in a folder."""
    finetune(recipe(base, output=output, **changes))
    return weights(output)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The LoRA in a folder."""
    return load_file(folder / FILE)


def processes(count: int, folder: Path, **changes: Any) -> list[str]:
    """Train in several processes, as a launcher starts them.

    Returns:
        What each was refused with, or broke on; empty where it was not, "killed" where it told nothing.
    """
    found = parallel_ranks.processes(count, train_in_process, folder, changes, seconds=0)
    return [found.get(rank, "killed") for rank in range(count)]


def train_in_process(rank: int, world: int, folder: Path, changes: dict[str, Any]) -> str:
    """Train in one of the processes that a launcher started."""
    if changes.pop("lose", None) == rank:
        first = Trainer._add_up_gradients
        Trainer._add_up_gradients = lambda self: os.kill(os.getpid(), signal.SIGKILL) if self.step else first(self)
    try:
        finetune(recipe(folder, **changes))
        return ""
    except (ConfigError, ProcessLost) as error:
        return f"refused: {error}"
    except Exception:
        return traceback.format_exc()
