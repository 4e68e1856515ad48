"""TeaCache: steps are skipped while the first block's input hardly changes, rescaled to the change of the output.

Source: TeaCache (arXiv 2411.19108). Where we depart from it: a forward is skipped whole, and what is continued is its
output or residual, not the last block's; a polynomial that falls below 0 counts as 0; the first branch of a step
decides for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...rules.caching import rescaled
from ..base import Model
from ..options import Rule
from ..site import ForwardContext, Site
from .calibrated import CalibratedConfig, CalibratedHandler
from .signal import SignalHandler

Polynomial = Annotated[tuple[float, ...], Rule("a list of one coefficient or more", bool)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeaCache(CalibratedConfig):
    """Skips steps whose input to the first block hardly changed, by a fitted polynomial (TeaCache, arXiv 2411.19108).

    The signal is the first block's input after it was modulated by the timestep; Wan's is the timestep's embedding.
    Each step adds f(mean|s - s'| / mean|s'|) of the signals of this step and the one before; steps are skipped while
    the sum stays below the threshold. All rows of a batch are measured and skipped together.

    Absent are the polynomials published for HiDream, Cosmos and Lumina, whose adapters describe no signal.

    Attributes:
        threshold: share of the output's size; 0 skips nothing.
        polynomial: coefficients of f, the highest power first. Unset: those published for the model.
        polynomial_2: the same of a second transformer, such as Wan 2.2's for low noise.
        use_ret_steps: the mode of that name of Wan's released code: the signal is the timestep's embedding after its
            projection to the blocks' modulation, and the published polynomials, thresholds, five first steps and no
            last one are that mode's.
    """

    name: ClassVar[str] = "teacache"
    defaults: ClassVar[Mapping[str, Any]] = {
        "threshold": 0.1, "warmup_steps": 1, "last_steps": 1, "polynomial": None, "polynomial_2": None,
    }  # fmt: skip
    numbers: ClassVar[str] = "polynomial"

    polynomial: Polynomial | None = None
    polynomial_2: Polynomial | None = None
    use_ret_steps: bool | None = None

    def __post_init__(self) -> None:
        CalibratedConfig.__post_init__(self)
        if self.polynomial is None and self.polynomial_2 is not None:
            raise ConfigError("teacache.polynomial_2 is set and polynomial is not; give one for each transformer")


class TeaHandler(SignalHandler, CalibratedHandler):
    """TeaCache on one model."""

    config_type = TeaCache
    settings: TeaCache

    def __init__(self, config: TeaCache, model: Model) -> None:
        adapter = model.adapter
        signal = adapter.projected_signal if config.use_ret_steps else adapter.signal
        if signal is None and config.use_ret_steps:
            raise ConfigError(
                f"teacache.use_ret_steps needs the timestep's projected embedding, and the adapter of {adapter.name} "
                "does not say how to get it; leave it out, or give the adapter a projected_signal"
            )
        if signal is None:
            raise ConfigError(
                f"teacache needs the input of the first block, and the adapter of {adapter.name} does not say how to "
                "get it; use easycache, or give the adapter a signal"
            )
        super().__init__(config, model)
        self._signal_of = signal

    @classmethod
    def recipe_name(cls, config: TeaCache) -> str:
        return "teacache_ret" if config.use_ret_steps else config.name

    def install(self, site: Site) -> None:
        """Run around every forward of the transformer; raise `ConfigError` if there is no polynomial for it."""
        if self._polynomial(site.name) is None:
            raise ConfigError(
                f"teacache has one polynomial, and the model has a second transformer, {site.name}; set "
                "teacache.polynomial_2, or measure both with dit-accel tune teacache"
            )
        super().install(site)

    def signal(self, context: ForwardContext) -> Tensor:
        """Return the first block's input after its modulation."""
        with torch.no_grad():
            return self._signal_of(self.transformer_of(context), context.inputs)

    def rescaled(self, context: ForwardContext, change: float) -> float:
        polynomial = self._polynomial(context.transformer)
        assert polynomial is not None
        return rescaled(polynomial, change)

    def _polynomial(self, transformer: str) -> tuple[float, ...] | None:
        return self.settings.polynomial_2 if transformer.endswith("_2") else self.settings.polynomial
