"""The prompt and the seed of each clip, by its number: held-out ones of an embedded model, or one's own."""

from dataclasses import dataclass
from typing import Protocol

from dit_accel_assets import held_out_prompts

from dit_accel import ConfigError


class Clips(Protocol):
    """What clips show, by their numbers."""

    def prompt(self, clip: int) -> str:
        """Return the prompt of a clip, by its number."""
        ...

    def seed(self, clip: int) -> int:
        """Return the seed of a clip, by its number."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutClips:
    """Held-out prompts of an embedded model, each clip's number also its seed.

    Attributes:
        model: its name.
        only: the prompt of all clips; None: each number's own.
    """

    model: str
    only: str | None = None

    def prompt(self, clip: int) -> str:
        """Return the prompt of a clip, by its number."""
        return held_out_prompts(self.model, clip + 1)[clip] if self.only is None else self.only

    def seed(self, clip: int) -> int:
        """Return the seed of a clip, by its number."""
        return clip


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnClips:
    """Prompts with their seeds: clips are every prompt with every seed, a prompt's clips one after another.

    Attributes:
        prompts: what to show.
        seeds: of the noise; empty: each prompt has one of its own, its place in the list.

    Raises:
        ConfigError: for no prompt, an empty one, one given twice, or seeds that are none.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("prompts is an empty list; name one or more")
        for prompt in self.prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise ConfigError(f"prompts has {prompt!r}, which is no text; write each in quotes")
            if self.prompts.count(prompt) > 1:
                raise ConfigError(f"prompts has {prompt!r} twice; leave one out, or give it several seeds")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                raise ConfigError(f"seeds has {seed!r}; give whole numbers from 0 to 2**63 - 1")
            if self.seeds.count(seed) > 1:
                raise ConfigError(f"seeds has {seed} twice; leave one out")

    def __len__(self) -> int:
        return len(self.prompts) * max(1, len(self.seeds))

    def prompt(self, clip: int) -> str:
        """Return the prompt of a clip, by its number."""
        return self.prompts[clip // max(1, len(self.seeds))]

    def seed(self, clip: int) -> int:
        """Return the seed of a clip, by its number."""
        return self.seeds[clip % len(self.seeds)] if self.seeds else clip
