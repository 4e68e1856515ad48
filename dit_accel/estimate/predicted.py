"""What attached methods were predicted to gain in a run, once its size and steps are known."""

from collections.abc import Sequence

from torch import nn

from ..errors import ConfigError
from ..methods.base import Handler, Phase
from ..methods.caches.cache_config import StepCacheConfig
from ..methods.presets import PresetMethods
from ..plan.layout import TokenLayout
from ..report.predicted import Predicted
from .estimate import estimate_run
from .linears import linears_of
from .skipped import speedup_with_skips


def predicted(
    handlers: Sequence[Handler],
    layout: TokenLayout,
    steps: int,
    preset: PresetMethods | None = None,
    transformer: nn.Module | None = None,
) -> Predicted | None:
    """Return what methods were predicted to gain; None where the model's sizes are those of no released one.

    Args:
        handlers: the attached methods.
        layout: of the run's forwards.
        steps: of the run.
        preset: what of them was attached as one, which knows what share of the forwards a cache skips.
        transformer: whose linear layers may be in 8 bits, as they are in its dense run too; None: in 16 bits.
    """
    family = handlers[0].model.family if handlers else None
    if family is None:
        return None
    linears = None if transformer is None else linears_of(transformer)
    try:
        found = estimate_run(handlers, family, layout, steps, linears=linears)
    except ConfigError:  # such as methods whose tiles can't be counted together
        return None
    promises = preset.promises(steps) if preset else {}
    speedup, uncounted = found.speedup_of_methods, list[str]()
    for handler in handlers:
        saving, settings = found.savings[handler.name], handler.settings
        if steps < (getattr(settings, "min_steps", None) or 0):
            continue
        if handler.name in promises and isinstance(settings, StepCacheConfig):
            speedup = speedup_with_skips(found, settings, promises[handler.name].skipped)
        elif not saving.counted or (handler.phase is Phase.CACHES and not saving.forwards and not saving.blocks):
            uncounted.append(handler.name)
    return Predicted(speedup=speedup, uncounted=tuple(uncounted), linears=str(linears or ""))
