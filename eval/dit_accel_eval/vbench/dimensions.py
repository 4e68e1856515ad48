"""VBench's sixteen dimensions: the group of each, its weight there, and the range to which its score is brought.

Source: Huang et al., arXiv 2311.17982; the constants are those of the official totals (scripts/constant.py).
"""

from dataclasses import dataclass
from typing import Literal

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

Group = Literal["quality", "semantic"]

GROUP_WEIGHTS: dict[Group, int] = {"quality": 4, "semantic": 1}
"""What the groups weigh in the total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One dimension of VBench.

    Attributes:
        name: as files and commands call it.
        group: the group in which it counts.
        low: raw score that becomes 0.
        high: raw score that becomes 1; higher ones are not cut off.
        weight: what it weighs in its group.
        least: least raw score that its formula can give: cosines may be below 0, shares not.
    """

    name: str
    group: Group
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    least: float = 0.0

    def normalized(self, raw: float) -> float:
        """Return a raw score on the scale of the totals."""
        return (raw - self.low) / (self.high - self.low)


_ALL = (
    Dimension(name="subject_consistency", group="quality", low=0.1462),
    Dimension(name="background_consistency", group="quality", low=0.2615),
    Dimension(name="temporal_flickering", group="quality", low=0.6293),
    Dimension(name="motion_smoothness", group="quality", low=0.706, high=0.9975),
    Dimension(name="dynamic_degree", group="quality", weight=0.5),
    *(Dimension(name=name, group="quality") for name in ("aesthetic_quality", "imaging_quality")),
    *(Dimension(name=name, group="semantic") for name in
      ("object_class", "multiple_objects", "human_action", "color", "spatial_relationship")),
    Dimension(name="scene", group="semantic", high=0.8222),
    Dimension(name="appearance_style", group="semantic", low=0.0009, high=0.2855, least=-1.0),
    Dimension(name="temporal_style", group="semantic", high=0.364, least=-1.0),
    Dimension(name="overall_consistency", group="semantic", high=0.364, least=-1.0),
)  # fmt: skip

DIMENSIONS: dict[str, Dimension] = {one.name: one for one in _ALL}
"""In the official order."""


def dimension(name: str) -> Dimension:
    """Return a dimension; blanks and hyphens are as good as underscores, and unknown names are refused."""
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    if plain not in DIMENSIONS:
        raise ConfigError(f"there is no dimension {name!r} of VBench; {did_you_mean(plain, DIMENSIONS)}")
    return DIMENSIONS[plain]
