"""How long a run takes in which a step cache skips forwards, beside attention that is sparse in some steps alone.

A cache computes the first steps and a few others whatever happens, which are those that stay dense too: so what it
skips are the cheap ones, and the two speed-ups do not multiply.
"""

from ..methods.caches.cache_config import StepCacheConfig
from ..methods.presets import MEASURED_STEPS
from .estimate import Estimate


def speedup_with_skips(found: Estimate, cache: StepCacheConfig, share: float) -> float:
    """Return the predicted speed-up of the denoising loop where a cache decides by data what it skips.

    As `Estimate.speedup_of_methods` it is over the dense loop of the same model.

    Of the steps that it may skip as many are counted in a row as where it was measured, fewer in runs of fewer steps,
    whose outputs change more from step to step: with r skipped after each computed one, r / (1 + r) of them.

    Args:
        found: the run without what the cache saves.
        cache: the cache, its options filled in.
        share: of the forwards, that it skipped in a run of `MEASURED_STEPS` steps.
    """
    steps = found.num_inference_steps
    skippable = share * MEASURED_STEPS / _may_skip(cache, MEASURED_STEPS).count(True)
    in_a_row = skippable / (1.0 - skippable) * min(1.0, steps / MEASURED_STEPS)
    computed = 1.0 / (1.0 + in_a_row)
    costs = _costs(found)
    spent = sum(cost * (computed if may else 1.0) for cost, may in zip(costs, _may_skip(cache, steps), strict=True))
    return found.speedup_of_methods * sum(costs) / spent


def _may_skip(cache: StepCacheConfig, steps: int) -> list[bool]:
    return [cache.always_computed(index, steps) is None for index in range(steps)]


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
