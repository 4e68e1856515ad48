"""Why a run in which methods were attached planned no attention call: said once, instead of a silent no-op."""

import warnings
from typing import Any

from ..methods.base import Phase
from .execution import Execution


class UnplannedRun(UserWarning):
    """A run planned no attention call though a method that acts on attention was attached."""


class ReplacedTransformer(UserWarning):
    """A pipeline was given another transformer than the one that methods are attached to."""


def replaced_transformers(execution: Execution) -> str | None:
    """Tell which transformers of the pipeline were replaced since attach, or None."""
    pipe = execution.state.pipe
    replaced = []
    for state in sorted({layer.state for layer in execution.layers}, key=lambda state: state.name):
        current = getattr(pipe, state.name, None)
        compiled_since = state.part is state.transformer and getattr(current, "_orig_mod", None) is state.transformer
        if current is not None and current is not state.part and not compiled_since:
            replaced.append(f"{state.name} was replaced after attach by another {type(current).__name__}")
    why = "to which nothing is attached: what it runs is plain and not in the report; detach, and attach again"
    return f"{'; '.join(replaced)}, {why}" if replaced else None


def replaced_processors(execution: Execution) -> str | None:
    """Tell how many of our processors were replaced since attach, or None."""
    replaced = sum(layer.module.processor is not layer.processor for layer in execution.layers)
    why = "attention processors were replaced after attach, so that no method acts there; detach and attach again"
    return f"{replaced} of {len(execution.layers)} {why}" if replaced else None


def unplanned_reason(execution: Execution) -> str | None:
    """Tell why the run so far planned no attention call, or None where it did, or where there was nothing to plan."""
    recorder = execution.recorder
    layouts = {layout for layer in execution.layers for layout, _ in layer.state.layouts.values()}
    attention = [
        one
        for one in execution.attention
        if one.phase is not Phase.GUIDANCE  # which speaks for itself
        and not (_leaves_some(one) and not any(map(one.applies, layouts)))
    ]
    if not attention or not recorder.forwards_run or recorder.planned:
        return None
    names = ", ".join(handler.name for handler in attention)
    begin = f"{names}: attached, but no attention call of the run was planned"
    if (replaced := replaced_processors(execution)) is not None:
        return f"{begin}; {replaced}"
    steps = execution.state.num_inference_steps
    if layouts and not any(handler.applies(layout) for handler in attention for layout in layouts):
        return f"{begin}; " + ("; ".join(recorder.notes) or "none of them changes anything over this layout")
    if recorder.notes:
        begin = f"{begin} ({'; '.join(recorder.notes)})"
    dense = [
        f"{handler.name}.{option} = {value}"
        for handler in attention
        for option in ("dense_steps", "dense_last_steps", "dense_layers", "dense_above_sigma")
        if (value := getattr(handler.settings, option, None))
    ]
    length = f"the run had {steps} steps" if steps else "the number of steps is not known"
    if not dense:
        return f"{begin}; {length}, and no option keeps one dense; detach, or report this"
    return f"{begin}; {length}, {', '.join(dense)}: lower these, or detach"


def _leaves_some(handler: Any) -> bool:
    """Tell whether a method means to change nothing over short sequences, or in the small picture that it asks for."""
    return bool(getattr(handler.settings, "min_tokens", None) or getattr(handler, "two_stages", False))


def warn_if_unplanned(execution: Execution) -> bool:
    """Warn if a run that ends planned no attention call; tell whether it warned."""
    reason = unplanned_reason(execution)
    if reason is not None:
        warnings.warn(reason, UnplannedRun, stacklevel=2)
    return reason is not None
