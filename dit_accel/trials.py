"""The configs of every method that `dit_accel.testing` tries on a tiny model."""

from dataclasses import dataclass

from .config import MethodConfig
from .methods.frozen import FrozenPattern
from .methods.lite import LiteAttention
from .methods.radial import RadialAttention
from .methods.sol import SolAttention
from .methods.ultravico import UltraViCo


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Two configs of one method.

    Attributes:
        neutral: attached, changes nothing.
        active: changes every layer at every step of a `TinyModel`, but for the first ``warm`` ones.
        warm: steps after which the method changes something: those of a method that learns what to leave out.
        thins: the method leaves tiles out; one that does not changes what is computed of them.
    """

    neutral: MethodConfig
    active: MethodConfig
    warm: int = 0
    thins: bool = True


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
    "frozen": Trial(
        neutral=FrozenPattern(block_size=16, dense_steps=1000),
        active=FrozenPattern(block_size=16, density=0.5, dense_steps=0, dense_last_steps=0, dense_layers=0),
    ),
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
