"""What perturbed heads are selected by: an objective, the harmonic mean of several, or one where others are passed.

Source: the released code of HeadHunter (arXiv 2506.10978), which takes the harmonic mean of PickScore and CLIP's score,
or ranks by CLIP's the heads of a PickScore of 20 and an aesthetic score of 6 or more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel import ConfigError

KINDS = ("harmonic", "threshold")


@dataclass(frozen=True, slots=True)
class HeadSelection:
    """How the mean scores of a head become what it is ranked by."""

    kind: str
    objectives: tuple[str, ...]
    least: tuple[float, ...]

    @classmethod
    def of(cls, text: str) -> "HeadSelection":
        """Read an objective, ``harmonic: A, B`` or ``threshold: A, B >= 20, C >= 6``; the first of these ranks."""
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            return cls("", (text,), (-math.inf,))
        parts = [part.partition(">=") for part in rest.split(",")]
        names = tuple(name.strip() for name, _, _ in parts)
        try:
            least = tuple(float(number) if sign else -math.inf for _, sign, number in parts)
        except ValueError:
            least = ()
        bounded = [number > -math.inf for number in least]
        wanted = [False] * len(names) if kind == "harmonic" else [False] + [True] * (len(names) - 1)
        if len(names) < 2 or not all(names) or bounded != wanted:
            raise ConfigError(
                f"an objective of several reads 'harmonic: A, B' or 'threshold: A, B >= 20, C >= 6', whose first ranks "
                f"what passes the others, got {text!r}; write it so"
            )
        return cls(kind, names, least)

    def worth(self, scores: Sequence[Sequence[float]]) -> float:
        """Return what a head is ranked by, from each clip's scores; -inf: it does not pass."""
        means = [math.fsum(one) / len(scores) for one in zip(*scores, strict=True)]
        if self.kind != "harmonic":
            return means[0] if all(map(float.__ge__, means, self.least)) else -math.inf
        if min(means) <= 0:
            raise ConfigError(
                f"harmonic means are of numbers above 0, got {', '.join(f'{mean:.4g}' for mean in means)} for "
                f"{', '.join(self.objectives)}; take objectives that are positive, or threshold"
            )
        return len(means) / math.fsum(1 / mean for mean in means)
