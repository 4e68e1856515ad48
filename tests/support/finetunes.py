"""Small trainings for the tests: folders of videos, a tiny model in a folder, what one of several processes runs."""

import multiprocessing
import os
import signal
import socket
import time
import traceback
from pathlib import Path
from typing import Any

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

PRELOADED = [
    "dit_accel_pipelines.finetuning.trainer", "dit_accel_pipelines.finetuning.run", "dit_accel_assets.clips",
    "diffusers.pipelines.wan.pipeline_wan", "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video",
    "diffusers.training_utils", "accelerate", "peft", "torch.distributed.device_mesh",
]  # fmt: skip
"""What one process imports for all that are started, which are its copies."""


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
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port = asked.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as manager:
        told = manager.dict()
        started: list[Any] = [
            context.Process(target=train_in_process, args=(rank, count, port, folder, changes, told))
            for rank in range(count)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + 280
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
        alive = [rank for rank, process in enumerate(started) if process.is_alive()]
        for rank in alive:
            started[rank].kill()
        assert not alive, f"ranks {alive} hang"
        return [told.get(rank, "killed") for rank in range(count)]


def train_in_process(rank: int, count: int, port: int, folder: Path, changes: dict[str, Any], told: Any) -> None:
    """Train in one of the processes that a launcher started."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    if changes.pop("lose", None) == rank:
        first = Trainer._add_up_gradients
        Trainer._add_up_gradients = lambda self: os.kill(os.getpid(), signal.SIGKILL) if self.step else first(self)
    try:
        finetune(recipe(folder, **changes))
        told[rank] = ""
    except (ConfigError, ProcessLost) as error:
        told[rank] = f"refused: {error}"
    except Exception:
        told[rank] = traceback.format_exc()
