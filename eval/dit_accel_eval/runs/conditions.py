"""What runs are made with: the prompt and seed of each clip, and the machine."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from dit_accel_pipelines.generation.loading import pick_device
from dit_accel_pipelines.generation.request import OFFLOADS, Dtype

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

CARD = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "driver_version")  # by nvidia-smi's names


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnClips:
    """Prompts with their seeds: clips are every prompt with every seed, a prompt's clips one after another."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = ()  # empty: each prompt has one of its own, its place in the list

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("prompts is an empty list; name one or more")
        for prompt in self.prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ConfigError(f"prompts has {prompt!r}, which is no text; write each in quotes")
            if self.prompts.count(prompt) > 1:
                raise ConfigError(f"prompts has {prompt!r} twice; leave one out, or give it several seeds")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                raise ConfigError(f"seeds has {seed!r}; give whole numbers from 0 to 2**63 - 1")
            if self.seeds.count(seed) > 1:
                raise ConfigError(f"seeds has {seed} twice; leave one out")

    def __len__(self) -> int:
        return len(self.prompts) * max(1, len(self.seeds))

    def prompt(self, clip: int) -> str:
        """Return the prompt of a clip, by its number."""
        return self.prompts[clip // max(1, len(self.seeds))]

    def seed(self, clip: int) -> int:
        """Return the seed of a clip, by its number."""
        return self.seeds[clip % len(self.seeds)] if self.seeds else clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a model that is not embedded runs."""

    device: str | None = None
    offload: str = "none"

    def __post_init__(self) -> None:
        if self.offload not in OFFLOADS:
            raise ConfigError(f"there is no offload {self.offload!r}; {did_you_mean(self.offload, OFFLOADS)}")

    def dtype(self, requested: Dtype | None) -> Dtype:
        """Return the number format of the weights: what was requested, else float32 on a CPU and bfloat16 elsewhere."""
        return requested or ("float32" if pick_device(self.device).type == "cpu" else "bfloat16")


def processor_name() -> str:
    """Return the processor's name and how many cores the system shows, as far as it tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def device_name(device: torch.device) -> str:
    """Return what a device is called: of a CPU the processor."""
    if device.type == "cpu":
        return processor_name()
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(name(device)) if name else str(device)


def card_state(device: torch.device) -> dict[str, str]:
    """Return what nvidia-smi tells of a device by the names of `CARD`, in its own units; {} where it tells nothing."""
    command = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if command is None:
        return {}
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = [command, "-i", card, f"--query-gpu={','.join(CARD)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    values = done.stdout.strip().split(", ")
    return dict(zip(CARD, values, strict=True)) if not done.returncode and len(values) == len(CARD) else {}
