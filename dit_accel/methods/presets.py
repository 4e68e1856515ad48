"""Presets: which methods `attach` takes where the user names none, with the figures that each choice rests on.

A level is a distance to the user's own dense run of the same seed, steps and solver. What it promises in a run of so
many steps is in `preset_figures`, as measured on the two embedded models; larger ones were not measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from ..errors import ConfigError, did_you_mean
from .attention.sol import SolAttention
from .attention.ultravico import UltraViCo
from .base import Model
from .caches.easy import EasyCache
from .caches.static import StaticCache
from .compose import make_handlers
from .config import MethodConfig
from .few_steps import FEW
from .positions.rope import RoPE
from .preset_figures import Promise, promise
from .registry import handler_of

Level = Literal["careful", "balanced", "fast", "few-steps"]
LEVELS: tuple[Level, ...] = get_args(Level)[:3]

NONE = "none"
"""The word for no preset."""
NAMES = (*get_args(Level), NONE)

MEASURED_ON = ("wan-tiny", "flux-tiny")
"""The families on which the levels were measured; to others the same rule applies unmeasured."""

LEAST_STEPS = 12
"""Steps of a run from which on the levels skip any: in shorter ones not all were nearer than fewer steps."""

REACH = 0.035
"""Share of the run that a line is followed: one step of 29 or more, two of 58; longer gaps are held."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One method of a preset."""

    config: MethodConfig  # the method
    models: Literal["all", "video", "image"]  # which models take it
    what: str  # what it does here, in a few words, for the line that a user reads
    source: str  # the figure that the choice rests on
    beyond: bool = False  # it acts on outputs beyond the trained size alone
    repeats: bool = False  # it repeats predictions, which goes amiss where a scheduler adds noise anew in each step
    level: Level | None = None  # the preset whose `preset_figures` are this method's; None: not measured

    def promise(self, steps: int, family: str | None = None) -> Promise | None:
        """Return its promise for a run of so many steps of a family; None: it skips nothing, or was not measured."""
        return promise(self.level, steps, family) if self.level else None


def _cache(level: Level, warmup: float, bound: float, last: int) -> Choice:
    """Return a step cache; runs of few steps, such as those of distilled models, are computed whole.

    The warm-up and the bound on steps in a row decide more of what is skipped than the threshold: a level saves about
    as much on one model as on another. Both are shares of the run, since a step of a short run is a long one: skipped
    next to each other, or continued along a line, such steps lead farther astray than they save.
    """
    config = EasyCache(
        threshold=0.2, warmup_steps=warmup, last_steps=last, max_consecutive=bound, growing=True,
        predictor="taylor", stored="output", reach=REACH, min_steps=LEAST_STEPS,
    )  # fmt: skip
    often = "every second step" if bound <= 0.03 else f"up to {bound:.0%} of the steps in a row"
    return Choice(
        config,
        "all",
        f"skips {often} after the first {warmup:.0%}, in runs of {LEAST_STEPS} steps or more",
        "measured: eval/studies/preset_levels.py",
        level=level,
    )


def _sparse(beta: float, **options: Any) -> Choice:
    return Choice(
        SolAttention(beta=beta, min_tokens=SolAttention.worthwhile_tokens, **options),
        "video",
        f"sparse attention from {SolAttention.worthwhile_tokens:,} visual tokens on",
        "published (arXiv 2607.24027), not measured by us on a model of that size",
    )


_LATER = Choice(
    StaticCache(every=2, warmup_steps=0.6, last_steps=0, min_steps=4, stored="output"),
    "all",
    "skips every second step of the later half, in runs of 4 steps or more",
    "measured: docs/presets.md, few steps",
    repeats=True,
)
_LONGER = Choice(
    RoPE(kind="riflex", axes=("frames",)),
    "video",
    "RIFLEx positions for more frames than trained",
    "measured: docs/longer.md, twice the trained length",
    beyond=True,
)
_LONGER_WAN = Choice(
    UltraViCo(),
    "video",
    "decays attention to far frames in more frames than trained",
    "published (arXiv 2511.20123) for models on which RIFLEx does not help, such as Wan",
    beyond=True,
)
_LARGER = Choice(
    RoPE(kind="yarn", axes=("height", "width")),
    "image",
    "YaRN positions for larger pictures than trained",
    "measured: docs/longer.md, three times the trained side; at twice its gain is open",
    beyond=True,
)

