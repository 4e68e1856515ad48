"""The options of a training, each declared once, with its flag, help and range; this file loads no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.run_options import Pixels

from ..generation.options import RUN, Backend, Device, Model, option
from ..generation.ranges import ABOVE_ZERO, SHARE, at_least, between

TRAINING, KEEPING = "Training", "Keeping"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """All options that `finetune` and its `FineTuning` share."""

    data: Annotated[
        Path | None,
        typer.Argument(help="Folder of videos, each with a .txt of its caption, or metadata.jsonl.", metavar="FOLDER"),
    ] = None
    drawn: Annotated[
        int | None, option("Train on so many drawn clips of the embedded model's world."), between(1, 1_000_000)
    ] = None
    model: Model = None
    expert: Annotated[str | None, option("Of two transformers the one to train, by its noise levels: high or low.")] = (
        None
    )
    height: Pixels = None
    width: Pixels = None
    num_frames: Annotated[int | None, option("Frames of every clip; default: the model's.")] = None
    rank: Annotated[int, option("Of the LoRA.", panel=TRAINING), between(1, 10_000)] = 32
    alpha: Annotated[float | None, option("Scales it by alpha / rank; default: by 1.", panel=TRAINING), ABOVE_ZERO] = (
        None
    )
    steps: Annotated[int, option("Optimizer steps in all.", panel=TRAINING), at_least(1)] = 1000
    learning_rate: Annotated[float, option("Of AdamW.", panel=TRAINING), ABOVE_ZERO] = 1e-4
    warmup_steps: Annotated[int, option("Over which it rises.", panel=TRAINING), at_least(0)] = 0
    weight_decay: Annotated[float, option("Of AdamW.", panel=TRAINING), at_least(0)] = 0.0
    max_grad_norm: Annotated[float, option("Cuts longer gradients.", panel=TRAINING), ABOVE_ZERO] = 1.0
    batch_size: Annotated[int, option("Clips of a forward.", panel=TRAINING), between(1, 10_000)] = 1
    accumulate: Annotated[int, option("Forwards of a step.", panel=TRAINING), between(1, 100_000)] = 1
    ema_decay: Annotated[float, option("Of the averaged weights; 0: none.", panel=TRAINING), SHARE] = 0.99
    caption_dropout: Annotated[float, option("Share of clips without caption.", panel=TRAINING), SHARE] = 0.1
    flow_shift: Annotated[
        float | None, option("Of noise levels; default: the scheduler's.", panel=TRAINING), ABOVE_ZERO
    ] = None
    seed: Annotated[int, option("Of weights, order and noise.", panel=TRAINING), at_least(0)] = 0
    gradient_checkpointing: Annotated[
        bool, option("Less memory, more time.", "--gradient-checkpointing", panel=TRAINING)
    ] = False
    checkpoint_every: Annotated[int, option("Steps.", panel=KEEPING), at_least(1)] = 500
    keep_checkpoints: Annotated[int, option("How many.", panel=KEEPING), at_least(1)] = 2
    resume: Annotated[bool, option("Go on from the latest checkpoint.", "--resume", panel=KEEPING)] = False
    sample_every: Annotated[int, option("Steps; 0: no samples.", panel=KEEPING), at_least(0)] = 0
    sample_steps: Annotated[int | None, option("Denoising steps.", panel=KEEPING), between(1, 10_000)] = None
    report_to: Annotated[str | None, option("A tracker of accelerate, such as tensorboard.", panel=KEEPING)] = None
    cache: Annotated[Path | None, option("Of encoded clips; default: in the output.", panel=KEEPING)] = None
    ulysses: Annotated[int, option("Processes of a group that shares clips.", panel=RUN), at_least(1)] = 1
    dtype: Annotated[str | None, option("Of the frozen weights: float32 or bfloat16.", panel=RUN)] = None
    device: Device = None
    backend: Backend = "auto"
