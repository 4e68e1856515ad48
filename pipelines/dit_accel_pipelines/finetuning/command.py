"""The command `finetune` of the command line."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dit_accel.cli import MethodList
from dit_accel.cli.console import TALK, print_json
from dit_accel.cli.stopping import STOP

from ..generation.options import Json, Quiet, fields_of, option, require_one_document, with_option_fields
from .options import KEEPING, TrainingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    """What `finetune` is given; most are the recipe's own fields."""

    output: Annotated[Path, option("Folder of the LoRA and all else.", "--output", "-o", metavar="FOLDER")] = Path(
        "lora"
    )
    sample_prompt: Annotated[list[str] | None, option("May be repeated; default: first captions.", panel=KEEPING)] = (
        None
    )
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

    \b
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
    STOP.files = f"checkpoints stand in {recipe.output}, and the same command with --resume goes on from the last"
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
