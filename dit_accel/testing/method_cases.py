"""The configs of every method that `dit_accel.testing.adapter_checks` tries on a tiny model."""

from dataclasses import dataclass
from typing import Any

from ..adapters.rotary import changeable_axes
from ..errors import ConfigError
from ..methods.attention.delta import DeltaAttention
from ..methods.attention.lite.lite_config import LiteAttention
from ..methods.attention.lvsa import LVSA
from ..methods.attention.radial import RadialAttention
from ..methods.attention.sol import SolAttention
from ..methods.attention.sparsed import SparseD
from ..methods.attention.ultravico import UltraViCo
from ..methods.base import Place
from ..methods.caches.cache_config import MeasuredCacheConfig
from ..methods.caches.db import FirstBlockCache
from ..methods.caches.easy import EasyCache
from ..methods.caches.mag import MagCache
from ..methods.caches.sea import SeaCache
from ..methods.caches.static import StaticCache
from ..methods.caches.tea import TeaCache
from ..methods.config import MethodConfig
from ..methods.positions.rope import RoPE
from ..methods.positions.ultraimage import UltraImage
from ..methods.registry import handler_of
from .tiny_models import STEPS, Case


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodCase:
    """Two settings of one method, each a config or, where the method works on another's calls, both configs.

    Attributes:
        neutral: attached, changes nothing.
        active: changes every layer at every step of a `TinyModel`, except the first ``warm`` ones.
        warm: steps after which the method changes something: those in which it learns, or that a cache computes first.
        thins: the method leaves tiles out; one that does not changes what is computed of them.
        everywhere: a method on attention plans every layer in every step from ``warm`` on.
        still_run: the blocks, by number, that a step which a cache skips still runs.
        counted: a cache that needs the number of steps or the noise level.
        trains: a forward that trains may run under it; else it is refused.
        bad: options that are refused, as a dict whose last option is to be named with its value, and further words of
            the error.
        beside: companions, with which it acts together, in either order.
        held: bytes that it holds from step to step; None: the case does not say.
    """

    neutral: MethodConfig | tuple[MethodConfig, ...]
    active: MethodConfig | tuple[MethodConfig, ...]
    warm: int = 0
    thins: bool = True
    everywhere: bool = True
    still_run: tuple[int, ...] = ()
    counted: bool = False
    trains: bool = True
    bad: tuple[tuple[Any, ...], ...] = ()
    beside: tuple[MethodConfig, ...] = ()
    held: int | None = None

    @property
    def config(self) -> MethodConfig:
        """The active config of the method itself."""
        return configs_of(self.active)[0]

    @property
    def places(self) -> frozenset[Place]:
        """Where its methods act; those that act on attention plan every call of the model."""
        return frozenset().union(*(handler_of(config).places for config in configs_of(self.active)))


def configs_of(*settings: MethodConfig | tuple[MethodConfig, ...]) -> tuple[MethodConfig, ...]:
    """Return the configs of some cases' settings, the first of each method."""
    flat = [config for setting in settings for config in (setting if isinstance(setting, tuple) else (setting,))]
    return tuple({type(config): config for config in reversed(flat)}.values())[::-1]


_SPARSE: dict[str, Any] = {"block_size": 16, "dense_steps": 0, "dense_last_steps": 0, "dense_layers": 0}
_WAITING: dict[str, Any] = {"block_size": 16, "dense_steps": 1000}
_SPARSED, _SPARSED_NEUTRAL, _DELTA = SparseD(density=0.5, **_SPARSE), SparseD(**_WAITING), DeltaAttention(stride=8)

