"""What several methods together leave of the attention's tiles, each call counted by which of them are active in it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..methods.saving import Saving


@dataclass(frozen=True, slots=True, kw_only=True)
class TilesLeft:
    """What methods leave of the visual tiles.

    Attributes:
        kept: exact tiles, mean over the planned calls; expected where a method decides by the data.
        total: tiles in all.
        dense_share: share of the attention calls (computed steps x layers) that stay dense, w.
        pools: tiles that are not exact enter as one key each.
        rows_alone: all that is left out are whole rows, which needs no sparse kernel.
    """

    kept: int
    total: int
    dense_share: float
    pools: bool
    rows_alone: bool = False

    @property
    def density(self) -> float:
        """Exact share of the tiles in a planned call."""
        return self.kept / self.total


def tiles_left(savings: Mapping[str, Saving], steps: int, layers: int, usual: int) -> TilesLeft | None:
    """Return what methods together leave of the tiles over a run; None where none thins attention out.

    Args:
        savings: method name -> what it declares, in the order in which they act.
        steps: denoising steps.
        layers: attention layers.
        usual: tiles along each side where no method cuts any.
    """
    parts = {name: saving.tiles for name, saving in savings.items() if saving.tiles is not None}
    if not parts:
        return None
    sizes = {name: part.tiles for name, part in parts.items() if part.tiles is not None}
    if len(set(sizes.values())) > 1:
        counted = " and ".join(f"{name} {size} a side" for name, size in sizes.items())
        raise ConfigError(f"these methods count different tiles, {counted}; plan them one at a time")
    skipped = frozenset[int]().union(*(saving.skipped for saving in savings.values()))
    computed = [step for step in range(steps) if step not in skipped] or range(steps)
    calls = Counter(
        tuple(part.active(step, layer) for part in parts.values()) for step in computed for layer in range(layers)
    )
    size = next(iter(sizes.values()), usual)
    kept, planned = 0.0, 0
    for active, count in calls.items():
        if not any(active):
            continue
        share = np.ones((size, size))
        for part, acts in zip(parts.values(), active, strict=True):
            share = part.keep(share) if acts else share
        kept, planned = kept + count * float(share.sum()), planned + count
    return TilesLeft(
        kept=round(kept / planned) if planned else size * size,
        total=size * size,
        dense_share=1 - planned / (len(computed) * layers),
        pools=any(part.pools for part in parts.values()),
        rows_alone=not sizes,
    )
