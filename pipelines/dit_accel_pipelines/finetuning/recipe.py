"""What `finetune` takes, and every check that can be made before weights are loaded."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel_kernels import BACKENDS

from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.embedded import assets
from dit_accel.adapters.model_files import ModelFiles, read_model_files
from dit_accel.adapters.rotary import check_lengths
from dit_accel.attachment.backends import Backend
from dit_accel.errors import ConfigError, did_you_mean
from dit_accel.estimate.sizes import check_multiple, pixel_multiples, rounded_frames, token_layout
from dit_accel.methods.base import Place
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.registry import handler_of

from ..generation.memory import check_fits
from ..generation.request import EMBEDDED, Dtype, NamesModel
from .experts import EXPERTS, Expert, check_expert

TRAINED_PLACES = frozenset({Place.ATTENTION, Place.POSITIONS})
"""Where a method may act while a model is trained: others skip forwards or run further ones."""

DTYPES = ("float32", "bfloat16")
SIZES = ("height", "width", "num_frames")

MOST = {"drawn": 1_000_000, "rank": 10_000, "batch_size": 10_000, "accumulate": 100_000, "sample_steps": 10_000}
"""Numbers beyond which each is a slip: nothing could be computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning(NamesModel):
    """What to train; what is None takes the model's default.

    Attributes:
        output: folder of the LoRA file, the checkpoints, the log and the samples.
        data: folder of videos with their captions; None: `drawn` says how many clips to draw.
        drawn: clips of the embedded model's own world, drawn by seed 0, 1 and so on.
        model: hub id, folder or an embedded model's name.
        expert: which of two transformers is trained, by its noise levels: ``high`` or ``low``; None: there is one.
        height: of every clip, in pixels.
        width: of every clip, in pixels.
        num_frames: frames taken of every clip, its first ones.
        methods: methods on attention or positions, attached while it trains.
        backend: kernel backend of the methods.
        rank: of the LoRA matrices.
        alpha: the LoRA's update is scaled by alpha / rank; None: by 1.
        learning_rate: of AdamW, reached after the warm-up and then held.
        warmup_steps: steps over which the rate rises from 0.
        weight_decay: of AdamW.
        max_grad_norm: to which longer gradients are cut.
        steps: optimizer steps in all.
        batch_size: clips of one forward in one process.
        accumulate: forwards of one step in one process.
        ema_decay: share of the averaged weights that stays at each step, smaller at first; 0: no averaging.
        caption_dropout: share of the clips that are trained without their caption, for guidance.
        flow_shift: shift of the noise levels towards noise; None: that of the model's scheduler.
        seed: of weights, order, noise and samples.
        gradient_checkpointing: compute the blocks again in the backward instead of keeping what is inside.
        dtype: number format of the frozen weights; the LoRA is float32 always.
        device: torch device; None: the accelerator if there is one.
        ulysses: processes of a group that shares each clip's tokens and heads; 1: none do.
        cache: folder of encoded clips and captions, by hash; None: ``cache`` in the output.
        checkpoint_every: steps from one checkpoint to the next; the last step has one always.
        keep_checkpoints: how many of the latest are kept.
        sample_every: steps from one sheet of samples to the next; 0: none.
        sample_prompts: what to show in them; none: the first captions.
        sample_steps: denoising steps of a sample.
        resume: go on from the latest checkpoint in the output.
        report_to: a tracker that accelerate knows, such as tensorboard.

    Raises:
        ConfigError: for a value out of range.
    """

    output: Path
    data: Path | None = None
    drawn: int | None = None
    model: str | None = None
    expert: Expert | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    methods: tuple[MethodConfig, ...] = ()
    backend: Backend = "auto"
    rank: int = 32
    alpha: float | None = None
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int = 1000
    batch_size: int = 1
    accumulate: int = 1
    ema_decay: float = 0.99
    caption_dropout: float = 0.1
    flow_shift: float | None = None
    seed: int = 0
    gradient_checkpointing: bool = False
    dtype: Dtype | None = None
    device: str | None = None
    ulysses: int = 1
    cache: Path | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int | None = None
    resume: bool = False
    report_to: str | None = None

    def __post_init__(self) -> None:
        if (self.data is None) == (self.drawn is None):
            got = "neither" if self.data is None else "both"
            raise ConfigError(f"finetune takes a folder of videos or a number of drawn clips, got {got}; give one")
        for name in ("drawn", "rank", "steps", "batch_size", "accumulate", "ulysses", "checkpoint_every"):
            _at_least(name, getattr(self, name), 1)
        for name, most in MOST.items():
            _at_most(name, getattr(self, name), most)
        for name in ("keep_checkpoints", "sample_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "sample_every", "seed"):
            _at_least(name, getattr(self, name), 0)
        for name in ("alpha", "learning_rate", "max_grad_norm", "flow_shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        for name in ("ema_decay", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a share from 0 to below 1, got {getattr(self, name)}")
        for name, known in (("dtype", DTYPES), ("backend", BACKENDS), ("expert", EXPERTS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"there is no {name} {value!r} to train with; {did_you_mean(value, known)}")
        for method in self.methods:
            _check_place(method)

    @property
    def scale(self) -> float:
        """Return the LoRA's alpha."""
        return float(self.rank if self.alpha is None else self.alpha)

    @property
    def cache_folder(self) -> Path:
        """Return the folder of what is encoded."""
        return self.cache or self.output / "cache"

    def clips_a_step(self, processes: int) -> int:
        """Return how many clips one step takes on so many processes."""
        return self.batch_size * self.accumulate * (processes // self.ulysses)


def settle(recipe: FineTuning, processes: int) -> FineTuning:
    """Check a recipe against its model's configs, and fill in the model's sizes.

    Args:
        recipe: what to train.
        processes: how many share it.

    Raises:
        ConfigError: for sizes that the model can't make, processes that can't share the clips, or a tracker that is not
            there.
        UnsupportedModel: if the model is not found.
    """
    files = read_model_files(recipe.source)
    adapter, family = files.identify()
    own: dict[str, Any] = assets().model_defaults(recipe.embedded) if recipe.embedded else {}
    fills = {name: own.get(name, getattr(family, name)) for name in SIZES if getattr(recipe, name) is None}
    if recipe.embedded and recipe.dtype is None:
        fills["dtype"] = "float32"
    recipe = dataclasses.replace(recipe, **fills)
    _check_sizes(recipe, files, adapter, family)
    check_expert(recipe.expert, files)
    _check_processes(recipe, adapter, processes)
    if recipe.report_to is not None:
        check_tracker(recipe.report_to)
    return recipe


def check_tracker(name: str) -> None:
    """Refuse a tracker that accelerate does not know, or whose package is not installed, which it would pass over.

    Raises:
        ConfigError: with those that are known, or what to install.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, there = map(str, LOGGER_TYPE_TO_CLASS), map(str, get_available_trackers())
    if name not in (listed := list(known)):
        raise ConfigError(f"accelerate knows no tracker {name!r}; {did_you_mean(name, listed)}")
    if name not in there:
        raise ConfigError(
            f"the tracker {name!r} is not installed; pip install {name}, or leave it out: the log is kept"
        )


def _check_sizes(recipe: FineTuning, files: ModelFiles, adapter: Adapter, family: Family) -> None:
    """Refuse clips of a size that the model can't make, or beyond its tables of positions."""
    assert recipe.height is not None
    assert recipe.width is not None
    assert recipe.num_frames is not None
    model = recipe.model or EMBEDDED
    for name, multiple in zip(("height", "width"), pixel_multiples(family), strict=True):
        check_multiple(name, getattr(recipe, name), multiple, model)
    frames = rounded_frames(family, recipe.num_frames)
    if frames != recipe.num_frames:
        raise ConfigError(
            f"num_frames must be a multiple of {family.vae[0]} and 1 more for {model}, such as {frames}, got "
            f"{recipe.num_frames}"
        )
    layout = token_layout(family, height=recipe.height, width=recipe.width, num_frames=frames)
    check_lengths(adapter.name, adapter.rope, files.transformer, layout.lengths)
    check_fits(height=recipe.height, width=recipe.width, num_frames=frames)


def _check_processes(recipe: FineTuning, adapter: Adapter, processes: int) -> None:
    """Refuse processes that can't share a clip: by their number, or since the model's tokens can't be split."""
    if processes % recipe.ulysses:
        raise ConfigError(
            f"ulysses = {recipe.ulysses} processes are to share each clip, and {processes} were started; start a "
            f"multiple of {recipe.ulysses}, such as torchrun --nproc-per-node {recipe.ulysses}"
        )
    if recipe.ulysses > 1 and adapter.split_text is None:
        raise ConfigError(
            f"ulysses = {recipe.ulysses} processes are to share each clip, and the adapter {adapter.name!r} does not "
            "say how the model's tokens are split between them; leave it out: processes have clips of their own then"
        )


def _check_place(method: MethodConfig) -> None:
    others = handler_of(method).places - TRAINED_PLACES
    if others:
        where = " and ".join(sorted(place.value for place in others))
        raise ConfigError(
            f"{method.name} acts on {where}, which says nothing to a model in training; train with methods on "
            "attention and positions, and attach it afterwards"
        )


def _at_most(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        raise ConfigError(f"{name} must be at most {most:,}, got {value:,}")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name} must be {least} or more, got {value}")