METHOD_CASES: dict[str, MethodCase] = {
    "lite": MethodCase(
        neutral=LiteAttention(**_WAITING), warm=1,
        active=LiteAttention(block_size=16, dense_steps=0, threshold=100.0, allow_positive_threshold=True),
    ),
    "lvsa": MethodCase(neutral=LVSA(trained_frames=1000), active=LVSA(block_size=16, trained_frames=2, window=0)),
    "radial": MethodCase(
        neutral=RadialAttention(**_WAITING),
        active=RadialAttention(decay_factor=0.2, near="half", sink=False, **_SPARSE),
    ),
    "sparsed": MethodCase(neutral=_SPARSED_NEUTRAL, active=_SPARSED),
    "delta": MethodCase(neutral=(_DELTA, _SPARSED_NEUTRAL), active=(_DELTA, _SPARSED)),
    "sol": MethodCase(neutral=SolAttention(**_WAITING), active=SolAttention(**_SPARSE)),
    "rope": MethodCase(
        neutral=RoPE(kind="pi", trained_frames=1000, trained_height=1000, trained_width=1000), thins=False,
        active=RoPE(kind="pi", trained_frames=2, trained_height=2, trained_width=2),
    ),
    "ultraimage": MethodCase(
        neutral=UltraImage(correct=False, trained_height=1000, trained_width=1000), warm=1, thins=False,
        active=UltraImage(correct=False, trained_height=2, trained_width=2, focus_max=2.0, rows=16),
    ),
    "ultravico": MethodCase(
        neutral=UltraViCo(trained_frames=1000), thins=False,
        active=UltraViCo(trained_frames=2, alpha=0.5, beta=0.2, period=3, gamma=0.5, first_frame=True),
    ),
}  # fmt: skip
"""Method name -> the configs that `check_adapter` tries; open to every package."""


_ALL: dict[str, Any] = {"warmup_steps": 0, "last_steps": 0}


def _measured(config: type[MeasuredCacheConfig], **options: Any) -> dict[str, Any]:
    """Return the settings of a cache with a threshold, below which all lies or nothing."""
    return {name: config(threshold=at, **options, **_ALL) for name, at in (("neutral", 0.0), ("active", 1e9))}


CACHE_CASES: dict[str, MethodCase] = {
    "staticcache": MethodCase(neutral=StaticCache(every=1, **_ALL), active=StaticCache(every=2, **_ALL), warm=1),
    "easycache": MethodCase(**_measured(EasyCache), warm=2),
    "teacache": MethodCase(**_measured(TeaCache, polynomial=(1.0, 0.0), polynomial_2=(1.0, 0.0)), warm=1),
    "magcache": MethodCase(**_measured(MagCache, ratios=(1.0,) * STEPS), warm=1, counted=True),
    "seacache": MethodCase(**_measured(SeaCache), warm=1, counted=True),
    "firstblockcache": MethodCase(**_measured(FirstBlockCache), warm=1, still_run=(0,)),
}
"""Method name -> the settings of a step cache that `check_adapter` tries; open to every package."""


def cases_for(case: Case) -> dict[str, MethodCase]:
    """Return the cases of the methods that a tiny model can take."""
    adapter, possible, with_positions = case.adapter, {}, _has_positions(case)
    for name, tried in METHOD_CASES.items():
        lacking = (Place.BLOCKS in tried.places and adapter.blocks == ()) or (
            Place.POSITIONS in tried.places and not with_positions
        )
        if not lacking and not any(config.name in adapter.refused for config in configs_of(tried.active)):
            possible[name] = tried
    return possible


def caches_for(case: Case) -> dict[str, MethodCase]:
    """Return the cases of the step caches that a tiny model can take."""
    adapter, possible = case.adapter, {}
    for name, tried in CACHE_CASES.items():
        lacking = (
            name in adapter.refused
            or (tried.still_run and adapter.blocks == ())
            or (isinstance(tried.active, TeaCache) and adapter.signal is None)
            or (tried.counted and not hasattr(case.model.transformer, "cache_context"))
        )
        if not lacking:
            possible[name] = tried
    return possible


def _has_positions(case: Case) -> bool:
    """Tell whether a model has rotary positions along an axis that can be too long."""
    try:
        rope = case.rope
        return rope is not None and bool(changeable_axes(case.adapter.name, rope, case.transformer.config))
    except ConfigError:
        return False


def apart(case: MethodCase, other: MethodCase) -> bool:
    """Tell whether two cases are of methods that can't be attached together."""
    parts = [
        frozenset[str]().union(*(handler_of(config).exclusive for config in configs_of(tried.active)))
        for tried in (case, other)
    ]
    return bool(parts[0] & parts[1])


def warm_of(*cases: MethodCase) -> int:
    """Return after how many steps all of some cases change something."""
    return max((tried.warm for tried in cases), default=0)
