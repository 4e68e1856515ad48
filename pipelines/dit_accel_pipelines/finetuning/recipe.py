"""What `finetune` takes, and every check that can be made before weights are loaded."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel_kernels import BACKENDS

from dit_accel.adapters import Adapter, Family
from dit_accel.adapters.embedded import assets
from dit_accel.adapters.model_files import ModelFiles, read_model_files
from dit_accel.adapters.rotary import check_lengths
from dit_accel.errors import ConfigError, did_you_mean
from dit_accel.estimate.sizes import check_multiple, pixel_multiples, rounded_frames, token_layout
from dit_accel.methods.base import Place
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.registry import handler_of

from ..generation.memory import check_fits
from ..generation.ranges import check_choices, check_ranges
from ..generation.request import EMBEDDED, NamesModel
from ..processes.parallel import check_processes
from .experts import EXPERTS, check_expert
from .options import TrainingOptions

TRAINED_PLACES = frozenset({Place.ATTENTION, Place.POSITIONS})
"""Where a method may act while a model is trained: others skip forwards or run further ones."""

SIZES = ("height", "width", "num_frames")

CHOICES: Mapping[str, Collection[str]] = {"dtype": ("float32", "bfloat16"), "backend": BACKENDS, "expert": EXPERTS}
"""Option -> the names that it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning(TrainingOptions, NamesModel):
    """What to train; what is None takes the model's default."""

    output: Path  # folder of the LoRA file, the checkpoints, the log and the samples
    methods: tuple[MethodConfig, ...] = ()  # methods on attention or positions, attached while it trains
    sample_prompts: tuple[str, ...] = ()  # what to show in samples; none: the first captions

    def __post_init__(self) -> None:
        if (self.data is None) == (self.drawn is None):
            got = "neither" if self.data is None else "both"
            raise ConfigError(f"finetune takes a folder of videos or a number of drawn clips, got {got}; give one")
        check_ranges(self)
        check_choices(self, CHOICES, " to train with")
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
        """Count the clips of one step on so many processes."""
        return self.batch_size * self.accumulate * (processes // self.ulysses)


def resolve_recipe(recipe: FineTuning, processes: int) -> FineTuning:
    """Check a recipe against its model's configs, and fill in the model's sizes."""
    files = read_model_files(recipe.source)
    adapter, family = files.identify()
    defaults: dict[str, Any] = assets().model_defaults(recipe.embedded) if recipe.embedded else {}
    fills = {name: defaults.get(name, getattr(family, name)) for name in SIZES if getattr(recipe, name) is None}
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
    """Refuse a tracker that accelerate does not know, or whose package is not installed, which it would pass over."""
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
    check_processes(processes, recipe.ulysses)
    if recipe.ulysses > 1 and adapter.split_text is None:
        raise ConfigError(
            f"ulysses = {recipe.ulysses} processes are to share each clip, and the adapter {adapter.name!r} does not "
            "say how the model's tokens are split between them; leave it out: processes have clips of their own then"
        )


def _check_place(method: MethodConfig) -> None:
    places = handler_of(method).places - TRAINED_PLACES
    if places:
        where = " and ".join(sorted(place.value for place in places))
        raise ConfigError(
            f"{method.name} acts on {where}, which says nothing to a model in training; train with methods on "
            "attention and positions, and attach it afterwards"
        )
