"""What sparse attention lost where that is known: in calls that were dense in turn, beside the lists before them."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..plan.context import CallContext
from .sections import Section, Strip


def error_section(method: str, measured: Sequence[tuple[CallContext, Tensor]]) -> Section:
    """Return a report's section on one call or more, each with the squares of `lists_error`, read at once."""
    squares = torch.stack([x.to(measured[0][1].device) for _, x in measured]).double()
    errors = (squares[:, :2] / squares[:, 2:].clamp(min=1e-30)).sqrt()
    names = ("transformer", "branch", "step_index", "layer")
    calls: list[dict[str, Any]] = [
        {**{name: getattr(context, name) for name in names}, "error": error, "tiles_alone": alone}
        for (context, _), (error, alone) in zip(measured, errors.tolist(), strict=True)
    ]
    mean, alone = errors.mean(0).tolist()
    layers, steps = _means(calls, "layer"), _means(calls, "step_index")
    worst = sorted(layers, key=lambda layer: -layers[layer])[:3]
    named = min(steps), max(steps, key=lambda step: steps[step]), max(steps)
    lines = (
        f"error of attention at {len(calls)} dense turns: {mean:.3f} mean, {alone:.3f} by the tiles alone",
        f"worst layers: {', '.join(f'{layer} ({layers[layer]:.3f})' for layer in worst)}",
        f"first, worst and last step: {', '.join(f'{step} ({steps[step]:.3f})' for step in named)}",
    )
    strips = []
    for panel in dict.fromkeys((call["transformer"], call["branch"]) for call in calls):
        means = _means([call for call in calls if (call["transformer"], call["branch"]) == panel], "step_index")
        strips.append(Strip(
            transformer=panel[0], branch=panel[1], steps=tuple(means), values=tuple(means.values()),
            reused=(False,) * len(means), did="measured", measured="error of attention",
        ))  # fmt: skip
    data = {"error": mean, "tiles_alone": alone, "measured": calls}
    return Section(method=method, title=method, lines=lines, data=data, strips=tuple(strips))


def _means(calls: Sequence[dict[str, Any]], by: str) -> dict[int, float]:
    keys = sorted({call[by] for call in calls})
    return {key: fmean(call["error"] for call in calls if call[by] == key) for key in keys}
