"""Presets: which methods `attach` takes where the user names none, with the figures that each choice rests on.

A level is a distance to the user's own dense run of the same seed, steps and solver. What it promises in a run of so
many steps is in `preset_figures`, as measured on the two embedded models; larger ones were not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ConfigError, did_you_mean
from .attention.sol import SolAttention
from .attention.ultravico import UltraViCo
from .base import Model
from .caches.easy import EasyCache
from .compose import make_handlers
from .config import MethodConfig
from .positions.rope import RoPE
from .preset_figures import Promise, promise
from .registry import handler_of

Level = Literal["careful", "balanced", "fast"]
LEVELS: tuple[Level, ...] = get_args(Level)

NONE = "none"
"""The word for no preset."""

MEASURED_ON = ("wan-tiny", "flux-tiny")
"""The families on which the levels were measured; to others the same rule applies unmeasured."""

LEAST_STEPS = 12
"""Steps of a run from which on the levels skip any: in shorter ones not all were nearer than fewer steps."""

REACH = 0.035
"""Share of the run that a line is followed: one step of 29 or more, two of 58; longer gaps are held."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One method of a preset.

    Attributes:
        config: the method.
        models: which models take it.
        what: what it does here, in a few words, for the line that a user reads.
        source: the figure that the choice rests on.
        beyond: it acts on outputs beyond the trained size alone.
        level: the preset whose `preset_figures` are this method's; None: not measured.
    """

    config: MethodConfig
    models: Literal["all", "video", "image"]
    what: str
    source: str
    beyond: bool = False
    level: Level | None = None

    def promise(self, steps: int, family: str | None = None) -> Promise | None:
        """Return what it promises in a run of so many steps of a family; None: it skips nothing, or not measured."""
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


def _sparse(beta: float) -> Choice:
    """Return sparse attention over long sequences."""
    return Choice(
        SolAttention(beta=beta, min_tokens=SolAttention.worthwhile_tokens),
        "video",
        f"sparse attention from {SolAttention.worthwhile_tokens:,} visual tokens on",
        "published (arXiv 2607.24027), not measured by us on a model of that size",
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
}


def choices(level: str, model: Model, named: Sequence[MethodConfig] = ()) -> list[Choice]:
    """Return what a preset attaches to a model beside the methods that the user names, which win.

    Left out is what the model refuses, or can't be attached together with the named methods. `NONE` attaches nothing.

    Raises:
        ConfigError: for an unknown level.
    """
    if level == NONE:
        return []
    if level not in PRESETS:
        raise ConfigError(f"no preset is called {level!r}; {did_you_mean(str(level), (*LEVELS, NONE))}")
    kind = "image" if model.adapter.makes_images else "video"
    not_advised = model.family.not_advised if model.family else ()
    chosen: list[Choice] = []
    for choice in PRESETS[level]:
        beside = [*named, *(one.config for one in chosen)]
        extended = {axis for config in beside for axis in handler_of(config).extends}
        twice = extended & handler_of(choice.config).extends
        if choice.models not in ("all", kind) or choice.config.name in not_advised or twice:
            continue
        if _fits([*beside, choice.config], model):
            chosen.append(choice)
    return chosen


def _fits(configs: Sequence[MethodConfig], model: Model) -> bool:
    try:
        make_handlers(configs, model, alone=False)
    except ConfigError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class PresetMethods:
    """What a preset attaches to a model."""

    level: str
    chosen: tuple[Choice, ...]
    model: Model

    def promises(self, steps: int | None) -> dict[str, Promise]:
        """Return method -> what it promises in a run of so many steps, of what was measured and acts in it."""
        family = self.model.family and self.model.family.name
        found = {one.config.name: one.promise(steps or 0, family) for one in self.chosen}
        return {name: one for name, one in found.items() if one is not None}

    def words(self, steps: int | None = None) -> str:
        """Return in one line what the preset is, and what of it was measured in runs of so many steps."""
        parts = [f"{one.config.name} {one.what}" for one in self.chosen] or ["nothing that this model takes"]
        parts += [f"{name} measured: {one}" for name, one in self.promises(steps).items()]
        return f"preset {self.level}: {'; '.join(parts)}"
