"""The command `finetune` of the command line."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import MethodList
from dit_accel.cli.console import TALK, print_json
from dit_accel.cli.stopping import keeps

from ..generation.options import (
    RUN,
    Backend,
    Device,
    Json,
    Model,
    Pixels,
    Quiet,
    fields_of,
    require_one_document,
    with_option_fields,
)  # fmt: skip

TRAINING, KEEPING = "Training", "Keeping"


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneOptions:
    """What `finetune` is given; most are the recipe's own fields."""

    data: Annotated[
        Path | None,
        typer.Argument(help="Folder of videos, each with a .txt of its caption, or metadata.jsonl.", metavar="FOLDER"),
    ] = None
    drawn: Annotated[int | None, typer.Option(help="Train on so many drawn clips of the embedded model's world.")] = (
        None
    )
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the LoRA and all else.", metavar="FOLDER")
    ] = Path("lora")
    model: Model = None
    expert: Annotated[
        str | None, typer.Option(help="Of two transformers the one to train, by its noise levels: high or low.")
    ] = None
    height: Pixels = None
    width: Pixels = None
    num_frames: Annotated[int | None, typer.Option(help="Frames of every clip; default: the model's.")] = None
    rank: Annotated[int, typer.Option(help="Of the LoRA.", rich_help_panel=TRAINING)] = 32
    alpha: Annotated[
        float | None, typer.Option(help="Scales it by alpha / rank; default: by 1.", rich_help_panel=TRAINING)
    ] = None
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.", rich_help_panel=TRAINING)] = 1000
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=TRAINING)] = 1e-4
    warmup_steps: Annotated[int, typer.Option(help="Over which it rises.", rich_help_panel=TRAINING)] = 0
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=TRAINING)] = 0.0
    max_grad_norm: Annotated[float, typer.Option(help="Cuts longer gradients.", rich_help_panel=TRAINING)] = 1.0
    batch_size: Annotated[int, typer.Option(help="Clips of a forward.", rich_help_panel=TRAINING)] = 1
    accumulate: Annotated[int, typer.Option(help="Forwards of a step.", rich_help_panel=TRAINING)] = 1
    ema_decay: Annotated[float, typer.Option(help="Of the averaged weights; 0: none.", rich_help_panel=TRAINING)] = 0.99
    caption_dropout: Annotated[
        float, typer.Option(help="Share of clips without caption.", rich_help_panel=TRAINING)
    ] = 0.1
    flow_shift: Annotated[
        float | None, typer.Option(help="Of noise levels; default: the scheduler's.", rich_help_panel=TRAINING)
    ] = None
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.", rich_help_panel=TRAINING)] = 0
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=TRAINING)
    ] = False
    checkpoint_every: Annotated[int, typer.Option(help="Steps.", rich_help_panel=KEEPING)] = 500
    keep_checkpoints: Annotated[int, typer.Option(help="How many.", rich_help_panel=KEEPING)] = 2
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the latest checkpoint.", rich_help_panel=KEEPING)
    ] = False
    sample_every: Annotated[int, typer.Option(help="Steps; 0: no samples.", rich_help_panel=KEEPING)] = 0
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="May be repeated; default: first captions.", rich_help_panel=KEEPING)
    ] = None
    sample_steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=KEEPING)] = None
    report_to: Annotated[
        str | None, typer.Option(help="A tracker of accelerate, such as tensorboard.", rich_help_panel=KEEPING)
    ] = None
    cache: Annotated[
        Path | None, typer.Option(help="Of encoded clips; default: in the output.", rich_help_panel=KEEPING)
    ] = None
    ulysses: Annotated[int, typer.Option(help="Processes of a group that shares clips.", rich_help_panel=RUN)] = 1
    dtype: Annotated[
        str | None, typer.Option(help="Of the frozen weights: float32 or bfloat16.", rich_help_panel=RUN)
    ] = None
    device: Device = None
    backend: Backend = "auto"
    quiet: Quiet = False
    json: Json = False


@with_option_fields
def finetune_model(options: FinetuneOptions, *, methods: MethodList) -> None:
    """Train a LoRA on a model's self-attention, through the methods attached.

    Made for clips longer than a model was trained on, with --radial: sparse
    attention is exact in its backward, and the LoRA learns to live with it.
    Writes FOLDER/pytorch_lora_weights.safetensors, which generate --lora and
    diffusers load, finetune.json, log.jsonl, checkpoints and samples.

    Clips and captions are encoded once, and kept by hash. All videos must have
    the size requested, and as many frames or more.

    Started by accelerate launch or torchrun, processes share each step's
    clips; with --ulysses N, groups of N do, and each group shares its clips'
    tokens. A run that was stopped goes on with --resume, bit for bit.

    Examples:

    dit-accel finetune --drawn 64 --num-frames 65 --radial --steps 200 -o lora

    dit-accel finetune clips/ --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --num-frames 161 --radial

    accelerate launch -m dit_accel finetune clips/ --radial --batch-size 2
    """
    from ..generation.progress import Stages
    from ..processes.processes import started_process
    from .recipe import FineTuning
    from .run import finetune

    process = started_process()
    require_one_document(options.json, process.count)
    prompts = tuple(options.sample_prompt or ())
    recipe = FineTuning(**fields_of(FineTuning, options), methods=tuple(methods), sample_prompts=prompts)
    where = f"checkpoints that were written stand in {recipe.output}"
    keeps(f"{where}, and the same command with --resume goes on from the last")
    with Stages(quiet=options.quiet or process.rank > 0) as stages:
        trained = finetune(recipe, stages=stages, command=sys.argv)
    if process.rank > 0:
        return
    if options.json:
        print_json(trained.record)
        return
    print(trained.lora)
    if not options.quiet:
        seconds, density = trained.record["seconds_a_step"]["median"], trained.record["density"]
        if seconds is not None:
            TALK.print(f"{seconds:.2f} s a step, attention's density {density:.3f}", markup=False, soft_wrap=True)
