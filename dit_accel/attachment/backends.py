"""What may compute the attention calls of an attachment, whether it can run here, and why a run planned none.

A run in which methods were attached and that planned nothing is told of once, instead of a silent no-op.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

from dit_accel_kernels import (
    BACKENDS,
    cudnn_requirement,
    fa4_requirement,
    flashinfer_requirement,
    flex_requirement,
    triton_requirement,
)

from ..errors import ConfigError, MissingBackend, did_you_mean
from ..estimate.kept_races import own_device
from ..methods.base import AttentionHandler, Handler, Phase
from ..plan.layout import TokenLayout
from .state import DenoisingState

Backend = Literal["auto", "triton", "cudnn", "fa4", "flashinfer", "torch", "gather", "flex", "reference"]
Dense = Literal["auto", "user"]
WITHOUT_VOTES = ("cudnn", "fa4", "flashinfer", "flex")


def check_backend(backend: Any, dense: Any, handlers: Sequence[Handler]) -> None:
    """Raise `MissingBackend` for a kernel backend that can't run here, `ConfigError` for another ``dense``."""
    if dense not in get_args(Dense):
        raise ConfigError(f"attach takes dense={' or '.join(map(repr, get_args(Dense)))}, got {dense!r}")
    if backend not in BACKENDS:
        raise MissingBackend(f"attach has no kernel backend {backend!r}; {did_you_mean(str(backend), BACKENDS)}")
    # the model may still wait in main memory: ask the device it will run on; a torch built for one may find none
    device = own_device()
    requirements = {
        "triton": triton_requirement, "cudnn": cudnn_requirement, "fa4": fa4_requirement,
        "flashinfer": flashinfer_requirement, "flex": lambda on: flex_requirement(on.type),
    }  # fmt: skip
    if backend in requirements and (missing := requirements[backend](device)):
        raise MissingBackend(f"kernel backend {backend!r} needs {missing}; use 'auto' or 'torch'")
    attention = [handler for handler in handlers if isinstance(handler, AttentionHandler)]
    for handler in attention:
        precision = handler.precision
        if precision is None or backend == "reference":  # which simulates it
            continue
        needs = f"{handler.name}.precision = {precision!r} needs kernel backend 'triton'"
        if backend not in ("auto", "triton"):
            raise MissingBackend(f"{needs}, got {backend!r}; use 'auto', or leave the precision out")
        if missing := triton_requirement(device, precision=precision):
            raise MissingBackend(f"{needs}, which needs {missing}; leave the precision out")
    voting = [handler.name for handler in attention if handler.votes]
    if backend in WITHOUT_VOTES and voting:
        raise MissingBackend(f"kernel backend {backend!r} has no votes, which {voting[0]} needs; use 'auto' or 'torch'")


class UnplannedRun(UserWarning):
    """A run planned no attention call though a method that acts on attention was attached."""


class ReplacedTransformer(UserWarning):
    """A pipeline was given another transformer than the one that methods are attached to."""


def problem_of(denoising: DenoisingState) -> str:
    """Return the first problem of a run so far, in words; empty where there is none."""
    reasons = replaced_transformers, unplanned_reason, replaced_processors
    return next((why for reason in reasons if (why := reason(denoising))), "")


def replaced_transformers(denoising: DenoisingState) -> str | None:
    """Tell which transformers of the pipeline were replaced since attach, or None."""
    engine, pipe = denoising.engine, denoising.pipe
    replaced = []
    for state in sorted(engine.transformers.values(), key=lambda state: state.name):
        current = getattr(pipe, state.name, None)
        compiled_since = state.part is state.transformer and getattr(current, "_orig_mod", None) is state.transformer
        if current is not None and current is not state.part and not compiled_since:
            replaced.append(f"{state.name} was replaced after attach by another {type(current).__name__}")
    why = "to which nothing is attached: what it runs is plain and not in the report; detach, and attach again"
    return f"{'; '.join(replaced)}, {why}" if replaced else None


def replaced_processors(denoising: DenoisingState) -> str | None:
    """Tell how many of our processors were replaced since attach, or None."""
    engine = denoising.engine
    replaced = sum(layer.module.processor is not layer.processor for layer in engine.layers)
    why = "attention processors were replaced after attach, so that no method acts there; detach and attach again"
    return f"{replaced} of {len(engine.layers)} {why}" if replaced else None


def unplanned_reason(denoising: DenoisingState) -> str | None:
    """Tell why the run so far planned no attention call, or None where it did, or where there was nothing to plan."""
    engine, recorder = denoising.engine, denoising.engine.recorder
    layouts = {layout for layer in engine.layers for layout, _ in layer.state.layouts.values()}
    # guidance speaks for itself
    handlers = (handler for handler in engine.attention if handler.phase is not Phase.GUIDANCE)
    attention = [handler for handler in handlers if _should_plan(handler, layouts)]
    if not attention or not recorder.forwards_run or recorder.planned:
        return None
    names = ", ".join(handler.name for handler in attention)
    begin = f"{names}: attached, but no attention call of the run was planned"
    if (replaced := replaced_processors(denoising)) is not None:
        return f"{begin}; {replaced}"
    if layouts and not any(handler.applies(layout) for handler in attention for layout in layouts):
        return f"{begin}; " + ("; ".join(recorder.notes) or "none of them changes anything over this layout")
    if recorder.notes:
        begin = f"{begin} ({'; '.join(recorder.notes)})"
    steps, dense = denoising.num_inference_steps, [text for handler in attention for text in _dense_options(handler)]
    length = f"the run had {steps} steps" if steps else "the number of steps is not known"
    if not dense:
        return f"{begin}; {length}, and no option keeps one dense; detach, or report this"
    return f"{begin}; {length}, {', '.join(dense)}: lower these, or detach"


def _should_plan(handler: AttentionHandler, layouts: set[TokenLayout]) -> bool:
    """Tell whether a method acts over some layout, or never means to leave short sequences or small pictures alone."""
    leaves_some = getattr(handler.settings, "min_tokens", None) or getattr(handler, "two_stages", False)
    return not leaves_some or any(map(handler.applies, layouts))


def _dense_options(handler: AttentionHandler) -> list[str]:
    names = ("dense_steps", "dense_last_steps", "dense_layers", "dense_above_sigma")
    values = {name: getattr(handler.settings, name, None) for name in names}
    return [f"{handler.name}.{name} = {value}" for name, value in values.items() if value]


def warn_if_unplanned(denoising: DenoisingState) -> bool:
    """Warn if a run that ends planned no attention call; tell whether it warned."""
    reason = unplanned_reason(denoising)
    if reason is not None:
        warnings.warn(reason, UnplannedRun, stacklevel=2)
    return reason is not None
