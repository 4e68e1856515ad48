"""Fine-tunes a video model by LoRA through the attached methods, in one process or in several alike."""

import dataclasses
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dit_accel.adapters.model_files import read_model_files
from dit_accel.attachment.parallel import context_parallel, tells_of_loss
from dit_accel.errors import ConfigError, DitAccelError, ProcessLost
from dit_accel.files import held, new_folder, write_json

from ..generation.generate import attached
from ..generation.loading import open_pipeline, pick_device
from ..generation.lora import FILE, require_peft
from ..generation.progress import Stages
from ..generation.threads import one_thread
from ..processes.parallel import enable_ulysses
from ..processes.processes import started_process
from ..processes.ranks import Ranks
from .checkpoint import check_folder, identity_of, latest_checkpoint, read_checkpoint, write_checkpoint
from .clips import Clip, find_clips
from .encoded import Encoded, encode_clips, module_hash
from .experts import component_of
from .lora import add_lora, write_lora
from .models import trainable_of
from .recipe import FineTuning, resolve_recipe
from .samples import FIRST, Sampler
from .trainable import Trainable, text_parts
from .trainer import Trainer

RECORD = "finetune.json"
LIBRARIES = ("dit-accel", "torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What `finetune` wrote."""

    lora: Path  # the LoRA's file
    record: dict[str, Any]  # what was trained, on what and how long; the content of `RECORD`


def finetune(recipe: FineTuning, *, stages: Stages | None = None, command: Sequence[str] = ()) -> Trained:
    """Train a LoRA as a recipe asks, and write it with the averaged weights, as diffusers loads it.

    Started by accelerate launch or torchrun, every process calls this alike: each trains on clips of its own, or, with
    ``ulysses``, each group of so many, on a part of their tokens each. What is wrong is raised in all of them.

    Raises:
        DitAccelError: for a recipe that can't be met, clips that don't fit it, or a checkpoint of another training.
        Busy: if another run trains into the same folder.
        ProcessLost: if another process is gone; checkpoints stay.
    """
    stages, process = stages or Stages(quiet=True), started_process()
    require_peft()
    device = pick_device(process.device(recipe.device))
    ranks = Ranks(cpu=device.type == "cpu")
    try:
        with ExitStack() as folder:
            recipe, clips, notes = ranks.shared(lambda: _prepared(recipe, ranks.count, folder))
            for text in notes:
                stages.note(text)
            with one_thread(embedded=recipe.embedded is not None):
                return _trained(recipe, clips, device, ranks, stages, command)
    except RuntimeError as error:
        if isinstance(error, DitAccelError) or ranks.count == 1 or not tells_of_loss(error):
            raise
        raise ProcessLost(
            f"another of the {ranks.count} processes that train together ended or no longer answers "
            f"({str(error).strip().splitlines()[0]}); look for the first error among their outputs, and start all "
            "again with --resume"
        ) from error
    finally:
        ranks.close()


def _prepared(recipe: FineTuning, processes: int, folder: ExitStack) -> tuple[FineTuning, list[Clip], list[str]]:
    """Return the resolved recipe, its clips and notes, after every check that needs no weights.

    The output, made if need be, is held until ``folder`` is closed; a training that fails before it wrote leaves none.
    """
    trainable_of(read_model_files(recipe.source))
    recipe = resolve_recipe(recipe, processes)
    check_folder(recipe)
    clips, notes = find_clips(recipe)
    folder.enter_context(new_folder(recipe.output))
    folder.enter_context(held(recipe.output, "the training's folder"))
    return recipe, clips, notes


def _trained(
    recipe: FineTuning, clips: list[Clip], device: Any, ranks: Ranks, stages: Stages, command: Sequence[str]
) -> Trained:
    trainable = trainable_of(read_model_files(recipe.source))
    stages.stage("loading")
    pipe = open_pipeline(recipe.source, dtype=recipe.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    recipe = dataclasses.replace(recipe, dtype=str(pipe.transformer.dtype).removeprefix("torch."))
    with attached(pipe, recipe.methods, "auto"):
        pass  # refuses methods that don't fit, before anything is encoded
    transformer = getattr(pipe, component_of(recipe.expert))
    base = module_hash(transformer)
    encoded, sampler = _encoded(pipe, trainable, clips, recipe, device, ranks, stages)
    identity = identity_of(recipe, base, encoded.digest, ranks.count)
    path = latest_checkpoint(recipe.output) if recipe.resume else None
    checkpoint = ranks.together(lambda: None if path is None else read_checkpoint(path, identity))
    transformer.to(device)
    weights = ranks.together(lambda: add_lora(transformer, trainable, recipe))
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if recipe.ulysses > 1:
        ranks.together(lambda: _spread(transformer, recipe.ulysses))
    with _accelerator(recipe, device) as accelerator, attached(pipe, recipe.methods, recipe.backend) as attachment:
        trainer = Trainer(pipe, transformer, weights, encoded, trainable, recipe, ranks, accelerator)
        if checkpoint is not None:
            trainer.go_on_from(checkpoint)
            if checkpoint.step >= recipe.steps:
                stages.note(f"the checkpoint has {checkpoint.step} steps done already; no further one is trained")
        if ranks.first:
            trainer.cut_log()
        for step in trainer.train(attachment, stages):
            last = step == recipe.steps
            if ranks.first and (last or step % recipe.checkpoint_every == 0):
                write_checkpoint(trainer.checkpoint(identity), recipe.output, recipe.keep_checkpoints)
            if sampler is not None and (last or step % recipe.sample_every == 0):
                _sample(trainer, sampler, recipe, ranks, stages)
        record = _record(trainer, identity, ranks, device, command)
        if ranks.first:
            with trainer.averaged():
                write_lora(pipe, component_of(recipe.expert), recipe.output)
            write_json(recipe.output / RECORD, record)
        ranks.wait()
    return Trained(lora=recipe.output / FILE, record=record)


def _encoded(
    pipe: Any, trainable: Trainable, clips: list[Clip], recipe: FineTuning, device: Any, ranks: Ranks, stages: Stages
) -> tuple[Encoded, Sampler | None]:
    """Encode the clips, and make what samples, if requested; leave the pipeline no more than training needs."""
    encoders = {name: part for name, part in text_parts(pipe).items() if isinstance(part, nn.Module)}
    for part in (pipe.vae, *encoders.values()):
        part.to(device)
    encoded = encode_clips(pipe, trainable, clips, recipe, ranks, stages)
    sampler = None
    if recipe.sample_every:
        prompts = recipe.sample_prompts or [clip.caption for clip in clips[:FIRST]]
        sampler = Sampler(pipe, trainable, prompts, recipe)
    for name in encoders:
        setattr(pipe, name, None)
    if sampler is None:
        pipe.vae.to("cpu")
    elif recipe.expert is not None:  # samples take both
        pipe.transformer.to(device)
        pipe.transformer_2.to(device)
    return encoded, sampler


def _spread(transformer: Any, degree: int) -> None:
    try:
        enable_ulysses(transformer, degree)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, DitAccelError):
            raise
        raise ConfigError(f"ulysses = {degree} can't be had: {error}; train without it") from None
    assert context_parallel(transformer) is not None


@contextmanager
def _accelerator(recipe: FineTuning, device: Any) -> Iterator[Any]:
    """Give accelerate's accelerator, with the tracker that was requested."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu", log_with=recipe.report_to, project_dir=str(recipe.output))
    if recipe.report_to is not None:
        fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
        plain = {name: value for name, value in fields.items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("dit-accel-finetune", config=plain)
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def _sample(trainer: Trainer, sampler: Sampler, recipe: FineTuning, ranks: Ranks, stages: Stages) -> None:
    """Write a sheet of samples, which the first group of processes makes together."""
    if ranks.rank < recipe.ulysses:
        with trainer.averaged():
            sampler.write(trainer.step, stages, first=ranks.first)
    ranks.wait()
    stages.stage("training", recipe.steps, trainer.step)


def _record(
    trainer: Trainer, identity: dict[str, Any], ranks: Ranks, device: Any, command: Sequence[str]
) -> dict[str, Any]:
    """Write down what was trained, on what and how long."""
    recipe, seconds = trainer.recipe, trainer.seconds
    quantiles = np.quantile(seconds, (0.2, 0.5, 0.8)).tolist() if seconds else [None] * 3
    return {
        "model": recipe.source if recipe.embedded is None else recipe.embedded,
        **identity,
        "steps": trainer.step,
        "data": str(recipe.data) if recipe.data else f"{recipe.drawn} drawn clips",
        "clips_there": len(trainer.encoded),
        "processes": ranks.count,
        "ulysses": recipe.ulysses,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "trained_numbers": sum(weight.numel() for weight in trainer.parameters),
        "density": trainer.density,
        "seconds_a_step": dict(zip(("p20", "median", "p80"), quantiles, strict=True)),
        "device": str(device),
        "versions": {**{name: version(name) for name in LIBRARIES}, "python": platform.python_version()},
        "command": list(command),
    }
