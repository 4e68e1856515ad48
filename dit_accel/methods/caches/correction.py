"""What skipped steps moved the latents wrongly, by what the next computed step shows, is made good in that step.

A predictor-corrector solver corrects a step once the model was called at its end; across skipped steps nothing does.
The step that is computed after them shows how far the forecast had come off by then, and `rules.forecast.growth` how
that grew: so what they added to the latents is known, and a share of the error is taken off.
"""

from collections.abc import Callable, Sequence
from math import nan
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..site import ForwardContext
from .cache_config import StepCacheConfig

SHARE = 0.35
"""Of the error that is taken off; the model mends the rest itself, as its next outputs start from the wrong latents."""

DAMPING = 0.2
"""Share of the line's change that a corrected forecast does not follow; without a correction that loses quality."""


class ForecastCorrection:
    """Corrects the computed outputs of one branch for what the skipped steps before them were off by."""

    def __init__(self, settings: StepCacheConfig) -> None:
        self._settings = settings
        self._skipped: list[tuple[int, float]] = []  # (step, noise level) since the last computed step
        self._sigma = self._before = nan  # noise level of the last step, and of the one before it

    def skipped(self, context: ForwardContext) -> None:
        """Note a skipped step."""
        self._skipped.append((context.step_index, self._noise_level(context)))

    def computed(
        self, output: Any, context: ForwardContext, growth: Callable[[int], float],
        missed: Callable[[], Sequence[Tensor | None]],
    ) -> Any:  # fmt: skip
        """Return the output of a computed step, corrected for the skipped steps before it.

        ``growth``: step -> what the forecast for it is off by, up to a factor.
        """
        sigma, skipped = self._noise_level(context), self._skipped
        self._skipped = []
        width = sigma if context.step_index + 1 == context.num_inference_steps else self._before - sigma
        if not skipped or not width > 0:
            return output
        # each skipped step moved the latents by its error times its width: their sum, in units of this step's error
        levels = [*(level for _, level in skipped), sigma]
        moved = sum(growth(step) * (level - after) for (step, level), after in zip(skipped, levels[1:], strict=True))
        weight = SHARE * moved / growth(context.step_index) / width
        leaves, spec = tree_flatten(output)
        return tree_unflatten([_plus(leaf, off, weight) for leaf, off in zip(leaves, missed(), strict=True)], spec)

    def _noise_level(self, context: ForwardContext) -> float:
        """Return the noise level of a step, which says how far the step before it went."""
        sigma = context.sigma
        if sigma is None:
            needs = self._settings.noise_needed()
            assert needs is not None
            raise needs.untold()
        if sigma != self._sigma:  # else a scheduler calls twice in a step
            self._before, self._sigma = self._sigma, sigma
        return sigma


def _plus(leaf: Any, off: Tensor | None, weight: float) -> Any:
    return leaf if off is None else leaf.to(off.dtype).add(off, alpha=weight).to(leaf.dtype)
