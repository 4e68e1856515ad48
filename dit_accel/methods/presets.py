"""Presets: which methods `attach` takes where the user names none, with the figures that each choice rests on.

A level promises a distance to the user's own dense run of the same seed and steps, as measured on the two embedded
models by ``eval/suites/presets-*.toml``; larger models were not measured, and their entries name what is published.
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
from .registry import handler_of

Level = Literal["careful", "balanced", "fast"]
LEVELS: tuple[Level, ...] = get_args(Level)

NONE = "none"
"""The word for no preset."""

MEASURED_ON = ("wan-tiny", "flux-tiny")
"""The families on which the levels were measured; to others the same rule applies unmeasured."""

MEASURED_STEPS = 30
"""The steps of those runs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One method of a preset.

    Attributes:
        config: the method.
        models: which models take it.
        what: what it does here, in a few words, for the line that a user reads.
        source: the figure that the choice rests on.
        beyond: it acts on outputs beyond the trained size alone.
        skips: share of the forwards that it skipped where that was measured; None: it skips none, or not measured.
        psnr: dB to the user's own dense run there, the least mean of the measured models; None: not measured.
    """

    config: MethodConfig
    models: Literal["all", "video", "image"]
    what: str
    source: str
    beyond: bool = False
    skips: float | None = None
    psnr: float | None = None


def _cache(warmup: float, in_a_row: int, *, held: bool = False, skips: float, psnr: float) -> Choice:
    """Return a step cache; distilled models of up to 9 steps are computed whole.

    The warm-up and the growing bound on steps in a row decide more of what is skipped than the threshold: a level saves
    about as much on one model as on another. Short gaps are continued by Heun's slopes, long ones held.
    """
    config = EasyCache(
        threshold=0.2, warmup_steps=warmup, last_steps=1 if held else 2, max_consecutive=in_a_row, growing=True,
        predictor="hold" if held else "heun", stored="output" if held else "residual", min_steps=10,
    )  # fmt: skip
    return Choice(
        config,
        "all",
        f"skips up to {in_a_row} steps in a row after the first {warmup:.0%}, in runs of 10 steps or more",
        "measured: eval/suites/presets-wan-tiny.toml and presets-flux-tiny.toml",
        skips=skips,
        psnr=psnr,
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
    "careful": (_cache(0.5, 2, skips=0.25, psnr=52.0), *_BEYOND),
    "balanced": (_cache(0.3, 3, skips=0.38, psnr=41.1), _sparse(1.0), *_BEYOND),
    "fast": (_cache(0.25, 4, held=True, skips=0.46, psnr=36.0), _sparse(1.3), *_BEYOND),
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
    kind = "image" if "ultravico" in model.adapter.refused else "video"
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


def spell(level: str, chosen: Sequence[Choice]) -> str:
    """Return in one line what a preset is on a model."""
    parts = [f"{choice.config.name} {choice.what}" for choice in chosen]
    return f"preset {level}: {'; '.join(parts) or 'nothing that this model takes'}"
