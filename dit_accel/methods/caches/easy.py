"""EasyCache: steps are skipped while the output is expected to change little, by the rate at which it did before.

Source: EasyCache (arXiv 2507.02860). It needs no coefficients and knows nothing of the model. Where we depart from it:
any predictor in place of holding the last residual, and the first branch of a step decides whichever it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..site import ForwardContext, target_sample
from .cache_config import MeasuredCacheConfig
from .engine import Decider, StepCacheHandler
from .ranks import ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class EasyCache(MeasuredCacheConfig):
    """Skips steps whose output is expected to change little (EasyCache, arXiv 2507.02860); needs no calibration.

    With x the latents that go in and v the output, k = |dv| / |dx| over the last two computed steps; each further step
    adds k |dx| / |v|, and is skipped while the sum stays below the threshold. |.| is the mean of the absolute values
    over all rows of a batch, which are skipped together: several prompts in one batch may be skipped at other steps
    than each alone.

    Attributes:
        threshold: share of the output's size, tau; 0 skips nothing. Twice as much skips about twice as many in a row.
    """

    name: ClassVar[str] = "easycache"
    # the paper's for Wan
    defaults: ClassVar[Mapping[str, Any]] = {"threshold": 0.05, "warmup_steps": 0.2, "last_steps": 1}


@dataclass(slots=True)
class EasyDecider(Decider):
    """What EasyCache measures of a branch; tensors on the device.

    Attributes:
        x: latents of the last step.
        x_computed: of the last computed step.
        v: output of the last computed step.
        changes: mean of |dv| and of |dx| between the last two computed steps; None before there were two.
        total: what the steps since the last computed one add up to.
    """

    x: Tensor | None = None
    x_computed: Tensor | None = None
    v: Tensor | None = None
    changes: tuple[Tensor, Tensor] | None = None
    total: float = 0.0


class EasyHandler(StepCacheHandler):
    """EasyCache on one model."""

    config_type = EasyCache
    decider_type = EasyDecider
    settings: EasyCache

    def indicator(self, context: ForwardContext, decider: EasyDecider) -> float | None:
        """Return what the steps since the last computed one add up to, this one included; waits for the device."""
        if decider.changes is None or decider.v is None or decider.x is None:
            return None
        moved = mean_change(self.latents(context), decider.x)
        change, by, now, size = self.numbers(context, *decider.changes, moved, mean_size(decider.v))
        decider.total += ratio(change, by) * ratio(now, size)
        return decider.total

    def seen(self, context: ForwardContext, decider: EasyDecider) -> None:
        """Keep the latents."""
        decider.x = self.latents(context)
        if not decider.reuse:
            decider.total = 0.0

    def computed(self, context: ForwardContext, decider: EasyDecider, output: Any) -> None:
        """Take the changes between the last two computed steps."""
        x, v = decider.x, target_sample(output)
        assert x is not None
        if decider.v is not None and decider.x_computed is not None:
            decider.changes = mean_change(v, decider.v), mean_change(x, decider.x_computed)
        decider.x_computed, decider.v = x, v


def mean_size(of: Tensor, *, spent: bool = False) -> Tensor:
    """Return the mean of the absolute values, summed in float32 or wider; ``spent``: the tensor may be overwritten."""
    size = of.abs_() if spent else of.abs()
    return size.sum(dtype=torch.promote_types(of.dtype, torch.float32)) / of.numel()


def mean_change(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean of |one - other|, in float32."""
    return mean_size(one.float() - other.float(), spent=True)