_BEYOND = (_LONGER, _LONGER_WAN, _LARGER)
"""Of those that extend the same axis the first is taken that is advised for the model's family."""

PRESETS: Mapping[str, tuple[Choice, ...]] = {
    "careful": (_cache("careful", 0.5, 0.03, 2), *_BEYOND),
    "balanced": (_cache("balanced", 0.35, 0.03, 1), _sparse(1.0), *_BEYOND),
    "fast": (_cache("fast", 0.25, 0.06, 1), _sparse(1.3), *_BEYOND),
    FEW: (_LATER, _sparse(1.0, dense_above_sigma=0.909), *_BEYOND),
}


@dataclass(frozen=True, slots=True)
class PresetMethods:
    """What a preset attaches to a model."""

    level: str  # the preset's name
    model: Model  # the model
    chosen: tuple[Choice, ...] = ()  # the methods that are attached
    # method -> why the model, or a method that the user names, does not allow it
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def configs(self) -> tuple[MethodConfig, ...]:
        """The configs of the chosen methods."""
        return tuple(choice.config for choice in self.chosen)

    def promises(self, steps: int | None) -> dict[str, Promise]:
        """Return method -> what it promises in a run of `steps`; methods that were not measured are left out."""
        family = self.model.family and self.model.family.name
        promises = {choice.config.name: choice.promise(steps or 0, family) for choice in self.chosen}
        return {name: promise for name, promise in promises.items() if promise is not None}

    def words(self, steps: int | None = None) -> str:
        """Return in one line what the preset is, what it leaves out, and what was measured of it in `steps`."""
        parts = [f"{choice.config.name} {choice.what}" for choice in self.chosen] or ["nothing that this model takes"]
        parts += [f"{name} measured: {promise}" for name, promise in self.promises(steps).items()]
        parts += [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        return f"preset {self.level}: {'; '.join(parts)}"


def _suits(choice: Choice, model: Model, beside: Sequence[MethodConfig]) -> bool:
    """Tell whether a choice is meant for a kind of model, and extends no axis that another method extends."""
    extended = {axis for config in beside for axis in handler_of(config).extends}
    not_advised = model.family.not_advised if model.family else ()
    return (
        choice.models in ("all", "image" if model.adapter.makes_images else "video")
        and choice.config.name not in not_advised
        and not extended & handler_of(choice.config).extends
    )


def preset_methods(
    level: str,
    model: Model,
    named: Sequence[MethodConfig] = (),
    try_out: Callable[[Sequence[MethodConfig]], object] | None = None,
    noisy: bool = False,
) -> PresetMethods:
    """Return what a preset attaches to a model beside the methods that the user names, which win.

    ``try_out``: raises `ConfigError` for methods that can't be attached together; unset: what the model's family tells.
    ``noisy``: the scheduler adds noise anew in each step.
    """
    if level == NONE:
        return PresetMethods(level, model)
    if level not in PRESETS:
        raise ConfigError(f"no preset is called {level!r}; {did_you_mean(str(level), NAMES)}")
    try_out = try_out or partial(make_handlers, model=model, alone=False)
    chosen: list[Choice] = []
    left_out: dict[str, str] = {}
    for choice in PRESETS[level]:
        beside, name = [*named, *(earlier.config for earlier in chosen)], choice.config.name
        if not _suits(choice, model, beside):
            continue
        if choice.repeats and noisy:
            left_out[name] = "the scheduler adds noise anew in each step, so no prediction holds for two"
            continue
        try:
            try_out([*beside, choice.config])
        except ConfigError as error:
            if all(config.name != name for config in named):
                left_out[name] = str(error)
        else:
            chosen.append(choice)
    return PresetMethods(level, model, tuple(chosen), left_out)
