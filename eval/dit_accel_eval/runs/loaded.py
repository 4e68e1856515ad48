"""Models as the suites run them, embedded ones and diffusers pipelines, with their clips' prompts and the machine."""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dit_accel_pipelines.generation.loading import load_pipeline, open_pipeline, pick_device
from dit_accel_pipelines.generation.pipeline_call import CallSignature, pipeline_class
from dit_accel_pipelines.generation.quiet import quiet_diffusers
from dit_accel_pipelines.generation.request import OFFLOADS, Dtype, Request, check_words
from dit_accel_pipelines.generation.solvers import is_flow, is_of_betas

from dit_accel import ConfigError
from dit_accel.adapters.adapter import Family
from dit_accel.adapters.embedded import assets
from dit_accel.adapters.model_files import ModelFiles, model_source, read_model_files
from dit_accel.errors import UnsupportedModel, did_you_mean

from .model import SuiteModel, shipped_scheduler

FIRST_PROMPT = 64  # number of the first held-out prompt that tuning may look at; the suites evaluate those below it
SIZES = ("height", "width", "num_frames")
GIVEN = ("self", "prompt", "num_inference_steps", "generator", "output_type")  # which a suite sets
_SHA256 = re.compile(r"[0-9a-f]{64}")
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


class EmbeddedModel(SuiteModel):
    """A loaded embedded model that shows held-out prompts, the number of each its seed, or one's ``own``."""

    def __init__(self, name: str, call: Mapping[str, Any], own: OwnClips | None = None) -> None:
        for text in own.prompts if own else ():
            check_words(text, name)
        source = str(assets().model_path(name))
        adapter, family = read_model_files(source).identify()
        super().__init__(
            open_pipeline(source, dtype="float32"), name=name, weights=embedded_weights(name), adapter=adapter,
            family=family, call=embedded_call(name, call), seed=own.seed if own else int,
            prompt=own.prompt if own else lambda clip: assets().held_out_prompts(name, clip + 1)[clip],
        )  # fmt: skip


@functools.cache
def embedded_weights(name: str) -> str:
    """Return 12 hexadecimal digits that tell a model's weights from others', by all its safetensors files."""
    folder, digest = assets().model_path(name), hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def settled_call(name: str, files: ModelFiles, usual: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's call: the usual ones that its pipeline takes, changed by what is given."""
    known = [key for key in CallSignature.of(pipeline_class(files)).parameters if key not in GIVEN]
    for key in changes:
        if key not in known:
            raise ConfigError(f"a suite's call of {name} takes no {key!r}; {did_you_mean(key, known)}")
    return {**{key: value for key, value in usual.items() if key in known and value is not None}, **changes}


def embedded_call(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an embedded model's call: its defaults, changed by what is given."""
    return settled_call(name, read_model_files(str(assets().model_path(name))), assets().model_defaults(name), changes)


def embedded_prompts(name: str, count: int = 2) -> tuple[str, ...]:
    """Return prompts that an embedded model knows, none of those that the suites evaluate."""
    return tuple(assets().held_out_prompts(name, FIRST_PROMPT + count)[FIRST_PROMPT:])


class GivenModel(SuiteModel):
    """A loaded pipeline of a folder or the hub."""

    def __init__(
        self, name: str, source: str, call: Mapping[str, Any], own: OwnClips, dtype: Dtype, machine: Machine
    ) -> None:
        files = read_model_files(source)
        settled = model_call(files, call)
        adapter, family = files.identify()
        folder = local_folder(source)
        request = tuning_request(
            prompts=own.prompts, model=str(folder), dtype=dtype, device=machine.device, offload=machine.offload
        )
        pipe = load_pipeline(request)
        self.dtype, self.device = dtype, pick_device(machine.device)
        about: dict[str, Any] = {
            "weights": given_weights(source),
            "call": settled,
            "adapter": adapter,
            "family": family,
        }
        super().__init__(pipe, name=name, prompt=own.prompt, seed=own.seed, **about)
        if self.device.type != "cpu":  # else a step would end before its work has
            for part in self.transformers:
                part.register_forward_hook(lambda *_: torch.accelerator.synchronize())


def check_given(source: str) -> tuple[ModelFiles, Family]:
    """Refuse a model that suites can't run, by its configs alone; returns them and its sizes."""
    model_source(source)  # refuses what names no model
    files = read_model_files(source)
    pipeline_class(files)
    _, family = files.identify()
    shipped = shipped_scheduler(source)
    if not is_flow(shipped.config) and not is_of_betas(shipped.config):
        lacks = "neither a noise shift nor betas, and so none of the converged runs that arms are held against"
        raise UnsupportedModel(f"{source} ships with {type(shipped).__name__}, which has {lacks}")
    return files, family


def model_call(files: ModelFiles, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of another model's call: its family's sizes, changed by what is given, and checked."""
    _, family = files.identify()
    settled = settled_call(files.name, files, {name: getattr(family, name) for name in SIZES}, changes)
    CallSignature.of(pipeline_class(files)).check({"prompt": "", **settled})
    return settled


@functools.cache
def local_folder(source: str) -> Path:
    """Return the folder of a model's files; a hub id's are fetched by diffusers, and found again."""
    if Path(source).is_dir():
        return Path(source)
    from diffusers import DiffusionPipeline

    try:
        with quiet_diffusers():
            return Path(DiffusionPipeline.download(source, use_safetensors=True))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(f"the weights of {source!r} can't be fetched: {reason}") from None


@functools.cache
def given_weights(source: str) -> str:
    """Return 12 hexadecimal digits that tell a model's weights and configs from others'."""
    folder, digest = local_folder(source), hashlib.sha256()
    for path in sorted(file for kind in ("*.safetensors", "*.bin", "*.json") for file in folder.rglob(kind)):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
    return digest.hexdigest()[:12]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, which the hub's cache has as the name of what a link leads to."""
    real = path.resolve()
    if path.is_symlink() and real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    with real.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRequest(Request):
    """A generation request that writes nothing, for several prompts, of which its own is the first."""

    prompts: tuple[str, ...]


def tuning_request(prompts: Sequence[str], **options: Any) -> TuningRequest:
    """Return a request for these prompts; the other options are `Request`'s."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ConfigError("a prompt is needed, got none; say what to show, or leave the option out")
    output = Path(tempfile.gettempdir()) / "unused.png"
    return TuningRequest(prompt=prompts[0], prompts=tuple(prompts), output=output, **options)
