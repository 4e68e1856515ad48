"""Checkpoints: all that a training goes on from, and what tells whether it is the same training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.errors import ConfigError
from dit_accel.files import written_whole

from ..generation.lora import FILE
from .recipe import FineTuning

FOLDER = "checkpoints"

WORDS = {"base": "the base model's weights", "clips": "the clips and captions", "methods": "the methods"}
"""What a key of an identity is called in an error, where that is not its own name."""

SHORT = 60
"""The most characters of a value that an error shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A training after some steps."""

    step: int  # optimizer steps done
    identity: Mapping[str, Any]  # what the training is; one of another does not go on from here
    weights: Mapping[str, torch.Tensor]  # name -> LoRA matrix
    averages: Mapping[str, Any] | None  # state of the averaged weights
    optimizer: Mapping[str, Any]  # its state


def identity_of(recipe: FineTuning, base: str, clips: str, processes: int) -> dict[str, Any]:
    """Return a training's identity: everything that its weights depend on but the number of steps.

    How many processes share a step's clips is no part of it, nor where they run, nor what is kept for the backward.
    """
    names = (
        "num_frames", "height", "width", "rank", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm",
        "ema_decay", "caption_dropout", "flow_shift", "seed", "dtype",
    )  # fmt: skip
    return {
        "base": base,
        "clips": clips,
        **{name: getattr(recipe, name) for name in names},
        "alpha": recipe.scale,
        "expert": recipe.expert,
        "methods": {method.name: method.to_dict() for method in recipe.methods},
        "clips a step": recipe.clips_a_step(processes),
    }


def check_folder(recipe: FineTuning) -> None:
    """Raise `ConfigError` for an output that another training was written to, or that holds none to go on from."""
    output = recipe.output
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file; name a folder")
    checkpoint = latest_checkpoint(output)
    if recipe.resume and checkpoint is None:
        raise ConfigError(f"--resume was requested, but {output} holds no checkpoint; leave it out to begin")
    if not recipe.resume and checkpoint is not None:
        raise ConfigError(
            f"output {output} holds checkpoints of an earlier training; go on with --resume, or choose another folder"
        )
    if not recipe.resume and (output / FILE).exists():
        raise ConfigError(f"output {output} holds {FILE} of an earlier training; choose another folder")


def latest_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint of the most steps in an output folder, or None."""
    checkpoints = sorted((output / FOLDER).glob("step-*.pt"))
    return checkpoints[-1] if checkpoints else None


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint to go on from."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = Checkpoint(**saved)
    except Exception as error:  # whatever pickle, zip files and another release's fields raise
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the checkpoint {path} can't be read ({reason}); delete it to go on from the one before"
        ) from None
    differs = [
        f"{WORDS.get(name, name)}: {_shown(checkpoint.identity.get(name))} there, {_shown(value)} requested"
        for name, value in identity.items()
        if checkpoint.identity.get(name) != value
    ]
    if differs:
        raise ConfigError(
            f"the checkpoint {path} is of another training ({'; '.join(differs)}); train as it was, or into another "
            "folder"
        )
    return checkpoint


def write_checkpoint(checkpoint: Checkpoint, output: Path, keep: int) -> None:
    """Write a checkpoint, whole or not at all, and delete those before the latest ``keep``."""
    folder = output / FOLDER
    folder.mkdir(exist_ok=True)
    values = {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}
    with written_whole(folder / f"step-{checkpoint.step:08d}.pt") as temporary:
        torch.save(values, temporary)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()


def _shown(value: Any) -> str:
    """Return a value as an error shows it; of a hash the beginning."""
    text = str(value)
    if len(text) == 64 and isinstance(value, str):
        return text[:12]
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."
