"""How long a run takes in which a step cache skips forwards, beside attention that is sparse in some steps alone.

A cache computes the first steps and a few others whatever happens, which are those that stay dense too: so what it
skips are the cheap ones, and the two speed-ups do not multiply.
"""

from ..methods.caches.cache_config import StepCacheConfig
from .estimate import Estimate


def speedup_with_skips(found: Estimate, cache: StepCacheConfig, share: float) -> float:
    """Return the predicted speed-up of the denoising loop where a cache decides by data what it skips.

    As `Estimate.speedup_of_methods` it is over the dense loop of the same model. What is skipped is spread evenly over
    the steps that may be.

    Args:
        found: the run without what the cache saves.
        cache: the cache, its options filled in.
        share: of the forwards, that it skips in a run of so many steps.
    """
    steps = found.num_inference_steps
    may = [cache.always_computed(index, steps) is None for index in range(steps)]
    computed = 1.0 - min(1.0, share * steps / max(1, sum(may)))
    costs = _costs(found)
    spent = sum(cost * (computed if skips else 1.0) for cost, skips in zip(costs, may, strict=True))
    return found.speedup_of_methods * sum(costs) / spent


def _costs(found: Estimate) -> list[float]:
    """Return what each step costs, as a share of a dense one in 16 bits."""
    thinning = [saving.tiles for saving in found.savings.values() if saving.tiles is not None]
    attention, layers = found.attention_share, found.family.layers
    others = 1.0 - attention - found.saved_by_linears
    kept = found.pair_density * found.cost_of_pairs
    costs: list[float] = []
    for step in range(found.num_inference_steps):
        sparse = sum(any(part.active(step, layer) for part in thinning) for layer in range(layers)) / layers
        costs.append(others + attention * (1.0 - sparse + sparse * kept))
    return costs
