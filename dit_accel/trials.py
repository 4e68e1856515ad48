"""The configs of every method that `dit_accel.testing` tries on a tiny model."""

from dataclasses import dataclass

from .config import MethodConfig
from .methods.delta import DeltaCorrection
from .methods.frozen import FrozenPattern
from .methods.lite import LiteAttention
from .methods.radial import RadialAttention
from .methods.sol import SolAttention
from .methods.ultravico import UltraViCo


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Two settings of one method, each a config or, where the method works on another's calls, that one's as well.

    Attributes:
        neutral: attached, changes nothing.
        active: changes every layer at every step of a `TinyModel`, but for the first ``warm`` ones.
        warm: steps after which the method changes something: those of a method that learns what to leave out.
        thins: the method leaves tiles out; one that does not changes what is computed of them.
    """

    neutral: MethodConfig | tuple[MethodConfig, ...]
    active: MethodConfig | tuple[MethodConfig, ...]
    warm: int = 0
    thins: bool = True


def configs_of(*settings: MethodConfig | tuple[MethodConfig, ...]) -> tuple[MethodConfig, ...]:
    """Return the configs of some trials' settings, the first of each method."""
    flat = [config for setting in settings for config in (setting if isinstance(setting, tuple) else (setting,))]
    return tuple({type(config): config for config in reversed(flat)}.values())[::-1]


_FROZEN = FrozenPattern(block_size=16, density=0.5, dense_steps=0, dense_last_steps=0, dense_layers=0)
_FROZEN_NEUTRAL = FrozenPattern(block_size=16, dense_steps=1000)

TRIALS: dict[str, Trial] = {
    "lite": Trial(
        neutral=LiteAttention(block_size=16, dense_steps=1000),
        active=LiteAttention(block_size=16, dense_steps=0, threshold=100.0, allow_positive_threshold=True),
        warm=1,
    ),
    "radial": Trial(
        neutral=RadialAttention(block_size=16, dense_steps=1000),
        active=RadialAttention(
            block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=0, dense_last_steps=0, dense_layers=0
        ),
    ),
    "frozen": Trial(neutral=_FROZEN_NEUTRAL, active=_FROZEN),
    "delta": Trial(neutral=(DeltaCorrection(stride=8), _FROZEN_NEUTRAL), active=(DeltaCorrection(stride=8), _FROZEN)),
    "sol": Trial(
        neutral=SolAttention(block_size=16, dense_steps=1000),
        active=SolAttention(block_size=16, dense_steps=0, dense_last_steps=0, dense_layers=0),
    ),
    "ultravico": Trial(
        neutral=UltraViCo(trained_frames=1000),
        active=UltraViCo(trained_frames=2, alpha=0.5, beta=0.2, period=3, gamma=0.5, first_frame=True),
        thins=False,
    ),
}
"""Method name -> the configs that `check_adapter` tries; open to every package."""
