"""What methods need to know of the noise level, and the one sentence that refuses them where it is not told."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from ..adapters.noise import NOISES, Noise
from ..errors import ConfigError

FLOW: frozenset[Noise] = frozenset({"flow"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsNoise:
    """A method's need of the noise level."""

    asks: str  # what asks for it: the method, or an option with its value
    instead: str  # what to do where it is not told
    kinds: frozenset[Noise] = NOISES  # which noise levels it can work with

    def untold(self, source: str = "the pipeline", noise: Noise = "none") -> ConfigError:
        """Return the error of a source that tells no noise level, or one of another kind."""
        if noise == "none":
            return ConfigError(f"{self.asks} needs the noise level, which {source} does not tell; {self.instead}")
        return ConfigError(
            f"{self.asks} needs the noise level of flow matching, from 0 to 1, and {source} tells noise over signal; "
            f"{self.instead}"
        )


def require_noise(handlers: Iterable[Any], noises: Collection[Noise], source: str) -> None:
    """Raise `ConfigError` for a method that can work with none of the noise levels that a source tells.

    ``noises``: one of these is told; empty: it is not known which.
    """
    for handler in handlers:
        needs: NeedsNoise | None = handler.settings.noise_needed()
        if needs is not None and noises and needs.kinds.isdisjoint(noises):
            raise needs.untold(source, next(iter(noises)))
